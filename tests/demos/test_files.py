"""Recording a teacher, and the files that its episodes are kept in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.contract.bins import to_actions, to_tokens
from rpd_sb3.demos.files import Demonstrations, load, save
from rpd_sb3.demos.record import record
from rpd_sb3.envs import ActionTokens
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import Query, TeacherError
from tests.support.helpers import CountingEnv, EchoTeacher


class SeededEnv(CountingEnv):
    """Observation: (seed of the episode, 0, step). Lasts as long as the seed says, and is successful if that is even."""

    def __init__(self, dict_obs: bool = False) -> None:
        super().__init__()
        self.seed = 0
        self.dict_obs = dict_obs
        if dict_obs:
            image = spaces.Box(0, 255, (4, 5, 3), np.uint8)
            self.observation_space = spaces.Dict({"state": self.observation_space, "images/rgb": image})

    def _obs(self) -> Any:
        obs = np.array([self.seed, 0.0, self.t], np.float32)
        return {"state": obs, "images/rgb": np.full((4, 5, 3), self.t, np.uint8)} if self.dict_obs else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        self.seed = self.seed + 100 if seed is None else seed
        self.length = 1 + self.seed % 4
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, done, truncated, _ = super().step(action)
        success = done and self.seed % 2 == 0
        return obs, float(action[1]), done, truncated, {"is_success": success}


def answer(query: Query) -> np.ndarray:
    """(0.1 * step, seed): the second is out of bounds from 2 on."""
    state = query.inputs["state"]
    return np.stack([0.1 * state[:, 2], state[:, 0]], axis=1)


def venv_of(n_envs: int, make: Callable[[], gym.Env] = SeededEnv, teacher: EchoTeacher | None = None) -> VecTeacher:
    return VecTeacher(DummyVecEnv([make] * n_envs), teacher or EchoTeacher(answer))


def assert_same(a: Demonstrations, b: Demonstrations) -> None:
    for name in ("actions", "episode_starts", "rewards", "successes"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
    assert type(a.observations) is type(b.observations)
    one, other = (x.observations if isinstance(x.observations, dict) else {"": x.observations} for x in (a, b))
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], strict=True)
    assert a.metadata == b.metadata


# Recording ------------------------------------------------------------------------------------------------------------


def test_episodes_are_whole_and_in_the_order_of_their_seeds() -> None:
    demos = record(venv_of(3), 5, seed=10)
    lengths = [3, 4, 1, 2, 3]  # 1 + seed % 4 for seeds 10 to 14
    assert demos.observations[:, 0].tolist() == np.repeat(np.arange(10, 15), lengths).tolist()
    assert demos.observations[:, 2].tolist() == [t for length in lengths for t in range(length)]
    assert np.flatnonzero(demos.episode_starts).tolist() == [0, 3, 7, 8, 10]
    assert [rows.stop - rows.start for rows in demos.episodes] == lengths
    assert demos.successes.tolist() == [True, False, True, False, True]


def test_action_is_the_clipped_label_of_its_own_observation() -> None:
    demos = record(venv_of(2), 3, seed=0)
    expected = np.stack([0.1 * demos.observations[:, 2], np.minimum(demos.observations[:, 0], 1.0)], axis=1)
    np.testing.assert_array_equal(demos.actions, expected.astype(np.float32), strict=True)
    np.testing.assert_array_equal(demos.rewards, demos.actions[:, 1], strict=True)  # what the environment acted on


@pytest.mark.parametrize("only_successful", [False, True])
def test_number_of_environments_does_not_matter(only_successful: bool) -> None:
    one, four = (record(venv_of(n), 5, seed=3, only_successful=only_successful) for n in (1, 4))
    assert_same(one, four)


def test_only_successful_keeps_the_first_successful_ones() -> None:
    demos = record(venv_of(3), 4, seed=1, only_successful=True)
    assert demos.observations[demos.episode_starts][:, 0].tolist() == [2, 4, 6, 8]
    assert demos.successes.all()
    assert demos.metadata["n_played"] == 8
    assert demos.metadata["success_rate"] == 0.5


def test_teacher_that_never_succeeds_is_an_error() -> None:
    venv = venv_of(3, lambda: HopelessEnv(known=True))
    with pytest.raises(ValueError, match="only 0 of 40 episodes"):
        record(venv, 2, only_successful=True)


def test_successful_episodes_need_an_environment_that_reports_success() -> None:
    with pytest.raises(ValueError, match="is_success"):
        record(venv_of(2, lambda: HopelessEnv(known=False)), 2, only_successful=True)


def test_success_that_is_not_reported_is_none() -> None:
    demos = record(venv_of(2, lambda: HopelessEnv(known=False)), 2)
    assert demos.successes is None
    assert demos.metadata["success_rate"] is None


class HopelessEnv(CountingEnv):
    def __init__(self, known: bool) -> None:
        super().__init__()
        self.known = known

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return (*super().step(action)[:4], {"is_success": False} if self.known else {})


def test_tokens_act_while_continuous_actions_are_kept() -> None:
    demos = record(venv_of(2, lambda: ActionTokens(SeededEnv(), 16)), 3, seed=0)
    np.testing.assert_array_equal(demos.actions, record(venv_of(2), 3, seed=0).actions, strict=True)
    acted = to_actions(to_tokens(demos.actions, 16), 16)
    np.testing.assert_array_equal(demos.rewards, acted[:, 1], strict=True)


def test_each_observation_is_labelled_once() -> None:
    teacher = EchoTeacher(answer)
    venv = venv_of(1, teacher=teacher)
    demos = record(venv, 4, seed=0)
    assert len(teacher.queries) == len(demos.actions)
    assert venv.label_fraction == 1.0


def test_what_the_teacher_sees_is_not_recorded() -> None:
    venv = VecTeacher(DummyVecEnv([lambda: CountingEnv(teacher_view=True)]), EchoTeacher())
    assert record(venv, 2).observations.shape == (6, 3)


def test_endless_episode_is_an_error() -> None:
    with pytest.raises(ValueError, match="max_steps=7"):
        record(venv_of(1, lambda: CountingEnv(length=100)), 1, max_steps=7)


def test_environments_without_a_teacher_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a teacher"):
        record(DummyVecEnv([SeededEnv]), 1)
    with pytest.raises(ValueError, match="n_episodes=0"):
        record(venv_of(1), 0)


def test_teacher_that_fails_is_a_teacher_error() -> None:
    with pytest.raises(TeacherError, match="not finite"):
        record(venv_of(1, teacher=EchoTeacher(lambda query: np.full((len(query.env_ids), 2), np.nan))), 1)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".hdf5", ".h5"])
@pytest.mark.parametrize("dict_obs", [False, True])
def test_file_gives_the_same_back(tmp_path: Path, suffix: str, dict_obs: bool) -> None:
    demos = record(venv_of(2, lambda: SeededEnv(dict_obs)), 12, seed=0, metadata={"env_kwargs": {"a": [1, None]}})
    path = tmp_path / f"demos{suffix}"
    save(path, demos)
    assert_same(load(path), demos)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".npz", ".h5"])
def test_unknown_success_stays_unknown(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"demos{suffix}", record(venv_of(1, CountingEnv, EchoTeacher()), 2))
    assert load(tmp_path / f"demos{suffix}").successes is None


def test_hdf5_has_the_layout_of_robomimic(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    demos = record(venv_of(2), 3, seed=1)
    save(tmp_path / "demos.hdf5", demos)
    with h5py.File(tmp_path / "demos.hdf5") as file:
        assert set(file["data"]) == {"demo_0", "demo_1", "demo_2"}
        assert file["data"].attrs["total"] == len(demos.actions)
        demo = file["data/demo_1"]
        assert demo.attrs["num_samples"] == 3
        assert demo["dones"][:].tolist() == [False, False, True]
        np.testing.assert_array_equal(demo["obs/state"][:], demos.observations[demos.episodes[1]], strict=True)
        np.testing.assert_array_equal(demo["actions"][:], demos.actions[demos.episodes[1]], strict=True)


def test_file_of_robomimic_can_be_read(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "theirs.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_name": "Lift"})
        for i in (0, 2, 10):
            file[f"data/demo_{i}/actions"] = np.full((2, 3), i / 10)
            file[f"data/demo_{i}/rewards"] = np.zeros(2)
            file[f"data/demo_{i}/obs/object"] = np.zeros((2, 5))
    demos = load(tmp_path / "theirs.hdf5")
    assert demos.actions[demos.episode_starts][:, 0].tolist() == pytest.approx([0.0, 0.2, 1.0])
    assert (demos.metadata, demos.successes, list(demos.observations)) == ({"env_name": "Lift"}, None, ["object"])


def test_first_episodes() -> None:
    demos = record(venv_of(2), 4, seed=2)
    assert_same(demos.first(2), record(venv_of(2), 2, seed=2)._replace(metadata=demos.metadata))
    with pytest.raises(ValueError, match="5 .* there are 4"):
        demos.first(5)


def some_arrays(n: int = 4) -> dict[str, Any]:
    return {
        "observations": np.zeros((n, 3), np.float32),
        "actions": np.zeros((n, 2), np.float32),
        "episode_starts": np.arange(n) == 0,
        "rewards": np.zeros(n, np.float32),
        "successes": np.ones(1, dtype=bool),
        "metadata": "{}",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": np.array([{"x": 1}] * 4)}, "allow_pickle=False"),
        ({"rewards": np.zeros(3)}, r"shapes .*\(3,\)"),
        ({"actions": np.zeros(4)}, "shapes"),
        ({"actions": np.full((4, 2), np.nan)}, "actions must be finite"),
        ({"actions": np.zeros((4, 2), complex)}, "actions must be finite real"),
        ({"episode_starts": np.zeros(4, dtype=bool), "successes": np.zeros(0)}, "does not begin an episode"),
        ({"successes": np.ones(2, dtype=bool)}, "2 successes, but 1 episodes"),
        ({"metadata": "nonsense"}, "Expecting value"),
        ({"something": np.zeros(1)}, "'something'"),
    ],
)
def test_file_of_something_else_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "else.npz"
    np.savez(path, **(some_arrays() | change))
    with pytest.raises(ValueError, match=r"else.npz' does not hold demonstrations.*" + message):
        load(path)


@pytest.mark.parametrize("name", ["else.npz", "else.h5"])
@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="does not hold demonstrations"):
        load(tmp_path / name)


def test_hdf5_of_something_else_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    for content in ("other/actions", "data/trajectory", "data/demo_0/actions"):
        with h5py.File(tmp_path / "else.h5", "w") as file:
            file[content] = np.zeros((2, 2))
        with pytest.raises(ValueError, match="else.h5' does not hold demonstrations"):
            load(tmp_path / "else.h5")


@pytest.mark.parametrize("kind", ["external link", "external storage", "virtual dataset"])
def test_hdf5_that_refers_to_another_file_is_refused(tmp_path: Path, kind: str) -> None:
    h5py = pytest.importorskip("h5py")
    values = np.zeros((2, 3), np.float32)
    values.tofile(tmp_path / "other.raw")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = values
    with h5py.File(tmp_path / "demos.h5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["obs/state"], demo["rewards"] = np.zeros((2, 3)), np.zeros(2)
        if kind == "external link":
            demo["actions"] = h5py.ExternalLink(tmp_path / "other.h5", "secret")
        elif kind == "external storage":
            whole = [(str(tmp_path / "other.raw"), 0, h5py.h5f.UNLIMITED)]
            demo.create_dataset("actions", values.shape, values.dtype, external=whole)
        else:
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "secret", values.shape)
            demo.create_virtual_dataset("actions", layout)
    with pytest.raises(ValueError, match="lies in another file"):
        load(tmp_path / "demos.h5")


def test_names_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="suffix must be one of"):
        load(tmp_path / "demos.pkl")
    with pytest.raises(ValueError, match="do not exist"):
        load(tmp_path / "demos.npz")
    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install h5py"):
        save(tmp_path / "demos.h5", record(venv_of(1), 1))


def test_noise_is_executed_and_not_recorded() -> None:
    clean, noisy, again = (record(venv_of(2), 8, seed=0, noise=noise) for noise in (0.0, 0.5, 0.5))
    assert np.array_equal(noisy.actions, clean.actions)
    assert np.array_equal(clean.rewards, clean.actions[:, 1])  # the reward is the second dimension of what was executed
    assert 0.02 < np.abs(noisy.rewards - noisy.actions[:, 1]).mean() < 0.6
    assert np.abs(noisy.rewards).max() <= 1.0
    assert_same(noisy, again)


def test_noise_needs_continuous_actions() -> None:
    teacher = EchoTeacher(lambda query: np.zeros((len(query.env_ids), 2), int), spaces.MultiDiscrete([256, 256]))
    venv = VecTeacher(DummyVecEnv([lambda: ActionTokens(SeededEnv())]), teacher)
    with pytest.raises(ValueError, match="noise=0.1 .* MultiDiscrete"):
        record(venv, 1, noise=0.1)
