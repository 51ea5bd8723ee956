"""A user's mistake is one sentence, and nothing is written."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO

from rpd_sb3.train import build as build_module
from tests.support.tiny_env import TINY, TinyEnv
from tests.support.train_helpers import ppo, rpd, sentence

TINY_PPO = ["--algo", "ppo", "--env", TINY]
TINY_RPD = ["--algo", "rpd_ppo", "--env", TINY]
PICK_RPD = ["--algo", "rpd_ppo", "--env", "PickCube-v1"]
MISTAKES: list[tuple[list[str], str]] = [
    ([], "--algo is missing"),
    (["--algo", "ppo"], "--env is missing"),
    (["--algo", "rpd", "--env", TINY], "'rpd' is unknown; .*'rpd_ppo'"),
    (["--algo", "ppo", "--env", "PickCub-v1"], "'PickCub-v1' is unknown .*'PickCube-v1'"),
    (["--algo", "ppo", "--env", "tests.nix:Tiny-v0"], "module 'tests.nix'"),
    ([*TINY_PPO, "--n-env", "3"], "'--n-env'; did you mean '--n-envs'"),
    ([*TINY_PPO, "-n", "1.5"], "--n-timesteps: .*'1.5'"),
    ([*TINY_PPO, "-n", "0"], "n_timesteps=0"),
    ([*TINY_PPO, "--eval-episodes", "0"], "--eval-episodes 0"),
    ([*TINY_PPO, "--vec-env", "thread"], "--vec-env: .*'thread'"),
    ([*TINY_PPO, "-params", "gama:0.9"], "'gama' .*'gamma'"),
    ([*TINY_PPO, "-params", "gamma"], "-params: 'gamma'"),
    ([*TINY_PPO, "-params", "batch_size:1e6"], "batch_size=1000000"),
    ([*TINY_PPO, "--vec-env", "dummy", "-params", "batch_size:1"], "ppo cannot be made .*batch_size"),
    ([*TINY_PPO, "--env-kwargs", "lenth:3"], "'lenth'"),
    ([*TINY_PPO, "--env-kwargs", "reward:dense"], "no option reward"),
    ([*TINY_PPO, "--device", "cudo"], "device 'cudo'"),
    ([*TINY_PPO, "--device", "cuda:77"], "device 'cuda:77'.*PyTorch sees"),
    ([*TINY_PPO, "--teacher", "scripted"], "ppo learns without a teacher"),
    (TINY_RPD, "rpd_ppo needs a teacher"),
    ([*TINY_RPD, "--teacher", "oracle"], "teacher 'oracle' is unknown"),
    ([*TINY_RPD, "--teacher", "scripted"], "no scripted expert"),
    ([*PICK_RPD, "--teacher-kwargs", "noize:1"], "'noize' .*'noise'"),
    ([*PICK_RPD, "--teacher-kwargs", "noise:-1"], "noise=-1"),
    ([*PICK_RPD, "--teacher-kwargs", "noise:much"], "teacher 'scripted' with .*much"),
    ([*PICK_RPD, "--env-kwargs", "control_mode:pd_joint_pos"], "control_mode='pd_ee_delta_pose', .*'pd_joint_pos'"),
    (["--algo", "ppo", "--env", "PickCube-v1", "--env-kwargs", "obs:rbg"], "obs='rbg'"),
    (["--algo", "ppo", "--env", "PickCube-v1", "--env-kwargs", "control_mode:pd"], "cannot be made .*pd"),
    (["--resume", "nix"], "run folder 'nix'"),
    (["--resume", "."], "no args.yml"),
]


@pytest.mark.parametrize(
    ("argv", "message"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistake_is_one_sentence_and_nothing_is_written(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.search(message, sentence(argv, capsys))
    assert list(tmp_path.iterdir()) == []


def test_teacher_of_another_action_space(
    logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_module, "make_vec_env", None)  # found out before any worker is started
    PPO("MlpPolicy", "Pendulum-v1", device="cpu").save(tmp_path / "pendulum.zip")
    message = sentence(rpd(logs, tmp_path / "pendulum.zip"), capsys)
    assert "gives actions of Box(-2.0, 2.0, (1,), float32), but the environment takes Box(-1.0, 1.0" in message
    assert not logs.exists()


def test_teacher_of_other_observations(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Wide(TinyEnv):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = type(self.observation_space)(-1.0, 1.0, (5,), np.float32)

    PPO("MlpPolicy", Wide(), device="cpu").save(tmp_path / "wide.zip")
    message = sentence(rpd(logs, tmp_path / "wide.zip"), capsys)
    assert "needs the input 'state' of shape (5,), but the environment gives (2,)" in message
    assert not logs.exists()


def test_mistake_found_late_leaves_no_workers(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*TINY_PPO, "-f", str(logs), "--n-envs", "2", "-params", "policy:CnnPolicy", "batch_size:8"]
    assert "ppo cannot be made" in sentence(argv, capsys)
    assert multiprocessing.active_children() == []
    assert not logs.exists()


def test_log_folder_that_is_a_file(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.write_text("")
    sentence(ppo(logs), capsys)


class Anything:
    """A class that a config names, but of no kind that a config may name."""

    made = 0

    def __init__(self, *args: object, **kwargs: object) -> None:
        Anything.made += 1


@pytest.mark.parametrize("key", ["features_extractor_class", "activation_fn", "optimizer_class"])
def test_class_that_a_config_names_is_not_called(logs: Path, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    message = sentence([*ppo(logs), f"policy_kwargs.{key}:{__name__}.Anything"], capsys)
    assert f"policy_kwargs.{key}='{__name__}.Anything' must be the full name of a subclass" in message
    assert Anything.made == 0
    assert not logs.exists()


def test_without_a_renderer_the_doctor_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rpd_sb3.train", "--algo", "ppo", "--env", "PickCube-v1"]
    environment = os.environ | {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere"}
    done = subprocess.run(
        [*command, "-f", str(tmp_path / "logs")], capture_output=True, text=True, timeout=100, env=environment
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("; python -m rpd_sb3.doctor says what to install")
    assert not (tmp_path / "logs").exists()
