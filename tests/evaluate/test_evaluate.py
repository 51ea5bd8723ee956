"""The command that evaluates a student or a teacher."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from rpd_sb3.evaluate import __main__ as evaluate
from tests.support.tiny_env import TINY
from tests.support.train_helpers import ppo, result_of, save_teacher, sentence, trained


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(ppo(tmp_path_factory.mktemp("logs"), n=64))


def test_evaluate_gives_the_result_of_the_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--run", str(run), "--model", "last", "-n", "3", "--vec-env", "dummy", "--json"]
    assert evaluate.main([*argv, str(tmp_path / "out.json")]) == 0
    assert "95 % interval" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    student = result_of(run)["student"]
    assert {key: written[key] for key in student if key != "timesteps"} == {
        k: v for k, v in student.items() if k != "timesteps"
    }
    assert evaluate.main([*argv, "-"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_evaluate_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = save_teacher(tmp_path / "teacher.zip")
    argv = ["--teacher", f"sb3:{teacher}", "--env", TINY, "-n", "4", "--vec-env", "dummy", "--json", "-"]
    assert evaluate.main(argv) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["n_episodes"], out["name"]) == (4, f"teacher sb3:{teacher}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--run", "x", "--teacher", "scripted"], "a run, e.g. --run"),
        (["--run", "nix"], "run folder 'nix'"),
        (["--teacher", "scripted"], "--env is missing"),
        (["--run", "nix", "--teacher-kwargs", "noise:1"], "--teacher-kwargs"),
        (["--teacher", "scripted", "--env", "PickCub-v1"], "'PickCub-v1' is unknown .*'PickCube-v1'"),
        (["--teacher", "scripted", "--env", TINY], "no scripted expert"),
        (["--teacher", "scripted", "--env", "PickCube-v1", "-n", "0"], "--n-episodes 0"),
    ],
)
def test_evaluate_mistake_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, sentence(argv, capsys, evaluate))


def test_evaluate_in_an_environment_with_other_observations(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = sentence(["--run", str(run), "--env", "CartPole-v1"], capsys, evaluate)
    assert "was trained on Box(-10.0, 10.0, (2,)" in message


def test_evaluate_a_damaged_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    (folder / "best_model.zip").write_bytes(b"PK")
    assert "best_model.zip' is not a zip file written by SB3" in sentence(["--run", str(folder)], capsys, evaluate)
    (folder / "best_model.zip").unlink()
    assert "has no best_model.zip yet; use --model last" in sentence(["--run", str(folder)], capsys, evaluate)
