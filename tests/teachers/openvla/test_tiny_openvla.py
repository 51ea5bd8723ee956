"""The tiny OpenVLA of the examples: how it is made, and that it teaches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rpd_sb3.contract.teacher import Query
from rpd_sb3.demos.files import Demonstrations, save
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from rpd_sb3.train import __main__ as train
from tests.support import ROOT

EXAMPLE = ROOT / "examples" / "tiny_openvla"
CHECKPOINT = EXAMPLE / "checkpoint"
TEXTS = ("push the cube away from the robot base", "pull the cube towards the robot base")


def ask(teacher: OpenVLATeacher, images: np.ndarray, text: str) -> np.ndarray:
    n = len(images)
    query = Query({"images.human": images, "instruction": np.array([text] * n)}, np.arange(n), np.ones(n, bool))
    return teacher.label(query)["action"]


@pytest.mark.slow
def test_training_makes_a_checkpoint_that_acts_as_demonstrated(tmp_path: Path) -> None:
    images = np.stack([np.full((224, 224, 3), level, np.uint8) for level in (0, 255)] * 10)
    demonstrated = {}
    for text, values in zip(TEXTS, ((-0.9, 0.1), (-0.3, 0.7))):  # of a dark and of a bright image
        actions = np.tile(np.array([[value] * 6 + [np.sign(value)] for value in values], np.float32), (10, 1))
        demonstrated[text] = actions[:2]
        starts = np.arange(20) % 2 == 0
        demos = Demonstrations(images, actions, starts, np.zeros(20, np.float32), None, {"instruction": text})
        save(tmp_path / f"{text.split()[0]}.npz", demos)
    files = [str(tmp_path / "push.npz"), str(tmp_path / "pull.npz")]
    options = ["--steps", "80", "--batch-size", "8", "--learning-rate", "5e-3", "--device", "cpu"]
    command = [sys.executable, str(EXAMPLE / "train.py"), *files, "--out", str(tmp_path / "made"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLE.parent.parent)
    assert done.returncode == 0, done.stderr
    teacher = OpenVLATeacher(str(tmp_path / "made"), image_size=224)
    for text, wanted in demonstrated.items():
        given = ask(teacher, images[:2], text)
        assert np.abs(given[:, :-1] - wanted[:, :-1]).max() < 0.05
        assert np.abs(given[:, -1] - (wanted[:, -1] + 1) / 2).max() < 0.05  # the gripper of OpenVLA's data
    teacher.close()


def test_the_checkpoint_that_comes_along_is_small_and_listens() -> None:
    assert (CHECKPOINT / "model.safetensors").stat().st_size < 20e6
    statistics = json.loads((CHECKPOINT / "config.json").read_text())["norm_stats"]
    assert list(statistics) == ["maniskill_tiny"]
    teacher = OpenVLATeacher(str(CHECKPOINT), image_size=224)
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    push, pull = (ask(teacher, images, text) for text in TEXTS)
    assert not np.allclose(push, pull)
    teacher.close()


def test_it_teaches_a_student_of_states(tmp_path: Path) -> None:
    teacher = ["--teacher", f"openvla:{CHECKPOINT}", "--teacher-kwargs", "image_size:224"]
    short = ["-n", "8", "--eval-freq", "0", "--eval-episodes", "1", "--n-eval-envs", "1", "--vec-env", "dummy"]
    params = ["-params", "n_envs:2", "n_steps:4", "batch_size:8"]
    env = ["--env", "PushCube-v1", "--env-kwargs", "max_episode_steps:5"]
    argv = ["--algo", "rpd_ppo", *env, *teacher, *short, "--no-video", "--no-progress"]
    assert train.main([*argv, "-f", str(tmp_path), *params]) == 0
    result = json.loads(next(tmp_path.glob("rpd_ppo/*/result.json")).read_text())
    assert result["labels_per_transition"] == 1.0
    assert result["teacher"]["n_episodes"] == 1
