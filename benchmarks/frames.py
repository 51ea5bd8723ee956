"""What a frame costs on this machine, and a whole step with one: full and light visuals in one process, taking turns.

    python benchmarks/frames.py

Steps PickCube-v1 with both, a frame to each step, and renders frames alone, ten of each in turn, so that whatever else the
machine does meets both alike. Prints medians, and how many pixels differ by more than 16 of 255 levels.
The time of a frame is also given as the processor time of the process: on a machine that does other things, it is the
better guess at the time on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer

import numpy as np
import torch as th
from harness import machine

from rpd_sb3.envs import make_env
from rpd_sb3.envs.visuals import VISUALS, count_triangles
from rpd_sb3.teachers import make_teacher

BLOCK = 10
"""Frames, or steps, of one kind before it is the other's turn."""
RESULTS = Path(__file__).parent / "results" / "frames.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PickCube-v1")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each kind [20]")
    args = parser.parse_args()
    th.set_num_threads(1)
    records = [measure(args.env, size, args.rounds) for size in args.sizes]
    print("| side of the frame | frame, full | light | | whole step, full | light | pixels that differ |")
    print("|---|---|---|---|---|---|---|")
    for record in records:
        full, light = record["full"], record["light"]
        print(
            f"| {record['size']} px | {full['frame_ms']:.1f} ms | {light['frame_ms']:.1f} ms | {record['faster']:.1f} × | "
            f"{full['step_ms']:.1f} ms | {light['step_ms']:.1f} ms | {record['differs']:.1%} |"
        )
    content = {"command": shlex.join(["python", *sys.argv]), "env": args.env, "machine": machine(), "results": records}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def measure(env_id: str, size: int, rounds: int) -> dict[str, Any]:
    """Medians of one size of the frames.

    :param env_id: ManiSkill task
    :param size: side of the frame in pixels
    :param rounds: turns of each kind
    """
    teacher = make_teacher("scripted", env_id)
    envs = {
        name: make_env(env_id, obs="rgb", image_size=size, visuals=name, teacher=teacher.spec, on_success="continue")
        for name in VISUALS
    }
    teacher.close()
    actions = np.random.default_rng(0).uniform(-1, 1, (rounds, BLOCK, 7)).astype(np.float32)
    frames: dict[str, list[np.ndarray]] = {name: [env.reset(seed=0)[0]["rgb"]] for name, env in envs.items()}
    steps: dict[str, list[float]] = {name: [] for name in VISUALS}
    wall: dict[str, list[float]] = {name: [] for name in VISUALS}
    cpu: dict[str, list[float]] = {name: [] for name in VISUALS}
    for block in actions:
        for name, env in envs.items():
            taken = []
            for action in block:
                start = time.perf_counter()
                obs, _, terminated, truncated, _ = env.step(action)
                taken.append(time.perf_counter() - start)
                if terminated or truncated:
                    obs, _ = env.reset()
                frames[name].append(obs["rgb"])
            steps[name].append(statistics.median(taken))
        for name, env in envs.items():
            rendered = []
            for _ in range(BLOCK):
                start, cpu_start = time.perf_counter(), time.process_time()
                env.render_frame()  # type: ignore[attr-defined]
                rendered.append((time.perf_counter() - start, time.process_time() - cpu_start))
            wall[name].append(statistics.median(seconds for seconds, _ in rendered))
            cpu[name].append(statistics.median(seconds for _, seconds in rendered))
    full, light = (np.stack(frames[name]).astype(int) for name in VISUALS)
    record: dict[str, Any] = {
        "size": size,
        "faster": statistics.median(a / b for a, b in zip(wall["full"], wall["light"], strict=True)),
        "faster_cpu": statistics.median(a / b for a, b in zip(cpu["full"], cpu["light"], strict=True)),
        "differs": float((np.abs(full - light).max(-1) > 16).mean()),
    }
    for name, env in envs.items():
        record[name] = {
            "triangles": count_triangles(env.unwrapped.scene.sub_scenes[0]),  # type: ignore[attr-defined]
            "frame_ms": 1e3 * statistics.median(wall[name]),
            "frame_cpu_ms": 1e3 * statistics.median(cpu[name]),
            "frame_min_ms": 1e3 * min(wall[name]),
            "step_ms": 1e3 * statistics.median(steps[name]),
            "step_min_ms": 1e3 * min(steps[name]),
        }
        env.close()
    return record


if __name__ == "__main__":
    main()
