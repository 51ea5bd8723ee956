"""Observations that an export is compared on."""

from __future__ import annotations

import numpy as np
import pytest

from rpd_sb3.envs import make_env
from rpd_sb3.export.observations import SEED, _facts_of, record_observations
from tests.support.tiny_env import TINY
from tests.support.train_helpers import student


def test_observations_are_those_of_seeded_episodes_that_the_policy_plays() -> None:
    model, env, expected = student(), make_env(TINY, length=4), []
    for seed in (SEED, SEED + 1):
        obs, _ = env.reset(seed=seed)
        for _ in range(4):
            expected.append(obs)
            obs, *_ = env.step(model.predict(obs, deterministic=True)[0])
    recorded = record_observations(TINY, {"length": 4}, model, n=7)
    np.testing.assert_array_equal(recorded.observations["state"], np.array(expected[:7]), strict=True)


def test_an_endless_episode_is_cut_off() -> None:
    assert record_observations(TINY, {"length": 10**9}, student(), n=5).observations["state"].shape == (5, 2)


@pytest.mark.parametrize("crop", [None, [0.25, 0.43, 0.5]])
def test_a_robot_is_told_which_part_of_its_cameras_image_the_policy_sees(crop: list[float] | None) -> None:
    env = make_env("PickCube-v1", obs="rgb", image_size=64, crop=crop)
    expected = None if crop is None else {"left": 0.25, "top": 0.43, "side": 0.5}
    assert _facts_of(env, "PickCube-v1")["camera"]["crop"] == expected
    env.close()
