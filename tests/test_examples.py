"""The examples run, in their short mode."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *words: str, cwd: Path = ROOT) -> str:
    """What the example prints."""
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_ppo_reads_the_teachers_action_in_a_callback() -> None:
    out = run("stock_ppo_with_teacher.py", "--timesteps", "1024")
    line = next(line for line in out.splitlines() if "teacher_distance" in line)
    assert 0.5 < float(line.split("|")[2]) < 4.0


def test_walkthrough_of_a_noisy_teacher(tmp_path: Path) -> None:
    run("noisy_teacher.py", "--short", cwd=tmp_path)
    assert len(list((tmp_path / "logs").glob("*/PickCube-v1_*/result.json"))) == 3
    assert "</html>" in (tmp_path / "noisy_teacher.html").read_text()
    assert (tmp_path / "noisy_teacher.mp4").stat().st_size > 1000


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs the extra export")
def test_walkthrough_from_pixels_to_a_robot(tmp_path: Path) -> None:
    out = run("pixels_to_robot.py", "--short", cwd=tmp_path)
    assert "an action for a black image: [" in out
    assert "</html>" in (tmp_path / "pixels_to_robot.html").read_text()
    assert (tmp_path / "pushcube_expert" / "policy.onnx").is_file()
