"""The one training loop: SB3's PPO to the last bit when nothing is distilled; what it stores and refuses otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.algos.buffers import LabelledRolloutBuffer
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.labelling import TeacherWrapper, VecTeacher
from rpd_sb3.teachers import TeacherError
from tests.support.helpers import CountingEnv, EchoTeacher, SilentTeacher


class DropoutMlp(th.nn.Sequential):
    features_dim = 16

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        n = int(np.prod(observation_space.shape))
        super().__init__(th.nn.Flatten(), th.nn.Linear(n, 16), th.nn.Dropout(0.3), th.nn.Tanh())


HARSH: dict[str, Any] = {
    "n_steps": 65,  # two environments and minibatches of 43: the last one has one sample
    "batch_size": 43,
    "n_epochs": 4,
    "learning_rate": LinearSchedule(3e-2, 1e-3, 1.0),
    "clip_range": LinearSchedule(0.05, 0.01, 1.0),
    "clip_range_vf": 0.1,
    "target_kl": 0.004,
    "ent_coef": 0.01,
    "policy_kwargs": {"features_extractor_class": DropoutMlp},
    "seed": 3,
    "device": "cpu",
}


def parameters_after_training(algorithm: type[PPO], env_id: str, **kwargs: Any) -> tuple[dict[str, th.Tensor], PPO]:
    venv = DummyVecEnv([lambda: gym.make(env_id)] * 2)
    model = algorithm("MlpPolicy", venv, **{**HARSH, **kwargs})
    model.learn(650)
    return model.policy.state_dict(), model


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.parametrize("kwargs", [{}, {"target_kl": None}, {"normalize_advantage": False}, {"use_sde": True}])
def test_without_distillation_it_is_sb3_ppo_to_the_last_bit(env_id: str, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_sde") and env_id == "CartPole-v1":
        pytest.skip("state-dependent exploration is for continuous actions")
    expected, ppo = parameters_after_training(PPO, env_id, **kwargs)
    actual, ours = parameters_after_training(OnPolicyDistillation, env_id, **kwargs)
    for name, value in expected.items():
        assert th.equal(value, actual[name]), name
    assert ours._n_updates == ppo._n_updates
    assert ours.logger.name_to_value.keys() == ppo.logger.name_to_value.keys()


def test_the_harsh_settings_stop_early_and_clip() -> None:
    _, stopped = parameters_after_training(PPO, "CartPole-v1")
    assert stopped._n_updates < 5 * HARSH["n_epochs"], "target_kl fires"
    _, model = parameters_after_training(PPO, "CartPole-v1", target_kl=None)
    assert model.logger.name_to_value["train/clip_fraction"] > 0.1
    assert model._n_updates == 5 * HARSH["n_epochs"]


def make_venv(n: int = 2, teacher: EchoTeacher | None = None, **kwargs: Any) -> VecEnv:
    venv = DummyVecEnv([lambda i=i: CountingEnv(number=i, length=3 + i) for i in range(n)])
    return VecTeacher(venv, teacher or EchoTeacher(), **kwargs)


SMALL: dict[str, Any] = {"n_steps": 7, "batch_size": 5, "n_epochs": 2, "device": "cpu", "seed": 0}


def labels_by_observation(model: RPD) -> tuple[np.ndarray, np.ndarray]:
    """Observations and labels of the rollout, both flattened environment by environment."""
    buffer: Any = model.rollout_buffer
    return buffer.observations, buffer.labels["action"].swapaxes(0, 1).reshape(len(buffer.observations), -1)


def test_minibatches_pair_each_observation_with_its_own_label() -> None:
    model = RPD("MlpPolicy", make_venv(3), **SMALL)
    model.learn(21)
    observations, labels = labels_by_observation(model)
    np.testing.assert_array_equal(observations[:, 1:3], labels)
    for batch in model.rollout_buffer.get(5):
        assert th.equal(batch.observations[:, 1:3], batch.labels["action"])  # type: ignore[attr-defined]
        assert batch.labelled.all()  # type: ignore[attr-defined]


class AbortOnce(BaseCallback):
    def _on_step(self) -> bool:
        return self.n_calls != 4


def test_labels_stay_aligned_after_an_aborted_rollout() -> None:
    model = RPD("MlpPolicy", make_venv(3), **SMALL)
    model.learn(21, callback=AbortOnce())
    assert not model.rollout_buffer.full
    model.learn(21, reset_num_timesteps=False)
    observations, labels = labels_by_observation(model)
    np.testing.assert_array_equal(observations[:, 1:3], labels)


def test_one_label_per_transition_with_many_epochs() -> None:
    teacher = EchoTeacher()
    model = RPD("MlpPolicy", make_venv(2, teacher), **{**SMALL, "n_epochs": 8})
    model.learn(70)
    assert sum(len(query.env_ids) for query in teacher.queries) == model.num_timesteps == 70


def test_no_label_is_asked_for_while_the_coefficient_is_zero() -> None:
    teacher = EchoTeacher()
    model = RPD("MlpPolicy", make_venv(2, teacher), distill_coef=0.0, **SMALL)
    model.learn(28)
    assert teacher.queries == []


def test_label_fraction_masks_the_rest() -> None:
    model = RPD("MlpPolicy", make_venv(2), label_fraction=0.5, **{**SMALL, "n_steps": 100})
    model.learn(200)
    assert 70 < model.rollout_buffer.labelled.sum() < 130  # type: ignore[attr-defined]


def test_wrapped_single_environments_can_teach() -> None:
    venv = DummyVecEnv([lambda: TeacherWrapper(CountingEnv(teacher_view=True), EchoTeacher())] * 2)
    model = RPD("MlpPolicy", venv, **SMALL)
    model.learn(14)
    observations, labels = labels_by_observation(model)
    np.testing.assert_array_equal(observations[:, 1:3], labels)


@pytest.mark.parametrize("wrap", [lambda venv: venv, None])
def test_no_teacher_no_training(wrap: Any, tmp_path: Path) -> None:
    bare = DummyVecEnv([CountingEnv])
    with pytest.raises(ValueError, match=r"RPD needs a teacher: wrap the env, e\.g\. RPD\(policy, VecTeacher"):
        RPD("MlpPolicy", bare, **SMALL)
    model = RPD("MlpPolicy", make_venv(1), **SMALL)
    model.save(tmp_path / "model")
    loaded = RPD.load(tmp_path / "model", env=None if wrap is None else bare)
    loaded.predict(np.zeros(3, np.float32))
    if wrap is None:
        loaded.set_env(bare)
    with pytest.raises(ValueError, match="RPD needs a teacher"):
        loaded.learn(14)


def test_a_teacher_without_the_needed_label_is_refused() -> None:
    teacher = EchoTeacher()
    object.__setattr__(teacher.spec, "labels", frozenset({"value"}))
    with pytest.raises(ValueError, match=r"needs the labels \['action'\]; the teacher does not give \['action'\]"):
        RPD("MlpPolicy", make_venv(1, teacher), **SMALL)


def test_save_and_load_keep_everything_but_the_teacher(tmp_path: Path) -> None:
    kwargs = {
        "loss": "l1",
        "distill_coef": LinearSchedule(2.0, 0.0, 1.0),
        "label_replay": 10,
        "advantage_std_floor": 0.5,
    }
    model = RPD("MlpPolicy", make_venv(1), **kwargs, **SMALL)
    model.learn(14)
    model.save(tmp_path / "model")
    model.label_replay_buffer.save(str(tmp_path / "labels.npz"))
    loaded = RPD.load(tmp_path / "model", env=make_venv(1))
    loaded.label_replay_buffer.load(str(tmp_path / "labels.npz"))
    assert (loaded.loss, loaded.label_replay, loaded.advantage_std_floor) == ("l1", 10, 0.5)
    assert loaded.curriculum.schedule(0.5) == 1.0
    assert loaded.label_replay_buffer.size == 10
    for name, values in model.label_replay_buffer._arrays.items():
        np.testing.assert_array_equal(loaded.label_replay_buffer._arrays[name], values)
    assert loaded.num_timesteps == 14
    assert loaded.rollout_buffer_class is LabelledRolloutBuffer
    loaded.learn(7, reset_num_timesteps=False)


def test_training_stops_when_most_labels_are_missing() -> None:
    model = RPD("MlpPolicy", make_venv(2, SilentTeacher(), timeout=0.01, on_failure="skip"), **SMALL)
    with pytest.raises(TeacherError, match="100% of this rollout's labels are missing; at most 50% may"):
        model.learn(14)


def test_some_missing_labels_are_masked_and_logged() -> None:
    def flaky(query):
        if query.inputs["state"][0, 2] == 1:  # the second step of each episode fails
            raise TeacherError("busy")
        return query.inputs["state"][:, 1:3]

    model = RPD(
        "MlpPolicy", make_venv(1, EchoTeacher(flaky), on_failure="skip"), **{**SMALL, "n_steps": 6, "batch_size": 6}
    )
    model.learn(6)
    assert model.logger.name_to_value["rollout/missing_labels"] == pytest.approx(2 / 6)
    (batch,) = model.rollout_buffer.get(6)
    assert th.equal(batch.labelled, batch.observations[:, 2] != 1)  # type: ignore[attr-defined]


def test_target_kl_stops_the_surrogate_but_not_the_distillation() -> None:
    def distilled_steps(target_kl: float | None) -> tuple[int, float]:
        model = RPD("MlpPolicy", make_venv(2), target_kl=target_kl, learning_rate=1e-2, **{**SMALL, "n_epochs": 20})
        model.learn(14)
        return model._n_updates, model.logger.name_to_value["train/distill_loss"]

    free, stopped = distilled_steps(None), distilled_steps(1e-9)
    assert stopped[0] == free[0] == 20
    assert stopped[1] == pytest.approx(free[1], rel=0.2)
    ppo = OnPolicyDistillation("MlpPolicy", DummyVecEnv([CountingEnv]), target_kl=1e-9, learning_rate=1e-2, **SMALL)
    ppo.learn(7)
    assert ppo._n_updates < 2


def test_target_kl_stops_surrogate_and_entropy_bonus() -> None:
    def log_std(target_kl: float | None) -> float:
        model = RPD("MlpPolicy", make_venv(2), target_kl=target_kl, ent_coef=1.0, learning_rate=1e-2, **SMALL)
        return float(model.learn(140).policy.log_std.mean())

    assert log_std(None) > 0.3, "the entropy bonus widens the policy"
    assert log_std(1e-9) < 0.15


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"distill_coef": float("nan")}, "distill_coef=nan"),
        ({"label_fraction": float("nan")}, "label_fraction=nan"),
        ({"label_replay": -1}, "label_replay=-1"),
        ({"replay_batch_size": 0}, "replay_batch_size=0"),
        ({"image_shift": -1}, "image_shift=-1"),
        ({"advantage_std_floor": -0.1}, "advantage_std_floor=-0.1"),
        ({"loss": "kl"}, "loss='kl' is unknown; choose one of mse, l1, bc"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RPD("MlpPolicy", make_venv(1), **kwargs, **SMALL)
