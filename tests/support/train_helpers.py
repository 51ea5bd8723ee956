"""Command lines of small trainings in the tiny environment, and what their folders say."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch as th
from stable_baselines3 import PPO

from rpd_sb3.envs import make_env
from rpd_sb3.train import __main__ as train
from tests.support.tiny_env import TINY

SMALL = ["-params", "n_steps:16", "batch_size:16", "n_epochs:1", "policy_kwargs.net_arch:[8]"]
QUICK = ["--n-envs", "2", "--vec-env", "dummy", "--eval-episodes", "3", "--eval-freq", "64", "--no-video"]
NAME = "tests.support.tiny_env-Tiny-v0"
"""The environment's id in the names of folders and models."""


def ppo(logs: Path, *more: str, n: int = 160) -> list[str]:
    """A training without a teacher; add words like ``gamma:0.9`` for more hyper-parameters."""
    return ["--algo", "ppo", "--env", TINY, "-n", str(n), "-f", str(logs), *QUICK, *more, *SMALL]


def rpd(logs: Path, teacher: Path | str, *more: str, n: int = 160) -> list[str]:
    """The same with a teacher: a file, or a name that ``--teacher`` takes."""
    name = f"sb3:{teacher}" if isinstance(teacher, Path) else teacher
    return ["--algo", "rpd_ppo", "--teacher", name, *ppo(logs, *more, n=n)[2:]]


def student(**env_kwargs: Any) -> PPO:
    """An untrained policy of the tiny environment."""
    return PPO("MlpPolicy", make_env(TINY, **env_kwargs), seed=0, device="cpu", policy_kwargs={"net_arch": [8]})


def save_teacher(path: Path) -> Path:
    """The same in a file, to teach with."""
    student().save(path)
    return path


def trained(argv: Sequence[str]) -> Path:
    """Train, and return the run folder, which is the last line on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main(argv) == 0
    return Path(out.getvalue().splitlines()[-1])


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def progress_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


def weights_of(model: Path) -> th.Tensor:
    """All weights of a saved model in one vector."""
    return th.cat([parameter.flatten() for parameter in PPO.load(model, device="cpu").policy.parameters()])


def sentence(argv: Sequence[str], capsys: pytest.CaptureFixture[str], command: Any = train) -> str:
    """The one sentence on stderr for a user's mistake."""
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line
