"""RPD learns what plain PPO cannot: learning tests in which the baseline fails."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.algos.augmentation import random_shift
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import CompactCNN
from rpd_sb3.teachers import Query
from tests.support.helpers import ACTION_SPACE, EchoTeacher


class TargetEnv(gym.Env):
    """Each observation is a random target in [-1, 1]^2; the right action is the target itself. Reward is ``reward``."""

    def __init__(self, obs: str = "state", reward: float = 0.0) -> None:
        self.obs_kind, self.reward = obs, reward
        state, image = spaces.Box(-1, 1, (2,), np.float32), spaces.Box(0, 255, (36, 36, 3), np.uint8)
        student = {"state": {"state": state}, "rgb": {"rgb": image}, "rgb+state": {"rgb": image, "state": state}}[obs]
        self.observation_space = spaces.Dict({**student, "teacher/state": state})
        self.action_space = ACTION_SPACE

    def _obs(self) -> dict[str, np.ndarray]:
        self.target = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        image = np.zeros((36, 36, 3), np.uint8)
        image[:18, :, :] = int(127 * (1 + self.target[0]))
        image[18:, :, :] = int(127 * (1 + self.target[1]))
        everything = {"state": self.target, "rgb": image, "teacher/state": self.target}
        return {key: everything[key] for key in self.observation_space.spaces}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        self.steps += 1
        right = np.abs(action - self.target).max() < 0.1
        done = self.steps >= 8
        return self._obs(), self.reward * right, done, False, {"is_success": bool(right)}


def copy_target(query: Query) -> np.ndarray:
    return query.inputs["state"]


SETTINGS: dict[str, Any] = {
    "n_steps": 64,
    "batch_size": 64,
    "n_epochs": 8,
    "learning_rate": 3e-3,
    "gamma": 0.0,
    "gae_lambda": 0.0,
    "seed": 0,
    "device": "cpu",
    "policy_kwargs": {"log_std_init": -1.0},
}


def error(model: PPO, obs: str = "state") -> float:
    """Mean absolute error of the deterministic action on fresh targets."""
    env = TargetEnv(obs)
    env.reset(seed=123)
    errors = []
    for _ in range(200):
        observation = {key: value for key, value in env._obs().items() if not key.startswith("teacher/")}
        action, _ = model.predict(
            observation if len(observation) > 1 else next(iter(observation.values())), deterministic=True
        )
        errors.append(np.abs(action - env.target).mean())
    return float(np.mean(errors))


def train(algorithm: type[PPO], policy: str = "MlpPolicy", obs: str = "state", steps: int = 2048, **kwargs: Any) -> PPO:
    venv = VecTeacher(DummyVecEnv([lambda: TargetEnv(obs)] * 4), EchoTeacher(copy_target))
    if algorithm is RPD:
        kwargs = {"target_kl": 0.1, "advantage_std_floor": 1.0, "label_replay": 5000, **kwargs}
    model = algorithm(policy, venv, **{**SETTINGS, **kwargs})
    return model.learn(steps)


@pytest.mark.parametrize("loss", ["mse", "l1", "bc"])
def test_without_reward_rpd_learns_and_ppo_does_not(loss: str) -> None:
    assert error(train(PPO)) > 0.2
    assert error(train(RPD, loss=loss)) < 0.05


@pytest.mark.parametrize(("policy", "obs"), [("CnnPolicy", "rgb"), ("MultiInputPolicy", "rgb+state")])
def test_images_and_dicts_are_distilled(policy: str, obs: str) -> None:
    model = train(RPD, policy, obs, steps=1024, learning_rate=1e-3)
    untrained = RPD(policy, model.env, **SETTINGS)
    assert error(model, obs) < 0.12
    assert error(untrained, obs) > 0.2


def test_the_compact_cnn_learns_from_images_and_dicts() -> None:
    compact = {"log_std_init": -1.0, "features_extractor_class": CompactCNN}
    for policy, obs in (("CnnPolicy", "rgb"), ("MultiInputPolicy", "rgb+state")):
        model = train(RPD, policy, obs, steps=768, learning_rate=1e-3, policy_kwargs=compact)
        assert error(model, obs) < 0.15


def imitate(**kwargs: Any) -> tuple[RPD, Any, Any]:
    """An untrained model of images, a minibatch of its rollout, and what it imitates there."""
    model: Any = train(RPD, "CnnPolicy", "rgb", steps=256, n_epochs=1, **kwargs)
    batch = next(model.rollout_buffer.get(16))
    with th.no_grad():
        return model, batch, model.imitation(batch, None)


def test_more_can_be_drawn_from_the_replay_than_a_minibatch_has() -> None:
    for size, drawn in ((None, 16), (40, 40), (4, 4)):
        _, _, (distribution, labels, labelled) = imitate(replay_batch_size=size)
        assert distribution.mode().shape == labels["action"].shape == (drawn, 2)
        assert labelled.shape == (drawn,)
        assert labelled.all()


def test_without_a_replay_the_minibatch_itself_is_shifted() -> None:
    model, batch, _ = imitate(label_replay=0, image_shift=2)
    with th.no_grad():
        th.manual_seed(1)
        distribution, labels, labelled = model.imitation(batch, None)
        imitated = distribution.mode()  # the policy has one distribution, and changes it
        th.manual_seed(1)
        expected = model.policy.get_distribution(random_shift(batch.observations, 2)).mode()
        unshifted = model.policy.get_distribution(batch.observations).mode()
    assert th.equal(imitated, expected)
    assert not th.equal(imitated, unshifted)
    assert labels is batch.labels
    assert labelled is batch.labelled


def test_a_noisy_teacher_is_averaged_out() -> None:
    rng = np.random.default_rng(0)
    teacher = EchoTeacher(lambda query: query.inputs["state"] + rng.normal(0, 0.5, query.inputs["state"].shape))
    venv = VecTeacher(DummyVecEnv([TargetEnv] * 4), teacher)
    model = RPD("MlpPolicy", venv, **{**SETTINGS, "learning_rate": 1e-3}, target_kl=0.1, label_replay=10_000).learn(
        4096
    )
    assert error(model) < 0.1  # a single label is off by 0.4 on average


def test_bc_narrows_the_std_and_mse_does_not() -> None:
    assert train(RPD, loss="bc", steps=1024).policy.log_std.max() < -1.3
    assert train(RPD, loss="mse", steps=1024).policy.log_std.min() > -1.1


def test_half_of_the_labels_teach_too() -> None:
    assert error(train(RPD, label_fraction=0.5)) < 0.06


@pytest.mark.slow
def test_only_reward_corrects_a_biased_teacher() -> None:
    def biased(query: Query) -> np.ndarray:
        return query.inputs["state"] + np.array([0.15, 0.0])

    def trained(**kwargs: Any) -> PPO:
        venv = VecTeacher(DummyVecEnv([lambda: TargetEnv(reward=1.0)] * 8), EchoTeacher(biased))
        settings = {**SETTINGS, "learning_rate": 1e-3, "advantage_std_floor": 0.1, "label_replay": 5000}
        return RPD("MlpPolicy", venv, target_kl=0.05, **settings, **kwargs).learn(24_000)

    with th.random.fork_rng():
        assert error(trained()) > 0.06, "copies the bias: 0.075 on average"
        assert error(trained(success_cutoff=0.1)) < 0.05


def test_mse_on_discrete_actions_is_refused_and_bc_is_not() -> None:
    space = spaces.Discrete(2)
    venv = DummyVecEnv([lambda: gym.make("CartPole-v1")])
    teacher = EchoTeacher(lambda query: (query.inputs["state"][:, 2] > 0).astype(int), space=space)
    with pytest.raises(ValueError, match=r"loss='mse' needs a Box action space, got Discrete\(2\); use loss='bc'"):
        RPD("MlpPolicy", VecTeacher(venv, teacher), **SETTINGS)
    model = RPD("MlpPolicy", VecTeacher(venv, teacher), loss="bc", **SETTINGS).learn(1024)
    agreement = [model.predict(np.array([0, 0, angle, 0], np.float32), deterministic=True)[0] for angle in (-0.1, 0.1)]
    assert agreement == [0, 1]
