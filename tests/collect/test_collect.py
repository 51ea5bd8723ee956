"""``python -m rpd_sb3.collect``: what it writes and prints, and what every mistake is told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rpd_sb3.collect import __main__ as collect
from rpd_sb3.demos.files import Demonstrations, export_lerobot, load
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherError, TeacherSpec
from tests.support.tiny_env import TINY, TinyEnv


class GoThere(LocalTeacher):
    """Moves TinyEnv to its goal.

    :param fails: give no answer
    :param gain: 0 never arrives
    """

    def __init__(self, gain: float = 3.0, fails: bool = False) -> None:
        super().__init__()
        self.spec = TeacherSpec("go", frozenset({"action"}), ("state",), spaces.Box(-1.0, 1.0, (1,), np.float32))
        self.gain, self.fails = gain, fails

    def label(self, query: Query) -> Labels:
        if self.fails:
            raise TeacherError("the teacher has left")
        state = query.inputs["state"]
        return {"action": np.clip(self.gain * (state[:, 1:] - state[:, :1]), -1.0, 1.0)}


TEACHER = f"{__name__}:GoThere"
FPS = TinyEnv.metadata["render_fps"]


def command(out: Path | None, *more: str) -> list[str]:
    words = ["--env", TINY, "--teacher", TEACHER, "-n", "6", "--n-envs", "2", "--vec-env", "dummy"]
    return [*words, *(["--out", str(out)] if out else []), *more]


@pytest.mark.parametrize("suffix", [".npz", ".hdf5"])
def test_file_and_summary(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"demos{suffix}"
    argv = command(out, "--seed", "7", "--env-kwargs", "length:4", "--teacher-kwargs", "gain:2.0")
    assert collect.main(argv) == 0
    demos = load(out)
    assert (demos.n_episodes, len(demos.actions)) == (6, 24)
    facts = {"env_id": TINY, "env_kwargs": {"length": 4}, "teacher": TEACHER, "teacher_kwargs": {"gain": 2.0}}
    facts |= {"seed": 7, "n_episodes": 6, "n_played": 6, "only_successful": False, "fps": FPS}
    assert {key: demos.metadata[key] for key in facts} == facts
    rate = demos.successes.mean()
    assert demos.metadata["success_rate"] == rate
    line = capsys.readouterr().out
    assert line.startswith(f"6 episodes, 24 transitions, success {rate:.0%} of 6 played, ")
    assert line.endswith(f" s, {out} 0.0 MB\n")


def test_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    for name, n_envs in (("a", "1"), ("b", "4")):
        assert collect.main(command(tmp_path / f"{name}.npz", "--n-envs", n_envs)) == 0
    np.testing.assert_array_equal(load(tmp_path / "a.npz").observations, load(tmp_path / "b.npz").observations)


def test_successful_episodes_alone(tmp_path: Path) -> None:
    out = tmp_path / "demos.npz"
    assert (
        collect.main(command(out, "--only-successful", "--env-kwargs", "length:1", "--teacher-kwargs", "gain:1")) == 0
    )
    demos = load(out)
    assert demos.successes.tolist() == [True] * 6
    assert demos.metadata["n_played"] > 6


def test_overwrite(tmp_path: Path) -> None:
    out = tmp_path / "demos.npz"
    out.write_text("old")
    assert collect.main(command(out, "--overwrite")) == 0
    assert load(out).n_episodes == 6


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if anything is built."""

    def build(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work has begun")

    monkeypatch.setattr("rpd_sb3.teachers.registry.open_teacher", build)
    monkeypatch.setattr("rpd_sb3.labelling.probe.probe", build)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out", "x.npz", "--teacher", "scripted"], "--env or --teacher is missing"),
        (["--env", TINY, "--teacher", TEACHER], "--out is missing"),
        (command(Path("x.pkl")), "suffix must be one of"),
        (command(Path("nowhere/x.npz")), "folder 'nowhere' does not exist"),
        (command(Path("there.npz")), "add --overwrite"),
        (command(Path("folder.npz"), "--overwrite"), "folder.npz exists already"),
        (command(Path("x.npz"), "-n", "0"), "--n-episodes 0"),
        (command(Path("x.npz"), "--noise", "-1"), "--noise -1.0"),
        (command(Path("x.npz"), "--lerobot", "new"), "package lerobot"),
        (command(Path("x.npz"), "--env", "Tini-v0"), "env 'Tini-v0' is unknown"),
    ],
)
def test_mistake_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "lerobot", None)
    (tmp_path / "there.npz").write_text("old")
    (tmp_path / "folder.npz").mkdir()
    assert collect.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"there.npz", "folder.npz"}
    assert (tmp_path / "there.npz").read_text() == "old"


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--teacher-kwargs", "fails:true"], 1, "the teacher has left"),
        (["--teacher-kwargs", "gain:-9", "--only-successful", "--env-kwargs", "length:1"], 1, "6 are wanted; choose"),
        (["--teacher-kwargs", "gian:1"], 2, "has no argument 'gian'"),
        (["--env-kwargs", "lenght:1"], 2, "lenght"),
        (["--env-kwargs", "image:true"], 2, "needs the input 'state'"),
    ],
)
def test_failure_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr("rpd_sb3.demos.record.MAX_TRIES", 1)
    assert collect.main(command(tmp_path / "demos.npz", *more)) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# LeRobot --------------------------------------------------------------------------------------------------------------


