"""The commands: what a run leaves behind, and what every mistake is told."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from rpd_sb3.algos.buffers import CompactRolloutBuffer
from rpd_sb3.cli.common import Interrupt
from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.teachers import Labels, Query, TeacherError
from rpd_sb3.teachers.sb3_policy import SB3Teacher
from rpd_sb3.train import __main__ as train
from rpd_sb3.train import build as session
from rpd_sb3.train import folder as runs
from tests.support.tiny_env import TINY, TinyEnv

SMALL = ["-params", "n_steps:16", "batch_size:16", "n_epochs:1", "policy_kwargs.net_arch:[8]"]
QUICK = ["--n-envs", "2", "--vec-env", "dummy", "--eval-episodes", "3", "--eval-freq", "64", "--no-video"]


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.zip"
    PPO("MlpPolicy", TinyEnv(), seed=0, device="cpu", policy_kwargs={"net_arch": [8]}).save(path)
    return path


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"


def ppo(logs: Path, *more: str, n: int = 160) -> list[str]:
    return ["--algo", "ppo", "--env", TINY, "-n", str(n), "-f", str(logs), *QUICK, *more, *SMALL]


def rpd(logs: Path, teacher: Path | str, *more: str, n: int = 160) -> list[str]:
    return [
        "--algo",
        "rpd_ppo",
        "--env",
        TINY,
        "--teacher",
        f"sb3:{teacher}",
        "-n",
        str(n),
        "-f",
        str(logs),
        *QUICK,
        *more,
        *SMALL,
    ]


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def progress_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# A run ----------------------------------------------------------------------------------------------------------------


def test_run_leaves_everything_behind(logs: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = rpd(logs, teacher_file, "--save-freq", "64", "--seed", "3")
    argv.remove("--no-video")
    assert train.main([*argv, "label_replay:100"]) == 0
    folder = logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.yml",
        "args.yml",
        "command.txt",
        "versions.yml",
        "tensorboard",
        "progress.csv",
        "evaluations.npz",
        "best_model.zip",
        "tests.support.tiny_env-Tiny-v0.zip",
        "tests.support.tiny_env-Tiny-v0_label_replay.npz",
        "rl_model_64_steps.zip",
        "rl_model_64_steps_label_replay.npz",
        "rl_model_128_steps.zip",
        "rl_model_128_steps_label_replay.npz",
        "result.json",
        "learning_curve.png",
        "video.mp4",
        "teacher_video.mp4",
    }
    config = yaml.safe_load((folder / "config.yml").read_text())
    assert config["n_steps"] == 16
    assert config["policy"] == "MlpPolicy"
    assert config["policy_kwargs"]["net_arch"] == [8]
    assert config["teacher"] == f"sb3:{teacher_file}"
    assert yaml.safe_load((folder / "args.yml").read_text())["seed"] == 3
    assert (folder / "command.txt").read_text().startswith("python -m rpd_sb3.train --algo rpd_ppo --env ")
    assert yaml.safe_load((folder / "versions.yml").read_text())["torch"] == th.__version__
    assert runs.timesteps(folder / "rl_model_64_steps.zip") == 64
    assert any((folder / "tensorboard").iterdir())


def test_result(logs: Path, teacher_file: Path) -> None:
    assert train.main(rpd(logs, teacher_file)) == 0
    result = result_of(logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1")
    outcome = {"success_once", "success_at_end", "n_episodes", "ci95", "mean_return", "mean_length"}
    assert result["student"].keys() == outcome | {"timesteps"}
    assert result["teacher"].keys() == outcome
    assert result["student"]["timesteps"] == result["timesteps"] == 160
    assert (result["algo"], result["env"], result["seed"], result["complete"]) == ("rpd_ppo", TINY, 0, True)
    assert (result["teacher_queries"], result["labels_per_transition"]) == (160, 1.0)
    model = PPO.load(logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1" / "tests.support.tiny_env-Tiny-v0.zip")
    assert result["student_parameters"] == sum(parameter.numel() for parameter in model.policy.parameters())
    assert result["fps"] == pytest.approx(160 / result["wall_s"], rel=0.01)
    assert 0 < result["evaluation_s"] < result["wall_s"]


def test_result_says_what_student_and_teacher_cost(logs: Path, teacher_file: Path) -> None:
    assert train.main(rpd(logs, teacher_file)) == 0
    result = result_of(logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1")
    assert result["teacher_parameters"] == result["student_parameters"] == 67  # the same network
    assert result["teacher_bytes"] == result["student_bytes"] == 4 * 67
    assert 0 < result["latency_ms"]["median"] <= result["latency_ms"]["p95"]
    assert result["teacher_latency_ms"]["median"] > 0
    assert result["teacher_latency_ms"]["batch"] == 2  # environments


def test_result_says_how_near_the_student_is_to_its_teacher(logs: Path, teacher_file: Path) -> None:
    assert train.main(rpd(logs, teacher_file)) == 0
    agreement = result_of(logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1")["agreement"]
    assert (agreement["n_episodes"], agreement["n_observations"]) == (3, 30)
    assert len(agreement["mean_abs_difference"]) == len(agreement["correlation"]) == 1
    assert abs(agreement["bias"][0]) <= agreement["mean_abs_difference"][0]


def test_film_that_fails_is_one_line_and_no_loss(
    logs: Path, teacher_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def render(self: TinyEnv) -> Any:
        raise RuntimeError("no\nrenderer")

    monkeypatch.setattr(TinyEnv, "render", render)
    assert train.main([word for word in rpd(logs, teacher_file, n=32) if word != "--no-video"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:-1] == ["no video.mp4: no renderer", "no teacher_video.mp4: no renderer"]
    assert result_of(Path(lines[-1]))["complete"] is True


def test_teacher_that_dies_after_the_training_costs_the_agreement_only(
    logs: Path,
    teacher_file: Path,
    teachers: list[CountingTeacher],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(CountingTeacher, "patience", 17)  # 1 + 16 while training; 10 in its own episodes, then 10 more
    assert train.main(rpd(logs, teacher_file, n=32)) == 0
    assert "no agreement: the teacher is dead" in capsys.readouterr().out
    result = result_of(logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1")
    assert (result["complete"], result["agreement"]) == (True, None)
    assert result["latency_ms"]["median"] > 0


def test_result_without_a_teacher(logs: Path) -> None:
    assert train.main(ppo(logs)) == 0
    result = result_of(logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1")
    assert (result["teacher"], result["teacher_queries"], result["labels_per_transition"]) == (None, None, None)
    assert (result["teacher_parameters"], result["teacher_latency_ms"], result["agreement"]) == (None, None, None)


def test_evaluations_are_at_their_steps_and_at_the_end(logs: Path) -> None:
    assert train.main(ppo(logs)) == 0
    with np.load(logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1" / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160]


def test_every_run_gets_a_folder_of_its_own(logs: Path) -> None:
    for _ in range(2):
        assert train.main(ppo(logs, n=32)) == 0
    (logs / "ppo" / "tests.support.tiny_env-Tiny-v0_7").mkdir()
    (logs / "ppo" / "tests.support.tiny_env-Tiny-v0_old").mkdir()
    assert runs.create_run_folder(logs, "ppo", TINY).name == "tests.support.tiny_env-Tiny-v0_8"
    assert {path.name[-2:] for path in (logs / "ppo").iterdir()} == {"_1", "_2", "_7", "_8", "ld"}


def test_tensorboard_folder_can_be_elsewhere(logs: Path, tmp_path: Path) -> None:
    assert train.main(ppo(logs, "-tb", str(tmp_path / "tb"), n=32)) == 0
    assert len(list((tmp_path / "tb" / "ppo" / "tests.support.tiny_env-Tiny-v0_1").iterdir())) == 1
    assert not (logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1" / "tensorboard").exists()


@pytest.mark.parametrize("freq", ["16", "0", "-1"])
def test_evaluation_frequency_does_not_change_the_student(logs: Path, teacher_file: Path, freq: str) -> None:
    parameters = []
    for f in (freq, "64"):
        assert train.main(rpd(logs / f, teacher_file, "--eval-freq", f)) == 0
        file = logs / f / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1" / "tests.support.tiny_env-Tiny-v0.zip"
        parameters.append(th.cat([p.flatten() for p in PPO.load(file).policy.parameters()]))
    assert th.equal(*parameters)


def test_progress_bar(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs, "-P", n=32)) == 0
    assert "32/32 steps" in capsys.readouterr().out


def test_images_are_labelled_and_evaluated(logs: Path, tmp_path: Path) -> None:
    PPO("CnnPolicy", TinyEnv(image=True), device="cpu", policy_kwargs={"net_arch": [8]}).save(tmp_path / "cnn.zip")
    argv = rpd(logs, tmp_path / "cnn.zip", "--env-kwargs", "image:true", "--teacher-kwargs", "camera:base", n=32)
    assert train.main(argv) == 0
    folder = logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert yaml.safe_load((folder / "config.yml").read_text())["policy"] == "CnnPolicy"
    assert (result_of(folder)["teacher_queries"], result_of(folder)["labels_per_transition"]) == (32, 1.0)
    assert evaluate.main(["--run", str(folder), "-n", "2", "--vec-env", "dummy"]) == 0


def test_recurrent_baseline(logs: Path) -> None:
    argv = ppo(logs, n=32)
    argv[1] = "recurrent_ppo"
    assert train.main(argv) == 0
    folder = logs / "recurrent_ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert isinstance(runs.load_model(runs.load_run(folder).algo, folder / "best_model.zip"), RecurrentPPO)
    assert evaluate.main(["--run", str(folder), "-n", "2", "--vec-env", "dummy"]) == 0


def test_trpo_baseline(logs: Path) -> None:
    argv = [word for word in ppo(logs, n=32) if word != "n_epochs:1"]
    argv[1] = "trpo"
    assert train.main(argv) == 0


# Mistakes -------------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[list[str], str]] = [
    ([], "--algo is missing"),
    (["--algo", "ppo"], "--env is missing"),
    (["--algo", "rpd", "--env", TINY], "--algo 'rpd' is unknown; .* did you mean 'rpd_ppo'"),
    (["--algo", "ppo", "--env", "PickCub-v1"], "env 'PickCub-v1' is unknown .* did you mean 'PickCube-v1'"),
    (["--algo", "rpd_ppo", "--env", "PickCub-v1"], "env 'PickCub-v1' is unknown .* did you mean 'PickCube-v1'"),
    (["--algo", "ppo", "--env", "tests.nix:Tiny-v0"], "module 'tests.nix' cannot be imported"),
    (["--algo", "ppo", "--env", TINY, "--n-env", "3"], "unknown argument '--n-env'; did you mean '--n-envs'"),
    (["--algo", "ppo", "--env", TINY, "-n", "many"], "--n-timesteps: invalid whole number value: 'many'"),
    (["--algo", "ppo", "--env", TINY, "-n", "1.5"], "--n-timesteps: invalid whole number value: '1.5'"),
    (["--algo", "ppo", "--env", TINY, "-n", "0"], "n_timesteps=0 must be at least 1"),
    (["--algo", "ppo", "--env", TINY, "--n-envs", "0"], "n_envs=0 must be at least 1"),
    (["--algo", "ppo", "--env", TINY, "--eval-episodes", "0"], "--eval-episodes 0 must be at least 1"),
    (["--algo", "ppo", "--env", TINY, "--n-eval-envs", "0"], "--n-eval-envs 0 must be at least 1"),
    (["--algo", "ppo", "--env", TINY, "--num-threads", "0"], "--num-threads 0 must be at least 1"),
    (["--algo", "ppo", "--env", TINY, "--seed", "-1"], "--seed -1 must be at least 0"),
    (["--algo", "ppo", "--env", TINY, "--vec-env", "thread"], "--vec-env: invalid choice: 'thread'"),
    (["--algo", "ppo", "--env", TINY, "-params", "gama:0.9"], "unknown key 'gama' for PPO; did you mean 'gamma'"),
    (["--algo", "ppo", "--env", TINY, "-params", "gamma"], "-params: 'gamma' is not of the form key:value"),
    (["--algo", "ppo", "--env", TINY, "-params", "loss:l1"], "unknown key 'loss' for PPO"),
    (["--algo", "ppo", "--env", TINY, "-params", "batch_size:1e6"], "batch_size=1000000 is larger than a rollout"),
    (
        ["--algo", "ppo", "--env", TINY, "--vec-env", "dummy", "-params", "batch_size:1"],
        "ppo cannot be made .*batch_size",
    ),
    (
        ["--algo", "ppo", "--env", TINY, "--vec-env", "dummy", "-params", "policy:CnnPolicy"],
        "ppo cannot be made .*NatureCNN only with images",
    ),
    (["--algo", "ppo", "--env", TINY, "--env-kwargs", "lenth:3"], "env .* cannot be made .*keyword argument 'lenth'"),
    (
        ["--algo", "ppo", "--env", TINY, "--env-kwargs", "reward:dense"],
        "is not a ManiSkill task: it has no option reward",
    ),
    (
        ["--algo", "ppo", "--env", TINY, "--section", "papr-dense"],
        "no section 'papr-dense'.*did you mean 'paper-dense'",
    ),
    (["--algo", "ppo", "--env", TINY, "--conf-file", "nix.yml"], "'nix.yml' cannot be read: .*No such file"),
    (["--algo", "ppo", "--env", TINY, "--device", "cudo"], "device 'cudo' is unknown to PyTorch"),
    (["--algo", "ppo", "--env", TINY, "--device", "cuda:77"], "device 'cuda:77' does not exist: PyTorch sees"),
    (["--algo", "ppo", "--env", TINY, "--teacher", "scripted"], "ppo learns without a teacher"),
    (["--algo", "rpd_ppo", "--env", TINY], "rpd_ppo needs a teacher: name one with --teacher"),
    (
        ["--algo", "rpd_ppo", "--env", TINY, "--teacher", "oracle"],
        "teacher 'oracle' is unknown; choose one of scripted",
    ),
    (["--algo", "rpd_ppo", "--env", TINY, "--teacher", "scripted"], "no scripted expert for env"),
    (["--algo", "rpd_ppo", "--env", TINY, "--teacher", "sb3:nix.zip"], "model 'nix.zip' does not exist"),
    (
        ["--algo", "rpd_ppo", "--env", "PickCube-v1", "--teacher-kwargs", "noize:1"],
        "no argument 'noize' .*mean 'noise'",
    ),
    (["--algo", "rpd_ppo", "--env", "PickCube-v1", "--teacher-kwargs", "noise:-1"], "noise=-1 must be"),
    (["--algo", "rpd_ppo", "--env", "PickCube-v1", "--teacher-kwargs", "noise:much"], "teacher 'scripted' with .*much"),
    (
        ["--algo", "rpd_ppo", "--env", "PickCube-v1", "--env-kwargs", "control_mode:pd_joint_pos"],
        "teacher 'scripted' gives actions for control_mode='pd_ee_delta_pose', but .*'pd_joint_pos'",
    ),
    (["--algo", "ppo", "--env", "PickCube-v1", "--env-kwargs", "obs:rbg"], "obs='rbg' is unknown; choose one of state"),
    (
        ["--algo", "ppo", "--env", "PickCube-v1", "--env-kwargs", "control_mode:pd"],
        "cannot be made .*pd not in supported",
    ),
    (["--resume", "nix"], "run folder 'nix' does not exist"),
    (["--resume", "."], "run folder '.' has no args.yml and config.yml"),
]


def sentence(argv: Sequence[str], capsys: pytest.CaptureFixture[str], command: Any = train) -> str:
    """The one sentence on stderr for a user's mistake."""
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


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
    monkeypatch.setattr(session, "make_vec_env", None)  # found out before any worker is started
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


