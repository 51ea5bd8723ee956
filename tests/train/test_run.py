"""What a run leaves behind, and what happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO

from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.train import __main__ as train
from rpd_sb3.train import folder as runs
from tests.support.tiny_env import TINY, TinyEnv
from tests.support.train_helpers import NAME, ppo, progress_of, result_of, rpd, trained, weights_of


def test_run_leaves_everything_behind(rpd_run: Path, teacher_file: Path) -> None:
    assert (rpd_run.parent.name, rpd_run.name) == ("rpd_ppo", f"{NAME}_1")
    assert {path.name for path in rpd_run.iterdir()} == {
        "config.yml",
        "args.yml",
        "command.txt",
        "versions.yml",
        "tensorboard",
        "progress.csv",
        "evaluations.npz",
        "best_model.zip",
        f"{NAME}.zip",
        f"{NAME}_label_replay.npz",
        "rl_model_64_steps.zip",
        "rl_model_64_steps_label_replay.npz",
        "rl_model_128_steps.zip",
        "rl_model_128_steps_label_replay.npz",
        "result.json",
        "learning_curve.png",
        "video.mp4",
        "teacher_video.mp4",
    }
    config = yaml.safe_load((rpd_run / "config.yml").read_text())
    assert config["n_steps"] == 16
    assert config["policy"] == "MlpPolicy"
    assert config["policy_kwargs"]["net_arch"] == [8]
    assert config["teacher"] == f"sb3:{teacher_file}"
    assert yaml.safe_load((rpd_run / "args.yml").read_text())["seed"] == 3
    assert (rpd_run / "command.txt").read_text().startswith("python -m rpd_sb3.train --algo rpd_ppo --teacher ")
    assert yaml.safe_load((rpd_run / "versions.yml").read_text())["torch"] == th.__version__
    assert runs.timesteps(rpd_run / "rl_model_64_steps.zip") == 64
    assert any((rpd_run / "tensorboard").iterdir())


def test_result(rpd_run: Path) -> None:
    result = result_of(rpd_run)
    outcome = {"success_once", "success_at_end", "n_episodes", "ci95", "mean_return", "mean_length"}
    assert result["student"].keys() == outcome | {"timesteps"}
    assert result["teacher"].keys() == outcome
    assert result["student"]["timesteps"] == result["timesteps"] == 160
    assert (result["algo"], result["env"], result["seed"], result["complete"]) == ("rpd_ppo", TINY, 3, True)
    assert (result["teacher_queries"], result["labels_per_transition"], result["teacher_share"]) == (160, 1.0, 0.0)
    model = PPO.load(rpd_run / f"{NAME}.zip")
    assert result["student_parameters"] == sum(parameter.numel() for parameter in model.policy.parameters())
    assert result["fps"] == pytest.approx(160 / result["wall_s"], rel=0.01)
    assert 0 < result["evaluation_s"] < result["wall_s"]


def test_result_says_what_student_and_teacher_cost(rpd_run: Path) -> None:
    result = result_of(rpd_run)
    assert result["teacher_parameters"] == result["student_parameters"] == 67  # the same network
    assert result["teacher_bytes"] == result["student_bytes"] == 4 * 67
    assert 0 < result["latency_ms"]["median"] <= result["latency_ms"]["p95"]
    assert result["teacher_latency_ms"]["median"] > 0
    assert result["teacher_latency_ms"]["batch"] == 2  # environments


def test_result_says_how_near_the_student_is_to_its_teacher(rpd_run: Path) -> None:
    agreement = result_of(rpd_run)["agreement"]
    assert (agreement["n_episodes"], agreement["n_observations"]) == (3, 30)
    assert len(agreement["mean_abs_difference"]) == len(agreement["correlation"]) == 1
    assert abs(agreement["bias"][0]) <= agreement["mean_abs_difference"][0]


def test_result_without_a_teacher(ppo_run: Path) -> None:
    result = result_of(ppo_run)
    assert (result["teacher"], result["teacher_queries"], result["labels_per_transition"]) == (None, None, None)
    assert (result["teacher_parameters"], result["teacher_latency_ms"], result["agreement"]) == (None, None, None)


def test_evaluations_are_at_their_steps_and_at_the_end(ppo_run: Path) -> None:
    with np.load(ppo_run / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160]


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


def test_every_run_gets_a_folder_of_its_own(logs: Path) -> None:
    for name in ("Tiny-v0_7", "Tiny-v0_old", "Other-v0_9"):
        (logs / "ppo" / name).mkdir(parents=True)
    folders = [runs.create_run_folder(logs, "ppo", "Tiny-v0") for _ in range(2)]
    assert [folder.name for folder in folders] == ["Tiny-v0_8", "Tiny-v0_9"]
    assert all(folder.is_dir() for folder in folders)


def test_tensorboard_folder_can_be_elsewhere(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(ppo(logs, "-tb", str(tmp_path / "tb"), "-P", n=32)) == 0
    assert len(list((tmp_path / "tb" / "ppo" / f"{NAME}_1").iterdir())) == 1
    assert not (logs / "ppo" / f"{NAME}_1" / "tensorboard").exists()
    assert "32/32 steps" in capsys.readouterr().out  # -P, the progress bar


def test_the_teacher_acts_in_the_share_that_is_logged(logs: Path, teacher_file: Path) -> None:
    words = [
        "teacher_share:lin_1.0_0.6",
        "vec_teacher_kwargs.take_over_steps:3",
        "vec_teacher_kwargs.take_over_at_start:1.0",
    ]
    folder = trained([*rpd(logs, teacher_file, "--vec-env", "subproc", n=96), *words])
    # 32 transitions a rollout and 10 steps an episode: the teacher has all, then those that have begun, then none.
    shares = [float(share) for row in progress_of(folder) if (share := row["rollout/teacher_share"])]
    assert len(shares) == 3
    assert 1.0 == shares[0] > shares[1] > shares[2]
    result = result_of(folder)
    assert result["teacher_share"] == pytest.approx(np.mean(shares))
    assert (result["teacher_queries"], result["labels_per_transition"]) == (96, 1.0)
    assert yaml.safe_load((folder / "config.yml").read_text())["teacher_share"] == "lin_1.0_0.6"


def test_images_are_labelled_and_evaluated(logs: Path, tmp_path: Path) -> None:
    PPO("CnnPolicy", TinyEnv(image=True), device="cpu", policy_kwargs={"net_arch": [8]}).save(tmp_path / "cnn.zip")
    argv = rpd(logs, tmp_path / "cnn.zip", "--env-kwargs", "image:true", "--teacher-kwargs", "camera:base", n=32)
    folder = trained(argv)
    assert yaml.safe_load((folder / "config.yml").read_text())["policy"] == "CnnPolicy"
    assert (result_of(folder)["teacher_queries"], result_of(folder)["labels_per_transition"]) == (32, 1.0)
    assert evaluate.main(["--run", str(folder), "-n", "2", "--vec-env", "dummy"]) == 0


def test_recurrent_baseline(logs: Path) -> None:
    folder = trained(["--algo", "recurrent_ppo", *ppo(logs, n=32)[2:]])
    assert isinstance(runs.load_model(runs.load_run(folder).algo, folder / "best_model.zip"), RecurrentPPO)
    assert evaluate.main(["--run", str(folder), "-n", "2", "--vec-env", "dummy"]) == 0


def test_trpo_baseline(logs: Path) -> None:
    trained(["--algo", "trpo", *[word for word in ppo(logs, n=32)[2:] if word != "n_epochs:1"]])


@pytest.mark.parametrize("freq", ["16", "-1"])
def test_evaluation_frequency_does_not_change_the_student(
    logs: Path, teacher_file: Path, rpd_run: Path, freq: str
) -> None:
    argv = rpd(logs, teacher_file, "--seed", "3", "--eval-freq", freq)
    assert th.equal(
        weights_of(trained([*argv, "label_replay:300"]) / f"{NAME}.zip"), weights_of(rpd_run / f"{NAME}.zip")
    )


def test_bug_in_an_environment_keeps_its_traceback(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: TinyEnv, action: Any) -> Any:
        raise ValueError("the environment is broken")

    monkeypatch.setattr(TinyEnv, "step", step)
    with pytest.raises(ValueError, match="the environment is broken"):
        train.main(ppo(logs))
    folder = logs / "ppo" / f"{NAME}_1"
    assert (folder / f"{NAME}.zip").is_file()
    assert result_of(folder)["complete"] is False


def test_ctrl_c_saves_what_there_is(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    assert train.main(ppo(logs, "--env-kwargs", "signal_at:50")) == 130
    captured = capsys.readouterr()
    folder = logs / "ppo" / f"{NAME}_1"
    assert captured.err == "stopping; once more to kill\n"
    assert captured.out.splitlines()[-2].endswith(f"the model is in {folder}/{NAME}.zip")
    assert captured.out.splitlines()[-1] == str(folder)
    result = result_of(folder)
    assert result["complete"] is False
    assert result["timesteps"] == runs.timesteps(folder / f"{NAME}.zip") == 98
    assert signal.getsignal(signal.SIGINT) is handler


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
    folder = logs / "ppo" / f"{NAME}_1"
    assert out.splitlines()[-1] == str(folder)
    assert runs.timesteps(folder / f"{NAME}.zip") >= 10_240