class RecordingDataset:
    """What LeRobot 0.6.1 checks of each frame, and what it was given."""

    made: list[RecordingDataset] = []

    def __init__(self, root: Path, features: dict[str, Any], **options: Any) -> None:
        self.features, self.options = features, options
        self.frames: list[dict[str, Any]] = []
        self.episodes: list[int] = []
        self.finalized = False
        root.mkdir(parents=True)
        self.made.append(self)

    create = classmethod(lambda cls, **kwargs: cls(**kwargs))

    def add_frame(self, frame: dict[str, Any]) -> None:
        assert frame.keys() == self.features.keys() | {"task"}
        for name, feature in self.features.items():
            assert frame[name].shape == feature["shape"]
            assert feature["dtype"] in (str(frame[name].dtype), "video")
        self.frames.append(frame)

    def save_episode(self) -> None:
        self.episodes.append(len(self.frames))

    def finalize(self) -> None:
        self.finalized = True


@pytest.fixture
def lerobot(monkeypatch: pytest.MonkeyPatch) -> type[RecordingDataset]:
    names = ("lerobot", "lerobot.datasets", "lerobot.datasets.lerobot_dataset")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[0]].__spec__ = SimpleNamespace()  # type: ignore[assignment]
    sys.modules[names[2]].LeRobotDataset = RecordingDataset  # type: ignore[attr-defined]
    monkeypatch.setattr(RecordingDataset, "made", [])
    return RecordingDataset


def test_lerobot_gets_every_frame(tmp_path: Path, lerobot: type[RecordingDataset]) -> None:
    images = np.arange(5 * 4 * 6 * 3, dtype=np.uint8).reshape(5, 4, 6, 3)
    states, actions = np.zeros((5, 3), np.float32), np.arange(10, dtype=np.float32).reshape(5, 2)
    starts, rewards = np.array([True, False, True, False, False]), np.ones(5, np.float32)
    successes = np.array([False, True])
    demos = Demonstrations({"rgb": images, "state": states}, actions, starts, rewards, successes, {})
    export_lerobot(tmp_path / "set", demos, fps=20, task="push")
    (dataset,) = lerobot.made
    assert dataset.features["observation.images.rgb"]["dtype"] == "video"
    assert dataset.features.keys() >= {"observation.state", "action", "next.reward", "next.done", "next.success"}
    assert (dataset.options["fps"], dataset.episodes, dataset.finalized) == (20, [2, 5], True)
    np.testing.assert_array_equal([frame["action"] for frame in dataset.frames], actions)
    np.testing.assert_array_equal([frame["observation.images.rgb"] for frame in dataset.frames], images)
    assert [frame["next.done"].item() for frame in dataset.frames] == [False, True, False, False, True]
    assert [frame["next.success"].item() for frame in dataset.frames] == [False] * 4 + [True]
    assert {frame["task"] for frame in dataset.frames} == {"push"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_lerobot_alone(tmp_path: Path, lerobot: type[RecordingDataset], capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main(command(None, "--lerobot", str(tmp_path / "set"))) == 0
    (dataset,) = lerobot.made
    assert len(dataset.episodes) == 6
    assert (dataset.options["fps"], dataset.options["use_videos"]) == (FPS, False)
    assert capsys.readouterr().out.endswith(f"{tmp_path / 'set'} 0.0 MB\n")


@pytest.mark.usefixtures("lerobot")
def test_lerobot_folder_must_be_new(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main(command(None, "--lerobot", str(tmp_path))) == 2
    assert "exists already" in capsys.readouterr().err
    assert collect.main(command(None, "--lerobot", str(tmp_path / "a" / "b"))) == 2
    assert "does not exist" in capsys.readouterr().err
