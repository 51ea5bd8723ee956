"""The teacher service: what it costs to ask a teacher in another process, each figure as a ratio within one run.

    python benchmarks/serving.py            # about two minutes; writes benchmarks/results/serving.json, prints the table
    python benchmarks/serving.py --rounds 3

Transport: batches of 64 images of 256x256x3 bytes to a teacher that answers at once. Overlap and batching use teachers that
sleep, so that the figures are those of the service and not of a model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.teachers.remote.teacher import RemoteTeacher

RESULTS = Path(__file__).parent / "results" / "serving.json"
ACTION_SPACE = spaces.Box(-1.0, 1.0, (7,), np.float32)
IMAGES = (64, 256, 256, 3)
STEP = 0.05
"""Seconds of an environment step, and of the teacher that takes as long."""


class SleepingTeacher(LocalTeacher):
    """Answers zeros after ``seconds``, however many are asked."""

    def __init__(self, input_name: str, seconds: float) -> None:
        super().__init__()
        self.spec = TeacherSpec("sleeping", frozenset({"action"}), (input_name,), ACTION_SPACE)
        self.seconds = seconds

    def label(self, query: Query) -> Labels:
        if self.seconds:  # sleeping for 0 s takes a quarter of a millisecond
            time.sleep(self.seconds)
        return {"action": np.zeros((len(query.env_ids), 7), np.float32)}


class SleepingEnv(gym.Env):
    """A step takes ``STEP`` for all environments of the DummyVecEnv together."""

    observation_space = spaces.Box(-1.0, 1.0, (32,), np.float32)
    action_space = ACTION_SPACE

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        return np.zeros(32, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        time.sleep(self.seconds)
        return np.zeros(32, np.float32), 0.0, False, False, {}


@contextmanager
def service(input_name: str, seconds: float) -> Iterator[str]:
    """A service of a SleepingTeacher in a process of its own; its URL."""
    command = [sys.executable, __file__, "--serve", input_name, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()


def serve(input_name: str, seconds: float) -> None:
    """What the process of :func:`service` does: the parts of ``python -m rpd_sb3.serve``, with our teacher."""
    import uvicorn

    from rpd_sb3.serve.address import bind
    from rpd_sb3.serve.app import Service, make_app
    from rpd_sb3.serve.engine import Engine
    from rpd_sb3.serve.metrics import Metrics

    engine = Engine(lambda: SleepingTeacher(input_name, seconds), Metrics())
    listener = bind("127.0.0.1", 0)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(make_app(Service(engine, "teacher")), log_level="warning", access_log=False)).run(
        [listener]
    )


def per_second(work: Callable[[], Any], n: int) -> float:
    """How often ``work`` is done in a second."""
    start = time.perf_counter()
    for _ in range(n):
        work()
    return n / (time.perf_counter() - start)


def median_latency(work: Callable[[], Any], n: int) -> float:
    """Median seconds of one call."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def transport(rounds: int) -> dict[str, Any]:
    """Bytes per second of shared memory and HTTP, and the latency that they add, against memcpy and a call in this process."""
    images = np.random.default_rng(0).integers(0, 255, IMAGES, np.uint8)
    targets = cycle(
        [np.zeros_like(images) for _ in range(4)]
    )  # as many as the ring has slots, so as little fits a cache
    query = Query({"images.base": images}, np.arange(len(images)), np.ones(len(images), bool))
    local = SleepingTeacher("images.base", 0.0)
    rows: dict[str, list[float]] = {key: [] for key in ("memcpy", "shared", "http", "local_ms", "shared_ms", "http_ms")}
    with service("images.base", 0.0) as url:
        shared, http = (RemoteTeacher([url], shared_memory=flag) for flag in (True, False))

        def pipelined(teacher: RemoteTeacher, n: int) -> float:
            start = time.perf_counter()
            for answer in [teacher.submit(query) for _ in range(n)]:
                answer.result(60)
            return n / (time.perf_counter() - start)

        for teacher in (shared, http):
            pipelined(teacher, 8)
        for _ in range(rounds):
            rows["memcpy"].append(per_second(lambda: np.copyto(next(targets), images), 50) * images.nbytes / 1e9)
            rows["shared"].append(pipelined(shared, 200) * images.nbytes / 1e9)
            rows["http"].append(pipelined(http, 20) * images.nbytes / 1e9)
            rows["local_ms"].append(1e3 * median_latency(lambda: local.submit(query).result(), 50))
            rows["shared_ms"].append(1e3 * median_latency(lambda: shared.submit(query).result(), 50))
            rows["http_ms"].append(1e3 * median_latency(lambda: http.submit(query).result(), 20))
        shared.close()
        http.close()
    local.close()
    median = {key: statistics.median(values) for key, values in rows.items()}
    return {
        "batch": list(IMAGES),
        "gb_per_s": {key: median[key] for key in ("memcpy", "shared", "http")},
        "shared_to_memcpy": statistics.median(a / b for a, b in zip(rows["shared"], rows["memcpy"])),
        "added_latency_ms": {
            key: statistics.median(a - b for a, b in zip(rows[f"{key}_ms"], rows["local_ms"]))
            for key in ("shared", "http")
        },
        "rounds": rows,
    }


