"""PPD: its loss in closed form, whose labels count, and learning where the baseline fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.distributions import Categorical, Independent, Normal, kl_divergence

from rpd_sb3.algos import PPD
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import AutoregressivePolicy, TokenPolicy
from rpd_sb3.teachers import TeacherError
from tests.support.helpers import EchoTeacher
from tests.support.token_helpers import (
    LEARNING,
    SMALL,
    GaussianTeacher,
    K,
    TokenTeacher,
    V,
    accuracy,
    collected,
    gradients,
    make_venv,
    peaked,
    rough,
    same_parameters,
    whole_rollout,
)

DIRECTIONS = ("forward", "reverse")


def aims_at_the_point(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points, 0.2 + 0.1 * np.abs(points)


def make(answer: Any = aims_at_the_point, **kwargs: Any) -> PPD:
    return PPD("MlpPolicy", make_venv(GaussianTeacher(answer), tokens=False), **{**SMALL, **kwargs})


def with_ratios(model: Any) -> tuple[Any, Any, th.Tensor]:
    """The rollout, the student on it, and ratios from 0.4 to 2.7, which the old log-probabilities are set to."""
    batch, student, _ = whole_rollout(model)
    log_ratio = th.linspace(-1, 1, len(batch.old_log_prob))
    return batch._replace(old_log_prob=student.log_prob.detach() - log_ratio), student, log_ratio.exp()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_of_gaussians_is_the_kl_weighed_by_the_ratio(direction: str) -> None:
    model = collected(peaked(make(direction=direction), 300.0))
    batch, student, ratio = with_ratios(model)
    mean, std = map(th.as_tensor, aims_at_the_point(batch.observations.numpy()))
    teacher = Independent(Normal(mean, std), 1)
    ours = Independent(Normal(student.distribution.distribution.mean, model.policy.log_std.exp()), 1)
    kl = kl_divergence(teacher, ours) if direction == "forward" else kl_divergence(ours, teacher)
    loss, values = model.distill_loss(batch, student)
    th.testing.assert_close(loss, (ratio.clamp(min=0.8) * kl).mean())
    assert values == {"distill_kl": pytest.approx(kl.mean().item(), rel=1e-5)}


@pytest.mark.parametrize("policy", [TokenPolicy, AutoregressivePolicy, "MlpPolicy"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_loss_of_tokens_is_the_kl_to_the_floored_teacher_weighed_by_the_ratio(policy: Any, direction: str) -> None:
    venv = make_venv(TokenTeacher(rough))
    model = collected(peaked(PPD(policy, venv, direction=direction, teacher_floor=0.1, **SMALL)))
    batch, student, ratio = with_ratios(model)
    logits = th.as_tensor(rough(batch.observations.numpy(), batch.actions.numpy()))
    teacher = Categorical(probs=0.9 * logits.softmax(-1) + 0.1 / V)
    dist: Any = student.distribution
    ours = Categorical(
        logits=dist.logits if policy != "MlpPolicy" else th.stack([d.logits for d in dist.distribution], 1)
    )
    kl = kl_divergence(teacher, ours) if direction == "forward" else kl_divergence(ours, teacher)
    loss, _ = model.distill_loss(batch, student)
    th.testing.assert_close(loss, (ratio.clamp(min=0.8) * kl.sum(1)).mean())


@pytest.mark.parametrize(
    ("direction", "expected"),
    # Per dimension, teacher N(0, 2^2) and student N(0, 1): were the std a variance, it would be 0.15 and 0.10.
    [("forward", K * (math.log(1 / 2) + 4 / 2 - 1 / 2)), ("reverse", K * (math.log(2) + 1 / 8 - 1 / 2))],
)
def test_the_label_std_is_a_std(direction: str, expected: float) -> None:
    model = make(lambda points: (0 * points, 0 * points + 2), direction=direction)
    collected(peaked(model, 0.0))
    batch, student, _ = whole_rollout(model)
    loss, _ = model.distill_loss(batch, student)
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_actions_that_have_become_less_likely_keep_a_weight() -> None:
    model = collected(make(clip_range=0.3))
    batch, student, _ = whole_rollout(model)
    at_ratio_one, _ = model.distill_loss(batch, student)
    gone, _ = model.distill_loss(batch._replace(old_log_prob=student.log_prob.detach() + 5), student)
    assert gone.item() == pytest.approx(0.7 * at_ratio_one.item(), rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_transitions_without_a_label_are_left_out(direction: str) -> None:
    model = collected(make(direction=direction, label_fraction=0.5))
    batch, student, _ = whole_rollout(model)
    at = batch.labelled
    assert 0 < at.sum() < len(at)
    mean, std = map(th.as_tensor, aims_at_the_point(batch.observations.numpy()))
    teacher, ours = Normal(mean, std), student.distribution.distribution
    kl = kl_divergence(teacher, ours) if direction == "forward" else kl_divergence(ours, teacher)
    loss, values = model.distill_loss(batch, student)
    th.testing.assert_close(loss, kl.sum(1)[at].mean())
    assert values["distill_kl"] == pytest.approx(kl.sum(1)[at].mean().item(), rel=1e-5)
    assert all(grad.isfinite().all() for grad in gradients(loss, model))


def test_minibatches_without_any_label_give_no_nan() -> None:
    model = make(label_fraction=0.2, batch_size=2).learn(64)
    assert all(value.isfinite().all() for value in model.policy.state_dict().values())


def test_a_teacher_without_spread_is_an_error() -> None:
    with pytest.raises(TeacherError, match=r"PPD needs a std above 0, the teacher gave 0\.0; .* use RPD"):
        make(lambda points: (points, 0 * points)).learn(32)


def fitted(kind: type[PPO], answer: Any, steps: int = 1536, **kwargs: Any) -> tuple[float, float, float]:
    """Error of the mean action over points, and the smallest and largest std, after training without reward."""
    settings = {**LEARNING, "policy_kwargs": {"net_arch": [32], "log_std_init": -1.0}}
    model = kind("MlpPolicy", make_venv(GaussianTeacher(answer), tokens=False), **settings, **kwargs).learn(steps)
    points = np.random.default_rng(1).uniform(-1, 1, (500, K)).astype(np.float32)
    actions, _ = model.predict(points, deterministic=True)
    std = model.policy.log_std.exp()
    return float(np.abs(actions - points).mean()), std.min().item(), std.max().item()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_reward_ppd_learns_mean_and_std(direction: str) -> None:
    error, low, high = fitted(PPD, lambda points: (points, 0 * points + 0.2), direction=direction)
    assert error < 0.1
    assert 0.15 < low < high < 0.25


def test_without_reward_ppo_learns_nothing() -> None:
    assert fitted(PPO, aims_at_the_point)[0] > 0.3


def either_mode(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Another answer each time: 0.1 around -0.8 or around 0.8."""
    sign = np.random.default_rng(int(1e6 * abs(points.sum()))).choice([-1, 1], points.shape)
    return 0.8 * sign, 0 * points + 0.1


