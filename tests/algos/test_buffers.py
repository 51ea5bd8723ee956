"""Labels in the rollout buffer, and what rollouts of frames take in memory."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.algos.buffers import LabelledRolloutBuffer, use_compact_buffer
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec


def test_transition_is_labelled_only_if_all_of_its_labels_came() -> None:
    box = spaces.Box(-1, 1, (2,))
    buffer = LabelledRolloutBuffer(3, box, box, n_envs=2)
    buffer.reset()
    here, gone = np.ones(2), np.full(2, np.nan)
    rows = [
        [{"teacher_action": here, "teacher_std": here}, {"teacher_action": here, "teacher_std": gone}],
        [{}, {"teacher_action": gone, "teacher_std": gone}],
        [{"teacher_action": here, "teacher_std": here}, {}],
    ]
    names = frozenset({"action", "std"})
    for row in rows:
        buffer.add_labels(row, names)
    assert buffer.gather_labels(names) == 0.5
    np.testing.assert_array_equal(buffer.labelled, [[True, False], [False, False], [True, False]])
    np.testing.assert_array_equal(buffer.labels["action"][..., 0], [[1, 0], [0, 0], [1, 0]])


FRAME = 84 * 84 * 3


class Camera(gym.Env):
    """Random frames; half the steps end an episode by time, which makes SB3 look at the terminal one."""

    def __init__(self, dict_obs: bool) -> None:
        self.image = spaces.Box(0, 255, (84, 84, 3), np.uint8)
        self.observation_space = spaces.Dict({"rgb": self.image}) if dict_obs else self.image
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)

    def _obs(self) -> Any:
        frame = self.np_random.integers(0, 256, (84, 84, 3), dtype=np.uint8)
        return {"rgb": frame} if isinstance(self.observation_space, spaces.Dict) else frame

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._obs(), float(action[0]), False, bool(self.np_random.random() < 0.5), {}


class Coarse(BaseFeaturesExtractor):
    """Sixteen pixels of a frame: a test is about memory, not about convolutions."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__(space, 16)

    def forward(self, observations: Any) -> th.Tensor:
        frame = observations["rgb"] if isinstance(observations, dict) else observations
        return frame.flatten(1)[:, :: FRAME // 15][:, :16]


class FirstPixels(LocalTeacher):
    """Labels from the frame itself."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.spec = TeacherSpec("pixels", frozenset({"action"}), (name,), spaces.Box(-1, 1, (2,), np.float32))

    def label(self, query: Query) -> Labels:
        (frames,) = query.inputs.values()
        return {"action": frames.reshape(len(query.env_ids), -1)[:, :2] / np.float32(255)}


def learner(kind: str, dict_obs: bool, venv: VecEnv, **kwargs: Any) -> Any:
    settings: dict[str, Any] = {
        "n_steps": 64,
        "batch_size": 64,
        "n_epochs": 2,
        "policy_kwargs": {"features_extractor_class": Coarse},
        "device": "cpu",
        "seed": 0,
    }
    policy = "MultiInputPolicy" if dict_obs else "CnnPolicy"
    model = {"ppo": PPO, "own loop": OnPolicyDistillation, "rpd": RPD}[kind](policy, venv, **settings, **kwargs)
    use_compact_buffer(model)
    return model


def peak_of(kind: str, dict_obs: bool, n_envs: int = 8) -> float:
    """Most that two rollouts and their updates held at any time beyond one minibatch, over what the frames of a rollout need."""
    venv: VecEnv = DummyVecEnv([lambda: Camera(dict_obs)] * n_envs)
    kwargs: dict[str, Any] = {}
    learner("ppo", dict_obs, venv).learn(1)  # what is imported or cached once
    if kind == "rpd":
        venv, kwargs = VecTeacher(venv, FirstPixels("rgb" if dict_obs else "images.base")), {"label_replay": 1000}
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        model = learner(kind, dict_obs, venv, **kwargs)
        model.learn(2 * 64 * n_envs)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    stored = 0 if kind != "rpd" else 1000 * FRAME  # all of it counts, although untouched pages take no memory
    minibatches = (2 if kind == "rpd" else 1) * 64 * FRAME
    return (peak - stored - minibatches) / (64 * n_envs * FRAME)


@pytest.mark.parametrize("dict_obs", [False, True])
@pytest.mark.parametrize("kind", ["ppo", "own loop", "rpd"])
def test_a_rollout_of_frames_and_its_update_take_little_more_than_the_frames(kind: str, dict_obs: bool) -> None:
    assert peak_of(kind, dict_obs) < 1.2


def test_sb3s_own_buffer_takes_twice_the_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.use_compact_buffer", lambda model: None)
    assert peak_of("ppo", False) > 1.9


@pytest.mark.parametrize("dict_obs", [False, True])
def test_the_compact_buffer_changes_nothing_that_is_learned(
    dict_obs: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parameters = []
    for compact in (True, False):
        if not compact:
            monkeypatch.setattr(f"{__name__}.use_compact_buffer", lambda model: None)
        model = learner("ppo", dict_obs, DummyVecEnv([lambda: Camera(dict_obs)] * 3))
        assert ("Compact" in type(model.rollout_buffer).__name__) == compact
        parameters.append(model.learn(3 * 64 * 3).policy.state_dict())
        model.save(tmp_path / "model")
        assert PPO.load(tmp_path / "model").rollout_buffer_class in (RolloutBuffer, DictRolloutBuffer)
    for name, values in parameters[0].items():
        assert th.equal(values, parameters[1][name]), name
