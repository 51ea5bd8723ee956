"""Walkthrough: from a camera image to a folder that acts without simulator, VLA, PyTorch or this library.

    python examples/pixels_to_robot.py            # about ten minutes on two cores
    python examples/pixels_to_robot.py --short    # everything once, far too short to learn

The cells (# %%) open as a notebook in Jupyter, VS Code and PyCharm. It needs: pip install 'rpd_sb3[export,maniskill]'
"""

# %% Every step is a command; its last line of output is what it made.
from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

SHORT = "--short" in sys.argv
ENV = "PushCube-v1"


def run(*words: str) -> str:
    """``python -m words...``; returns the last line that it prints."""
    print("$ python -m", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, flush=True)
    return done.stdout.splitlines()[-1]


# %% Distil the scripted teacher into a small CNN that sees 64 x 64 pixels of the side-view camera, and nothing else.
short = [
    "-n",
    "64",
    "--n-envs",
    "2",
    "--eval-freq",
    "0",
    "--eval-episodes",
    "1",
    "--no-video",
    "--vec-env",
    "dummy",
    "-params",
    "n_steps:32",
    "n_epochs:1",
    "replay_batch_size:16",
]
student = run("rpd_sb3.train", "--algo", "rpd_ppo", "--env", ENV, "--obs", "rgb", *(short if SHORT else []))

# %% How did it go? One page.
run("rpd_sb3.report", student, "-o", "pixels_to_robot.html")

# %% Export it. The folder is refused unless its actions are those of the student on 256 observations.
expert = Path("pushcube_expert")
run("rpd_sb3.export", "--run", student, "-o", str(expert), "--overwrite")
manifest = json.loads((expert / "policy.json").read_text())
print(json.dumps(manifest["observation"], indent=2), json.dumps(manifest["action"], indent=2))

# %% Act. On a robot: `pip install numpy onnxruntime`, copy the folder, `from runtime import load`.
from rpd_sb3.export.runtime import load  # noqa: E402

policy = load(expert)
image = np.zeros((64, 64, 3), np.uint8)  # height, width, channels: the square of the camera's image in policy.json
print("an action for a black image:", policy(image))

# %% The same folder in the simulator.
run("rpd_sb3.evaluate", "--export", str(expert), *(["-n", "1", "--vec-env", "dummy"] if SHORT else ["-n", "50"]))
