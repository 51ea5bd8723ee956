"""What networks learn from the same labelled images in the same time: the error of actions in episodes that were left out.

    python benchmarks/networks.py

Collects the images first, 640 episodes of PickCube with a noisy teacher, if the file is not there. Then each network learns, one
after the other, in one thread for as many seconds of processor time, on every episode but each sixteenth. Optimizer, learning rate
and heads are those of the sections ``<task>-rgb``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gradients import LEARNING_RATE, make_policy
from harness import machine
from stable_baselines3.common.torch_layers import NatureCNN

from rpd_sb3.demos.files import load
from rpd_sb3.students import CompactCNN, KeypointCNN

RESULTS = Path(__file__).parent / "results" / "networks.json"
NETWORKS: dict[str, tuple[type, dict[str, Any]]] = {
    "CompactCNN": (CompactCNN, {}),
    "CompactCNN, 32 channels": (CompactCNN, {"n_channels": 32}),
    "Nature": (NatureCNN, {"features_dim": 256}),
    "KeypointCNN": (KeypointCNN, {}),
    "KeypointCNN, 16 channels": (KeypointCNN, {"n_channels": 16}),
    "KeypointCNN, 16 points": (KeypointCNN, {"n_points": 16}),
}
COLLECT = ["--env", "PickCube-v1", "--teacher", "scripted", "--noise", "0.3", "-n", "640"]
COLLECT += ["--env-kwargs", "obs:rgb", "crop:[0.25,0.43,0.5]", "image_size:64"]
BATCH = 64
HELD_OUT = 16
"""One episode of so many is not trained on."""


def fit(network: str, images: th.Tensor, labels: th.Tensor, held_out: th.Tensor, seconds: float) -> dict[str, Any]:
    """Regress labels on images.

    :param images: ``(n, 3, H, W)`` uint8
    :param labels: ``(n, A)``
    :param held_out: ``(n,)`` bool
    :param seconds: of processor time
    """
    th.manual_seed(0)
    extractor, kwargs = NETWORKS[network]
    policy = make_policy(extractor, tuple(images.shape[1:]), **kwargs)

    def error(rows: th.Tensor) -> th.Tensor:
        return (policy.get_distribution(images[rows]).mode() - labels[rows]).square().mean()

    train, test = th.nonzero(~held_out).flatten(), th.nonzero(held_out).flatten()
    n_gradients, start = 0, time.process_time()
    while (progress := (time.process_time() - start) / seconds) < 1:
        for group in policy.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + np.cos(np.pi * progress)) / 2
        policy.optimizer.zero_grad()
        error(train[th.randint(len(train), (BATCH,))]).backward()
        th.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy.optimizer.step()
        n_gradients += 1
    with th.no_grad():
        errors = [error(rows).item() * len(rows) for rows in test.split(512)]
    return {
        "network": network,
        "weights": sum(p.numel() for p in policy.features_extractor.parameters()),
        "gradients": n_gradients,
        "error": sum(errors) / len(test),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demos", type=Path, default=Path("logs/benchmark/pick.npz"), help="images and labels [%(default)s]"
    )
    parser.add_argument("--seconds", type=float, default=100.0)
    args = parser.parse_args()
    th.set_num_threads(1)
    if not args.demos.is_file():
        args.demos.parent.mkdir(parents=True, exist_ok=True)
        collect = [sys.executable, "-m", "rpd_sb3.collect", *COLLECT, "--out", str(args.demos)]
        subprocess.run(collect, check=True)
    demos = load(args.demos)
    assert isinstance(demos.observations, np.ndarray), "images alone: obs:rgb"
    images = th.from_numpy(np.ascontiguousarray(np.moveaxis(demos.observations, -1, 1)))
    held_out = th.from_numpy(demos.episode_starts.cumsum() % HELD_OUT == 0)
    print("| network | its weights | gradients of 64 | mean squared error, held out |\n|---|---|---|---|")
    rows = []
    for network in NETWORKS:
        row = fit(network, images, th.from_numpy(demos.actions), held_out, args.seconds)
        rows.append(row)
        print(f"| {network} | {row['weights']:,} | {row['gradients']:,} | {row['error']:.3f} |", flush=True)
    content = {
        "command": shlex.join(["python", *sys.argv]),
        "demos": demos.metadata,
        "machine": machine(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
