"""What one image gradient costs: forward and backward of a student, and how precision, layout and compiler change it.

    python benchmarks/gradients.py

measures all that this machine can do and prints a Markdown table; the numbers, the command and the machine go to
``results/gradients.json``, of which ``--show`` prints the table alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from harness import machine
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.utils import ConstantSchedule

from rpd_sb3.students import CompactCNN, KeypointCNN

RESULTS = Path(__file__).parent / "results" / "gradients.json"
NETWORKS = {"KeypointCNN": KeypointCNN, "CompactCNN": CompactCNN}
BATCH = 64
LEARNING_RATE = 2e-3
"""Of the sections ``<task>-rgb``, at the beginning."""
BUDGET = 3.0
"""Seconds for each cell after its warm-up; at least three steps are measured, or the first one if that takes longer."""
WARM_UP = 2
"""Steps that are not measured."""


def make_policy(extractor: type, image_shape: tuple[int, ...], **kwargs: Any) -> Any:
    """The student of the sections ``<task>-rgb``: an image network and two heads of 256, 256.

    :param extractor: of features
    :param image_shape: channels first
    :param kwargs: of the extractor
    """
    return ActorCriticCnnPolicy(
        spaces.Box(0, 255, image_shape, np.uint8),
        spaces.Box(-1, 1, (7,), np.float32),
        ConstantSchedule(LEARNING_RATE),
        net_arch=[256, 256],
        activation_fn=th.nn.ReLU,
        features_extractor_class=extractor,
        features_extractor_kwargs=kwargs,
        optimizer_class=th.optim.AdamW,
        optimizer_kwargs={"weight_decay": 1e-4},
    )


def measure(network: str, pixels: int, threads: int, precision: str, layout: str, compiled: bool, device: str) -> float:
    """Median milliseconds for each image of one optimizer step on a replayed batch.

    :param layout: in which the uint8 batch arrives; the network itself always computes channels last
    """
    th.set_num_threads(threads)
    th.manual_seed(0)
    policy = make_policy(NETWORKS[network], (3, pixels, pixels)).to(device)
    batch = th.randint(0, 256, (BATCH, 3, pixels, pixels), dtype=th.uint8, device=device)
    if layout == "channels last":
        batch = batch.contiguous(memory_format=th.channels_last)
    labels = th.rand(BATCH, 7, device=device) * 2 - 1
    if compiled:
        policy.features_extractor.forward = th.compile(policy.features_extractor.forward)

    def step() -> None:
        with th.autocast(device, dtype=th.bfloat16) if precision == "bf16" else nullcontext():
            loss = (policy.get_distribution(batch).mode() - labels).square().mean()
        policy.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        policy.optimizer.step()
        if device == "cuda":
            th.cuda.synchronize()

    times: list[float] = []
    until = float("inf")
    for i in itertools.count():
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
        if i == 0 and times[0] > BUDGET and not compiled:  # slow without doubt
            break
        if i == WARM_UP - 1:
            times, until = [], time.perf_counter() + BUDGET
        if i >= WARM_UP + 2 and (time.perf_counter() > until or len(times) >= 50):
            break
    return round(1000 * statistics.median(times) / BATCH, 4)


def cells(device: str, threads: list[int]) -> list[tuple[str, int, int, str, str, bool]]:
    """Network, pixels, threads, precision, layout and whether it is compiled: one change at a time."""
    kinds = [("fp32", "channels first", False), ("fp32", "channels last", False)]
    kinds += [("bf16", "channels first", False), ("fp32", "channels first", True)]
    if device == "cuda":
        kinds.append(("bf16", "channels first", True))
    return [(*place, *kind) for *place, kind in itertools.product(NETWORKS, (64, 96, 128), threads, kinds)]


def table(content: dict[str, Any]) -> str:
    """The numbers as Markdown, a row for each network, size and number of threads."""
    names = list(dict.fromkeys(row["kind"] for row in content["rows"]))
    lines = ["| network, pixels, threads | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for key in dict.fromkeys(tuple(row["place"]) for row in content["rows"]):
        found = {row["kind"]: row["ms"] for row in content["rows"] if tuple(row["place"]) == key}
        shown = ["-" if (ms := found.get(name)) is None else f"{ms:.2f}" for name in names]
        lines.append(f"| {', '.join(map(str, key))} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--show", action="store_true", help="print the table of the results there are")
    args = parser.parse_args()
    if not args.show:
        rows = []
        for network, pixels, threads, precision, layout, compiled in cells(args.device, args.threads):
            kind = ", ".join([precision, layout, *(["compiled"] if compiled else [])])
            try:
                ms = measure(network, pixels, threads, precision, layout, compiled, args.device)
            except RuntimeError as error:  # no compiler, or one without headers
                if not compiled:
                    raise
                print(f"{kind}: {str(error).splitlines()[0]}", file=sys.stderr)
                ms = None
            rows.append({"place": [network, pixels, threads], "kind": kind, "ms": ms})
            print(rows[-1], flush=True)
        content = {
            "command": " ".join(["python", *sys.argv]),
            "device": args.device,
            "machine": machine(),
            "rows": rows,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