def overlap(rounds: int) -> dict[str, Any]:
    """Wall time of a rollout whose teacher takes as long as the environments, over the time of either."""
    n_steps, action = 20, np.zeros((1, 7), np.float32)
    found: dict[str, list[float]] = {"async": [], "blocking": []}
    with service("state", STEP) as url:
        teacher = RemoteTeacher([url])
        venv = VecTeacher(DummyVecEnv([lambda: SleepingEnv(STEP)]), teacher)
        for _ in range(rounds):
            venv.set_label_fraction(1.0)
            venv.reset()
            start = time.perf_counter()
            for info in [venv.step(action)[3][0] for _ in range(n_steps)]:
                np.asarray(info["teacher_action"])
            found["async"].append((time.perf_counter() - start) / (n_steps * STEP))
            venv.set_label_fraction(0.0)
            start = time.perf_counter()
            for _ in range(n_steps):
                venv.label()
                venv.step(action)
            found["blocking"].append((time.perf_counter() - start) / (n_steps * STEP))
        teacher.close()
    return {name: statistics.median(values) for name, values in found.items()} | {"rounds": found, "step_s": STEP}


def batching(rounds: int, n_clients: int = 8, rows: int = 64, seconds: float = STEP, n: int = 40) -> dict[str, Any]:
    """Labels per second of many clients with a share of the batch each, over those of one client with all of it."""
    found: list[float] = []
    single, many = [], []
    with service("state", seconds) as url:
        for _ in range(rounds):
            for clients, kept in ((1, single), (n_clients, many)):
                kept.append(_throughput(url, clients, rows // clients, n))
            found.append(many[-1] / single[-1])
    return {
        "ratio": statistics.median(found),
        "labels_per_s": {"1 client": statistics.median(single), f"{n_clients} clients": statistics.median(many)},
        "rounds": found,
        "teacher_s": seconds,
    }


def _throughput(url: str, clients: int, rows: int, n: int) -> float:
    context = multiprocessing.get_context("spawn")  # trainings are processes, too
    barrier = context.Barrier(clients + 1)
    processes = [context.Process(target=_client, args=(url, rows, n, barrier)) for _ in range(clients)]
    for process in processes:
        process.start()
    barrier.wait(120)
    start = time.perf_counter()
    barrier.wait(120)
    elapsed = time.perf_counter() - start
    for process in processes:
        process.join()
    return clients * rows * n / elapsed


def _client(url: str, rows: int, n: int, barrier: Any) -> None:
    teacher = RemoteTeacher([url])
    query = Query({"state": np.zeros((rows, 32), np.float32)}, np.arange(rows), np.ones(rows, bool))
    teacher.submit(query).result(60)
    barrier.wait(120)
    for _ in range(n):
        teacher.submit(query).result(60)
    barrier.wait(120)
    teacher.close()


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    moved, waits, batch = result["transport"], result["overlap"], result["batching"]
    speed, added = moved["gb_per_s"], moved["added_latency_ms"]
    return "\n".join(
        [
            "| | measured | floor |",
            "|---|---|---|",
            f"| shared memory, bytes/s over memcpy's | {moved['shared_to_memcpy']:.2f} "
            f"({speed['shared']:.1f} of {speed['memcpy']:.1f} GB/s) | 0.50 |",
            f"| HTTP on loopback | {speed['http']:.2f} GB/s | 0.50 GB/s |",
            f"| latency added by shared memory, p50 | {added['shared']:.1f} ms | 3 ms |",
            f"| latency added by HTTP, p50 | {added['http']:.1f} ms | |",
            f"| rollout over max(environment, teacher), asynchronous | {waits['async']:.2f} | 1.15 |",
            f"| the same, blocking | {waits['blocking']:.2f} | |",
            f"| 8 clients over 1 client, labels/s | {batch['ratio']:.2f} | 0.80 |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", nargs=2, metavar=("INPUT", "SECONDS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve[0], float(args.serve[1]))
        return
    th.set_num_threads(1)
    result = {
        "command": f"python benchmarks/serving.py --rounds {args.rounds}",
        "transport": transport(args.rounds),
        "overlap": overlap(args.rounds),
        "batching": batching(args.rounds),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
