"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_stock_ppo_reads_the_teachers_action_in_a_callback() -> None:
    command = [sys.executable, str(EXAMPLES / "stock_ppo_with_teacher.py"), "--timesteps", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if "teacher_distance" in line)
    assert 0.5 < float(line.split("|")[2]) < 4.0
