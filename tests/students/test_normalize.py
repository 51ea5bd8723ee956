"""Parts of student policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from rpd_sb3.students import RunningNorm

SPACE = spaces.Box(-np.inf, np.inf, (3,), np.float32)


def test_running_moments_are_those_of_all_states_trained_on() -> None:
    states = th.randn(100, 3) * th.tensor([1.0, 0.01, 50.0]) + th.tensor([0.0, 3.0, -7.0])
    norm = RunningNorm(SPACE)
    for batch in states.split([10, 25, 64, 1]):
        norm(batch)
    th.testing.assert_close(norm.mean, states.mean(0))
    th.testing.assert_close(norm.var, states.var(0, unbiased=False))
    normalized = norm.eval()(states)
    th.testing.assert_close(normalized.mean(0), th.zeros(3), atol=1e-3, rtol=0)
    th.testing.assert_close(normalized.std(0), th.ones(3), atol=2e-2, rtol=0)


def test_acting_leaves_the_moments_alone() -> None:
    model = PPO(
        "MlpPolicy", "Pendulum-v1", n_steps=16, batch_size=8, policy_kwargs={"features_extractor_class": RunningNorm}
    )
    model.learn(16)
    before = model.policy.features_extractor.mean.clone()
    assert not th.equal(before, th.zeros(3)), "training moves them"
    model.predict(np.full(3, 100.0, np.float32))
    with th.no_grad():
        model.policy.train()
        model.policy(th.full((1, 3), 100.0))
    assert th.equal(model.policy.features_extractor.mean, before)


def test_outliers_are_clipped() -> None:
    norm = RunningNorm(SPACE, limit=5.0)
    norm(th.randn(100, 3))
    assert norm.eval()(th.full((1, 3), 1e6)).max() == 5.0


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match="RunningNorm normalizes state vectors, got Box"):
        RunningNorm(spaces.Box(0, 255, (8, 8, 3), np.uint8))


def test_frozen_statistics_stay_also_after_saving() -> None:
    norm = RunningNorm(spaces.Box(-1.0, 1.0, (3,)))
    norm.train()
    norm(th.randn(50, 3, generator=th.Generator().manual_seed(0)))
    norm.freeze()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    other = RunningNorm(spaces.Box(-1.0, 1.0, (3,)))
    other.load_state_dict(norm.state_dict())
    for module in (norm, other):
        module.train()
        module(th.full((50, 3), 9.0))
        assert all(th.equal(value, before[name]) for name, value in module.state_dict().items())
