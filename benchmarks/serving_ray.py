"""Labels per second of one replica and of two behind Ray Serve, with a teacher that keeps a core busy.

    python benchmarks/serving_ray.py

Each label costs the teacher the same work, 20 ms of an idle core, whatever the batch; clients in threads of this process
ask for four labels at a time, as a training run with four environments does. The ratio says how well two replicas use
two cores, which they share with Ray's proxy and the clients: run it on an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gymnasium import spaces
from harness import service

from rpd_sb3.contract.cores import n_cores
from rpd_sb3.contract.teacher import Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.teachers.remote.teacher import RemoteTeacher

RESULTS = Path(__file__).parent / "results" / "serving_ray.json"
COST = 0.02
"""Seconds of an idle core for one label."""


class BusyTeacher(LocalTeacher):
    """Works for each row, one after the other.

    :param times: argument of ``work``
    """

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times
        box = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.spec = TeacherSpec("busy", frozenset({"action"}), ("state",), box, input_shapes={"state": (2,)})

    def label(self, query: Query) -> Labels:
        for _ in query.env_ids:
            work(self.times)
        return {"action": query.inputs["state"]}


def work(times: int) -> None:
    """NumPy in one thread and without the interpreter's lock, like most of a model's work."""
    values = np.linspace(-3.0, 3.0, 20_000)
    for _ in range(times):
        np.tanh(values, out=values)


def calibrate() -> int:
    """Argument of ``work`` that takes COST seconds: from the fastest of many runs, which nothing has interrupted."""
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        work(10)
        seconds.append(time.perf_counter() - start)
    return round(10 * COST / min(seconds))


def ask(url: str, rows: int, start: float, end: float) -> int:
    """Ask for labels until the end, and count those that came after the start, in ``time.monotonic()``'s seconds."""
    teacher = RemoteTeacher([url])
    query = Query({"state": np.zeros((rows, 2), np.float32)}, np.arange(rows), np.zeros(rows, bool))
    labels = 0
    while time.monotonic() < end:
        teacher.submit(query).result()
        labels += rows * (start <= time.monotonic() < end)
    teacher.close()
    return labels


def measure(replicas: int, times: int, args: argparse.Namespace) -> float:
    """Labels per second of all clients together."""
    options = ["--engine", "ray", "--replicas", str(replicas), "--port", "0", "--max-batch", str(args.rows)]
    teacher = ["--teacher", "serving_ray:BusyTeacher", "--teacher-kwargs", f"times:{times}"]
    with service(*options, *teacher) as url:
        start = time.monotonic() + args.warm_up
        with ThreadPoolExecutor(args.clients) as pool:
            end = start + args.seconds
            counts = list(pool.map(lambda _: ask(url, args.rows, start, end), range(args.clients)))
    return sum(counts) / args.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    times = calibrate()
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for replicas, values in rates.items():
            values.append(measure(replicas, times, args))
    one, two = (statistics.median(values) for values in rates.values())
    print("| replicas | labels/s |\n|---|---|")
    print(f"| 1 | {one:.1f} |\n| 2 | {two:.1f} |\n| ratio | {two / one:.2f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"cores": n_cores(), "load": os.getloadavg()[0], "labels_per_second": rates, "ratio": two / one}
    RESULTS.write_text(json.dumps(vars(args) | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
