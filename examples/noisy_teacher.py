"""Walkthrough: a student that learns from a teacher that mostly fails, and the page that shows it.

    python examples/noisy_teacher.py            # about ten minutes on two cores
    python examples/noisy_teacher.py --short    # everything once, far too short to learn

The cells (# %%) open as a notebook in Jupyter, VS Code and PyCharm.
"""

# %% Every step is a command; its last line of output is what it made.
from __future__ import annotations

import shlex
import subprocess
import sys

SHORT = "--short" in sys.argv
ENV = "PickCube-v1"


def run(*words: str) -> str:
    """``python -m words...``; returns the last line that it prints."""
    print("$ python -m", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    return done.stdout.splitlines()[-1]


# %% The teacher sees the simulator's state, but its actions carry so much noise that it succeeds in every tenth episode.
here = ["--vec-env", "dummy"] if SHORT else []  # workers would take longer to start than to work
evaluation = ["--eval-episodes", "2", "--eval-freq", "0", "--no-video"] if SHORT else ["--eval-freq", "10000"]
run(
    "rpd_sb3.evaluate",
    "--teacher",
    "scripted",
    "--teacher-kwargs",
    "noise:0.3",
    "--env",
    ENV,
    "-n",
    "2" if SHORT else "50",
    *here,
)

# %% Distil it, with two seeds. The section of zoo_configs/rpd_ppo.yml names the teacher and all hyper-parameters.
steps = "128" if SHORT else "40000"
small = ["--n-envs", "2", "-params", "n_steps:32", "batch_size:64"] if SHORT else []
student = [
    "rpd_sb3.train",
    "--algo",
    "rpd_ppo",
    "--env",
    ENV,
    "--section",
    "noisy-teacher",
    "-n",
    steps,
    *evaluation,
    *here,
]
students = [run(*student, "--seed", seed, *small) for seed in ("0", "1")]

# %% What reward alone would have done in as many steps.
baseline = run("rpd_sb3.train", "--algo", "ppo", "--env", ENV, "-n", steps, *evaluation, *here, *small)

# %% One page: learning curves over the seeds, success with intervals, agreement with the teacher, both videos.
run("rpd_sb3.report", *students, baseline, "-o", "noisy_teacher.html")

# %% Watch the student once more, on episodes that nobody has seen.
run(
    "rpd_sb3.enjoy", "--run", students[0], "--seed", "500", "-n", "1" if SHORT else "5", "--record", "noisy_teacher.mp4"
)