def test_damaged_teacher(logs: Path, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.zip"
    damaged.write_bytes(teacher_file.read_bytes()[:-100])
    assert "is not a zip file written by SB3's save()" in sentence(rpd(logs, damaged), capsys)
    assert not logs.exists()


def test_mistake_found_late_leaves_no_workers(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--algo",
        "ppo",
        "--env",
        TINY,
        "-f",
        str(logs),
        "--n-envs",
        "2",
        "-params",
        "policy:CnnPolicy",
        "batch_size:8",
    ]
    assert "ppo cannot be made" in sentence(argv, capsys)
    assert multiprocessing.active_children() == []
    assert not logs.exists()


def test_unreadable_config(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.yml").write_text("default:\n  gamma: [1\nx: 3\n")
    assert "bad.yml, line 3: " in sentence(ppo(logs, "--conf-file", str(tmp_path / "bad.yml")), capsys)


def test_log_folder_that_is_a_file(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs.write_text("")
    sentence(ppo(logs), capsys)


def test_bug_in_an_environment_keeps_its_traceback(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: TinyEnv, action: Any) -> Any:
        raise ValueError("the environment is broken")

    monkeypatch.setattr(TinyEnv, "step", step)
    with pytest.raises(ValueError, match="the environment is broken"):
        train.main(ppo(logs))
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert (folder / "tests.support.tiny_env-Tiny-v0.zip").is_file()
    assert result_of(folder)["complete"] is False


# Things that happen on the way ----------------------------------------------------------------------------------------


class CountingTeacher(SB3Teacher):
    """Counts the queries, and fails after as many as ``patience``."""

    queries, patience = 0, 10**6

    def label(self, query: Query) -> Labels:
        self.queries += 1
        if self.queries > self.patience:
            raise TeacherError("the teacher is dead")
        return super().label(query)


@pytest.fixture
def teachers(teacher_file: Path, monkeypatch: pytest.MonkeyPatch) -> list[CountingTeacher]:
    """The teachers that a run makes: the one of training, then the one of evaluation."""
    made: list[CountingTeacher] = []

    def make(name: str, env_id: str) -> CountingTeacher:
        made.append(CountingTeacher(PPO.load(teacher_file)))
        return made[-1]

    monkeypatch.setattr(session, "make_teacher", make)
    return made


def test_teacher_that_fails_ends_the_run_but_not_the_model(
    logs: Path,
    teacher_file: Path,
    teachers: list[CountingTeacher],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(CountingTeacher, "patience", 15)  # one at the start, 14 in the first rollout; 10 in evaluation
    assert train.main(rpd(logs, teacher_file)) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["error: the teacher is dead"]
    folder = logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert captured.out.splitlines()[-1] == str(folder)
    assert runs.timesteps(folder / "tests.support.tiny_env-Tiny-v0.zip") == 32
    assert result_of(folder)["complete"] is False


def test_evaluation_asks_a_teacher_of_its_own(logs: Path, teacher_file: Path, teachers: list[CountingTeacher]) -> None:
    """Otherwise the noise of its labels would depend on the evaluations."""
    assert train.main(rpd(logs, teacher_file, "--eval-freq", "16", n=64)) == 0
    assert [teacher.queries for teacher in teachers] == [1 + 32, 10 + 10]  # the latter: its own episodes, agreement


def test_ctrl_c_saves_what_there_is(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert train.main(ppo(logs, "--env-kwargs", "signal_at:50")) == 130
    captured = capsys.readouterr()
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert captured.err == "stopping; once more to kill\n"
    assert captured.out.splitlines()[-2].endswith(f"the model is in {folder}/tests.support.tiny_env-Tiny-v0.zip")
    assert captured.out.splitlines()[-1] == str(folder)
    result = result_of(folder)
    assert result["complete"] is False
    assert result["timesteps"] == runs.timesteps(folder / "tests.support.tiny_env-Tiny-v0.zip") == 98
    assert signal.getsignal(signal.SIGINT) is handler


def test_signal_waits_for_the_end_of_a_deferred_block() -> None:
    done = []
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.deferred():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inside")
        done.append("after")
        with interrupt.deferred():
            done.append("once only")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one kills
        assert interrupt.exit_code == 143
    assert done == ["inside", "after", "once only"]


def test_optimiser_step_is_not_interrupted() -> None:
    class Stubborn(th.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            os.kill(os.getpid(), signal.SIGINT)
            super().step()

    weight = th.nn.Parameter(th.ones(1))
    optimizer = Stubborn([weight], lr=1.0)
    weight.grad = th.ones(1)
    with Interrupt() as interrupt:
        interrupt.watch(optimizer)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert weight.item() == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_whole_process_group(logs: Path, signum: int) -> None:
    """As a terminal does on Ctrl-C, and a batch system at the end of the time."""
    argv = ["--algo", "ppo", "--env", TINY, "-n", "1e7", "-f", str(logs), "--eval-episodes", "2", "-params", "n_envs:4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rpd_sb3.train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "10,240 steps" in line:
            os.killpg(process.pid, signum)
            break
    start = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - start < 20
    assert process.returncode == 128 + signum
    assert err == "stopping; once more to kill\n"
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    assert out.splitlines()[-1] == str(folder)
    assert runs.timesteps(folder / "tests.support.tiny_env-Tiny-v0.zip") >= 10_240


# Resume ---------------------------------------------------------------------------------------------------------------


def test_resume_goes_on_in_the_same_folder(logs: Path, teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*rpd(logs, teacher_file), "label_replay:300"]) == 0
    folder = logs / "rpd_ppo" / "tests.support.tiny_env-Tiny-v0_1"
    with np.load(folder / "tests.support.tiny_env-Tiny-v0_label_replay.npz") as file:
        labels = len(file["label/action"])
    assert train.main(["--resume", str(folder), "-n", "256", "--no-video"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    result = result_of(folder)
    assert (result["timesteps"], result["resumed_at"], result["teacher_queries"]) == (256, 160, 96)
    assert yaml.safe_load((folder / "config.yml").read_text())["n_timesteps"] == 256
    assert len((folder / "command.txt").read_text().splitlines()) == 2
    with np.load(folder / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160, 192, 256]
        assert file["results"].shape == (6, 3)
    steps = [int(row["time/total_timesteps"]) for row in progress_of(folder)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 256)
    with np.load(folder / "tests.support.tiny_env-Tiny-v0_label_replay.npz") as file:
        assert (labels, len(file["label/action"])) == (160, 256)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_resume_after_a_crash_drops_what_came_after_the_checkpoint(logs: Path) -> None:
    assert train.main(ppo(logs, "--save-freq", "64")) == 0
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    for name in ("tests.support.tiny_env-Tiny-v0.zip", "rl_model_128_steps.zip", "best_model.zip"):
        (folder / name).unlink()
    assert train.main(["--resume", str(folder), "--no-video"]) == 0
    assert (result_of(folder)["resumed_at"], result_of(folder)["timesteps"]) == (64, 160)
    with np.load(folder / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160]
    rollouts = [int(row["time/total_timesteps"]) for row in progress_of(folder) if row["time/fps"]]
    assert rollouts == [32, 64, 96, 128, 160]


def test_resume_continues_the_weights(logs: Path) -> None:
    assert train.main(ppo(logs)) == 0
    run = runs.load_run(logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1")
    args = train.DEFAULTS | run.args
    from rpd_sb3.train.hyperparams import check_section

    config = check_section(run.config, run.algo)
    config.n_timesteps = 1000
    job = session.build(args, config, run, [])
    assert job.model.env is not None
    assert job.model.env._seeds == [160, 161]  # not the first episodes again
    assert isinstance(job.model.rollout_buffer, CompactRolloutBuffer)  # type: ignore[attr-defined]
    saved = PPO.load(run.last_model)
    assert saved.rollout_buffer_class is RolloutBuffer  # SB3 alone can load it
    assert all(th.equal(a, b) for a, b in zip(job.model.policy.parameters(), saved.policy.parameters(), strict=True))
    state = job.model.policy.optimizer.state_dict()["state"]
    assert all(
        th.equal(state[i]["exp_avg"], s["exp_avg"]) for i, s in saved.policy.optimizer.state_dict()["state"].items()
    )
    job.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "160"], "has 160 timesteps already; ask for more than that with -n"),
        (
            ["-n", "500", "--env", "Pendulum-v1"],
            "goes on with env='tests.support.tiny_env:Tiny-v0', but 'Pendulum-v1' is given",
        ),
        (["-n", "500", "--seed", "1"], "goes on with seed=0, but 1 is given"),
        (["-n", "500", "-params", "gamma:0.5"], "goes on with params="),
    ],
)
def test_resume_that_contradicts_the_run(
    logs: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(ppo(logs)) == 0
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert message in sentence(["--resume", str(folder), *argv], capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_resume_from_a_damaged_checkpoint(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs)) == 0
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    model = folder / "tests.support.tiny_env-Tiny-v0.zip"
    model.write_bytes(model.read_bytes()[:1000])
    capsys.readouterr()
    assert "tests.support.tiny_env-Tiny-v0.zip' is not a zip file" in sentence(
        ["--resume", str(folder), "-n", "500"], capsys
    )


def test_resume_without_a_model(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs)) == 0
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    for path in folder.glob("*.zip"):
        path.unlink()
    capsys.readouterr()
    assert "holds no model to resume from" in sentence(["--resume", str(folder), "-n", "500"], capsys)


# evaluate -------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_result_of_the_run(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs)) == 0
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    capsys.readouterr()
    argv = ["--run", str(folder), "--model", "last", "-n", "3", "--vec-env", "dummy", "--json"]
    assert evaluate.main([*argv, str(tmp_path / "out.json")]) == 0
    assert "95 % interval" in capsys.readouterr().out
    written = json.loads((tmp_path / "out.json").read_text())
    student = result_of(folder)["student"]
    assert {key: written[key] for key in student if key != "timesteps"} == {
        k: v for k, v in student.items() if k != "timesteps"
    }
    assert evaluate.main([*argv, "-"]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_evaluate_a_teacher(teacher_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--teacher", f"sb3:{teacher_file}", "--env", TINY, "-n", "4", "--vec-env", "dummy", "--json", "-"]
    assert evaluate.main(argv) == 0
    out = json.loads(capsys.readouterr().out)
    assert (out["n_episodes"], out["name"]) == (4, f"teacher sb3:{teacher_file}")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name one policy: a run"),
        (["--run", "x", "--teacher", "scripted"], "name one policy: a run"),
        (["--run", "nix"], "run folder 'nix' does not exist"),
        (["--teacher", "scripted"], "--env is missing"),
        (["--run", "nix", "--teacher-kwargs", "noise:1"], "--teacher-kwargs are for --teacher"),
        (["--teacher", "scripted", "--env", "PickCub-v1"], "env 'PickCub-v1' is unknown .*mean 'PickCube-v1'"),
        (["--teacher", "scripted", "--env", TINY], "no scripted expert for env"),
        (["--teacher", "sb3:nix.zip", "--env", TINY], "model 'nix.zip' does not exist"),
        (["--teacher", "scripted", "--env", "PickCube-v1", "-n", "0"], "--n-episodes 0 must be at least 1"),
        (["--run", "nix", "--seed", "-1"], "--seed -1 must be at least 0"),
        (["--run", "nix", "--json", "nowhere/out.json"], "--json nowhere/out.json: folder 'nowhere' does not exist"),
        (["--run", "nix", "--episodes", "3"], "unknown argument '--episodes'; did you mean '--n-episodes'"),
    ],
)
def test_evaluate_mistake_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(message, sentence(argv, capsys, evaluate))


def test_evaluate_in_an_environment_with_other_observations(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs, n=32)) == 0
    capsys.readouterr()
    folder = str(logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1")
    assert "was trained on Box(-10.0, 10.0, (2,)" in sentence(
        ["--run", folder, "--env", "CartPole-v1"], capsys, evaluate
    )


def test_evaluate_a_damaged_model(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs, n=32)) == 0
    capsys.readouterr()
    folder = logs / "ppo" / "tests.support.tiny_env-Tiny-v0_1"
    (folder / "best_model.zip").write_bytes(b"PK")
    assert "best_model.zip' is not a zip file written by SB3" in sentence(["--run", str(folder)], capsys, evaluate)
    (folder / "best_model.zip").unlink()
    assert "has no best_model.zip yet; use --model last" in sentence(["--run", str(folder)], capsys, evaluate)


def test_without_a_renderer_the_doctor_is_named(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "rpd_sb3.train",
        "--algo",
        "ppo",
        "--env",
        "PickCube-v1",
        "-f",
        str(tmp_path / "logs"),
    ]
    environment = os.environ | {"VK_DRIVER_FILES": "/nowhere", "VK_ICD_FILENAMES": "/nowhere"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("; python -m rpd_sb3.doctor says what to install")
    assert not (tmp_path / "logs").exists()
