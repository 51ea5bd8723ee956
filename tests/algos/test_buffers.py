"""Labels in the rollout buffer; the label replay: which pairs it keeps, and that pairs stay pairs."""

from __future__ import annotations

import gc
import tracemalloc
import zipfile
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
from rpd_sb3.algos.buffers import LabelledRolloutBuffer, LabelReplay, use_compact_buffer
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


def pairs(start: int, n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    numbers = np.arange(start, start + n, dtype=np.float32)
    return numbers[:, None], {"action": -numbers[:, None]}


def kept(replay: LabelReplay) -> set[int]:
    observations, labels = replay.sample(500)
    np.testing.assert_array_equal(observations, -labels["action"])
    return set(observations[:, 0].astype(int))


def test_the_newest_pairs_are_kept() -> None:
    replay = LabelReplay(5)
    replay.extend(*pairs(0, 3))
    assert kept(replay) == {0, 1, 2}
    replay.extend(*pairs(3, 4))
    assert kept(replay) == {2, 3, 4, 5, 6}
    replay.extend(*pairs(7, 12))
    assert kept(replay) == {14, 15, 16, 17, 18}
    replay.extend(*pairs(19, 1))
    assert kept(replay) == {15, 16, 17, 18, 19}


def test_dict_observations_and_dtypes_survive() -> None:
    replay = LabelReplay(4)
    replay.extend(
        {"rgb": np.full((2, 3, 8, 8), 7, np.uint8), "state": np.ones((2, 5), np.float32)}, {"action": np.ones((2, 7))}
    )
    observations, _ = replay.sample(3)
    assert isinstance(observations, dict)
    assert observations["rgb"].shape == (3, 3, 8, 8)
    assert observations["rgb"].dtype == np.uint8


@pytest.mark.parametrize("n", [3, 5, 12])
def test_a_saved_replay_goes_on_where_it_was(n: int, tmp_path: Path) -> None:
    replay, loaded = LabelReplay(5), LabelReplay(5)
    replay.extend(*pairs(0, n))
    replay.save(str(tmp_path / "replay.npz"))
    loaded.load(str(tmp_path / "replay.npz"))
    for one in (replay, loaded):
        one.extend(*pairs(n, 2))
    assert kept(loaded) == kept(replay) == set(range(max(0, n - 3), n + 2))


def test_a_replay_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    replay = LabelReplay(5)
    replay.extend(*pairs(0, 5))
    replay.save(str(tmp_path / "replay.npz"))
    with pytest.raises(ValueError, match="holds 5 pairs, but label_replay=3"):
        LabelReplay(3).load(str(tmp_path / "replay.npz"))


@pytest.mark.parametrize("dict_obs", [False, True])
def test_pairs_of_a_rollout_are_appended_step_by_step_where_there_are_labels(dict_obs: bool) -> None:
    rng = np.random.default_rng(0)
    ours, one_by_one = LabelReplay(150), LabelReplay(150)
    for _ in range(3):
        frames = rng.integers(0, 256, (5, 40, 2, 3), dtype=np.uint8).swapaxes(0, 1)  # as in the compact buffer
        labels = {"action": rng.normal(size=(40, 5, 7)).astype(np.float32)}
        where = rng.random((40, 5)) < 0.6
        observations: Any = {"rgb": frames, "state": labels["action"][..., :2]} if dict_obs else frames
        ours.extend(observations, labels, where)
        for step, env in np.argwhere(where):
            one: Any = {k: v[step, env][None] for k, v in observations.items()} if dict_obs else frames[step, env][None]
            one_by_one.extend(one, {"action": labels["action"][step, env][None]})
    assert (ours.size, ours._next) == (one_by_one.size, one_by_one._next)
    for name, values in one_by_one._arrays.items():
        np.testing.assert_array_equal(ours._arrays[name], values, strict=True)


@pytest.mark.parametrize("change", ["cut", "pickled"])
def test_a_file_that_is_no_replay_is_refused(change: str, tmp_path: Path) -> None:
    path = str(tmp_path / "replay.npz")
    values = np.zeros((3, 2)) if change == "cut" else np.array([None])
    np.savez(path, **{"next": 0, "obs/": values})  # type: ignore[arg-type]
    if change == "cut":
        with zipfile.ZipFile(path) as file:
            whole = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in whole.items():
                file.writestr(name, data if name == "next.npy" else data[:-1])
    with pytest.raises(ValueError, match="ends too early" if change == "cut" else "was not written by LabelReplay"):
        LabelReplay(5).load(path)


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


def test_reading_a_replay_takes_its_memory_once(tmp_path: Path) -> None:
    replay = LabelReplay(1000)
    replay.extend(np.ones((1000, FRAME), np.uint8), {"action": np.ones((1000, 7), np.float32)})
    path, size = str(tmp_path / "replay.npz"), 1000 * FRAME
    tracemalloc.start()
    try:
        replay.save(path)
        assert tracemalloc.get_traced_memory()[1] < size
        tracemalloc.reset_peak()
        loaded = LabelReplay(1000)
        loaded.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()
    for name, values in replay._arrays.items():
        np.testing.assert_array_equal(loaded._arrays[name], values)
