"""Watching a student or a teacher, and filming it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

from rpd_sb3.enjoy import __main__ as enjoy
from rpd_sb3.episodes import film
from rpd_sb3.evaluate import __main__ as evaluate
from tests.support.tiny_env import TINY, TinyEnv
from tests.support.train_helpers import ppo, save_teacher, sentence, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(trained(ppo(tmp_path_factory.mktemp("logs"), n=32)))


def test_a_student_is_filmed_and_every_episode_is_told(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "film.mp4"
    assert enjoy.main(["--run", run, "-n", "3", "--seed", "7", "--record", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{run}/best_model.zip on {TINY}"
    for i, line in enumerate(lines[1:4]):
        number = (
            rf"episode {i + 1}, seed {7 + i}: (no success|success|success, lost again), length 10, return \d+\.\d\d"
        )
        assert re.fullmatch(number, line)
    assert re.match(r"3 episodes: success \d+% \[.*\], at end \d+%, return \d", lines[4])
    assert lines[5].startswith(f"{path} ")
    assert path.stat().st_size > 0


def test_it_is_the_student_that_evaluate_evaluates(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["--run", run, "-n", "4", "--vec-env", "dummy", "--json", str(tmp_path / "out.json")]) == 0
    capsys.readouterr()
    assert enjoy.main(["--run", run, "-n", "4", "--record", str(tmp_path / "film.gif")]) == 0
    told = re.findall(r": .*return (\d+\.\d\d)$", capsys.readouterr().out, re.MULTILINE)
    assert sum(map(float, told)) / 4 == pytest.approx(json.loads((tmp_path / "out.json").read_text())["mean_return"])


def test_a_teacher_is_filmed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "film.gif"
    teacher = f"sb3:{save_teacher(tmp_path / 'teacher.zip')}"
    assert enjoy.main(["--teacher", teacher, "--env", TINY, "-n", "1", "--record", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"teacher {teacher} on {TINY}\nepisode 1, seed 10000: ")
    assert path.read_bytes().startswith(b"GIF89a")


def test_a_window_shows_the_start_and_every_step(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(film.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(TinyEnv, "metadata", {"render_modes": ["human"], "render_fps": 1000})
    modes: list[str | None] = []
    monkeypatch.setattr(TinyEnv, "render", lambda self: modes.append(self.render_mode))
    assert enjoy.main(["--run", run, "-n", "2"]) == 0
    assert modes == ["human"] * 2 * 11
    assert "2 episodes: " in capsys.readouterr().out


def test_a_window_keeps_the_speed_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISPLAY", ":0")
    clock, slept = [100.0], []
    monkeypatch.setattr(film.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(film.time, "sleep", slept.append)
    monkeypatch.setattr(TinyEnv, "render", lambda self: None)
    window, env = film.Window(), TinyEnv()  # 10 frames a second
    window(env)
    clock[0] += 0.04
    window(env)
    clock[0] += 5.0
    window(env)
    assert slept == [0.0, pytest.approx(0.06), 0.0]


def test_without_a_display_one_sentence_says_what_to_do(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert "film it instead, with --record" in sentence(["--run", run], capsys, enjoy)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name one policy"),
        (["--run", "nix", "-n", "0"], "--n-episodes 0"),
        (["--run", "nix", "--record", "film.avi"], "film.avi cannot be a film"),
        (["--run", "nix", "--record", "nix/film.mp4"], "folder 'nix' does not exist"),
        (["--run", "nix", "--recrod", "film.mp4"], "did you mean '--record'"),
    ],
)
def test_mistake_is_one_sentence(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in sentence(argv, capsys, enjoy)
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_does_not_render_is_a_mistake(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: TinyEnv, render_mode: Any = None, **kwargs: Any) -> None:
        if render_mode is not None:
            raise gym.error.Error("no pictures here")
        original(self, **kwargs)

    original = TinyEnv.__init__
    monkeypatch.setattr(TinyEnv, "__init__", broken)
    message = sentence(["--run", run, "--record", str(tmp_path / "film.mp4")], capsys, enjoy)
    assert f"env '{TINY}' does not render: no pictures here" in message