def fitted_to_both_modes(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of ten samples of the same teacher."""
    rng = np.random.default_rng(int(1e6 * abs(points.sum())))
    samples = 0.8 * rng.choice([-1, 1], (10, *points.shape)) + rng.normal(0, 0.1, (10, *points.shape))
    return samples.mean(0), samples.std(0)


def test_forward_kl_covers_two_modes_and_reverse_kl_does_not() -> None:
    _, forward, _ = fitted(PPD, either_mode)
    _, _, reverse = fitted(PPD, either_mode, direction="reverse")
    assert reverse < math.exp(-1.0) < 0.6 < forward, "both modes together have 0.81"


def test_std_grows_to_that_of_a_gaussian_fitted_to_both_modes() -> None:
    assert fitted(PPD, fitted_to_both_modes)[1] > 0.65, "began with 0.37"


def test_token_students_are_distilled_without_reward() -> None:
    assert accuracy(PPD(TokenPolicy, make_venv(TokenTeacher()), **LEARNING).learn(2048)) > 0.9


class DiscreteTeacher(EchoTeacher):
    def __init__(self) -> None:
        super().__init__(space=spaces.Discrete(2))
        object.__setattr__(self.spec, "labels", frozenset({"action", "std"}))


def test_actions_without_a_closed_form_are_refused() -> None:
    venv = VecTeacher(DummyVecEnv([lambda: gym.make("CartPole-v1")]), DiscreteTeacher())
    with pytest.raises(ValueError, match=r"PPD needs continuous actions or action tokens, got Discrete\(2\)"):
        PPD("MlpPolicy", venv, **SMALL)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"direction": "backward"}, "PPD: direction='backward' is unknown; choose one of forward, reverse"),
        ({"teacher_floor": 1.0}, r"PPD: teacher_floor=1\.0 must lie in \[0, 1\)"),
        ({"imitation_updates": 1.0}, r"PPD: imitation_updates=1\.0 has no ratio of the student's own actions"),
        ({"image_shift": 2}, "PPD: image_shift=2 has no ratio of the student's own actions"),
        ({"label_replay": 10}, "PPD: label_replay=10 has no ratio of the student's own actions"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


@pytest.mark.parametrize(
    ("teacher", "tokens", "message"),
    [
        (EchoTeacher(), False, r"PPD needs the labels \['action', 'std'\]; the teacher does not give \['std'\]"),
        (TokenTeacher(labels=frozenset({"action"})), True, r"PPD needs the labels \['logits'\]"),
    ],
)
def test_a_teacher_of_a_single_action_is_refused(teacher: Any, tokens: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPD("MlpPolicy", make_venv(teacher, tokens=tokens), **SMALL)


@pytest.mark.parametrize("tokens", [False, True])
def test_a_loaded_model_goes_on_as_the_saved_one(tokens: bool, tmp_path: Path) -> None:
    def venv() -> Any:
        return make_venv(TokenTeacher() if tokens else GaussianTeacher(aims_at_the_point), tokens=tokens)

    model = PPD("MlpPolicy", venv(), direction="reverse", teacher_floor=0.2, **SMALL).learn(32)
    model.save(tmp_path / "model")
    loaded = PPD.load(tmp_path / "model")
    assert (loaded.direction, loaded.teacher_floor, loaded.needs) == ("reverse", 0.2, model.needs)
    assert same_parameters(model, loaded)
    loaded.set_env(venv())
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    assert loaded.logger.name_to_value["train/distill_coef"] == 1
