"""PPO and RPD on the paper's tasks, sparse reward, state observations: trains every cell of the README's tables.

    python benchmarks/distillation.py                      # everything: 6 tasks, 2 algorithms, 3 seeds, 2 at a time
    python benchmarks/distillation.py --rows weak-teachers # PickCube with a noisy and with a biased teacher
    python benchmarks/distillation.py --tables-only        # print the tables from what is there

Each cell is one ``python -m rpd_sb3.train`` in a folder of its own; cells that have a complete result.json are not
trained again. Results are collected in benchmarks/results/distillation.json, which the tables are made from.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "distillation.json"
TASKS = ("LiftPegUpright-v1", "PickCube-v1", "PullCube-v1", "PushCube-v1", "RollBall-v1", "StackCube-v1")
"""The tasks that the paper trained on."""
COMMON = ["--eval-freq", "50000", "--eval-episodes", "100", "--no-video", "--no-progress"]


class Cell(NamedTuple):
    """One training run."""

    row: str
    label: str
    arguments: list[str]
    seed: int

    @property
    def folder(self) -> str:
        return f"{self.row}/{self.label.replace(' ', '_')}/seed{self.seed}"

    @property
    def command(self) -> list[str]:
        return ["-m", "rpd_sb3.train", *self.arguments, "--seed", str(self.seed), *COMMON]


def cells(rows: list[str], tasks: list[str], algos: list[str], seeds: int) -> list[Cell]:
    """Every training run of the tables, seed by seed, so that an interrupted benchmark is still a table."""
    found = []
    for seed in range(seeds):
        if "weak-teachers" in rows:
            for section in ("noisy-teacher", "biased-teacher"):
                arguments = ["--algo", "rpd_ppo", "--env", "PickCube-v1", "--section", section]
                found.append(Cell("weak-teachers", section, arguments, seed))
        if "tasks" in rows:
            for task in tasks:
                for algo in algos:
                    arguments = ["--algo", algo, "--env", task, "-n", "100000"]
                    found.append(Cell("tasks", f"{algo} {task}", arguments, seed))
    return found


def complete_result(folder: Path) -> dict[str, Any] | None:
    """The result of the run in this folder that went to its end; None if there is none yet."""
    results = [json.loads(path.read_text()) for path in folder.glob("*/*/result.json")]
    return next((result for result in results if result["complete"]), None)


def train(cell: Cell, root: Path) -> dict[str, Any]:
    """Train one cell unless that is done already; its result.json and evaluation curve."""
    folder = root / cell.folder
    result = complete_result(folder)
    if result is None:
        command = [sys.executable, *cell.command, "-f", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        result = complete_result(folder)
        assert result is not None, "a run that ends well has a complete result.json"
    command = shlex.join(["python", *cell.command])
    print(f"{cell.folder}: {result['student']['success_once']:.0%} in {result['wall_s']:.0f} s", flush=True)
    return {"row": cell.row, "label": cell.label, "seed": cell.seed, "command": command, "result": result}


def mean_and_range(values: list[float]) -> str:
    """``93 % (88 to 97)``"""
    return f"{statistics.mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def tables(records: list[dict[str, Any]]) -> str:
    """Markdown tables: mean success over seeds, range in brackets."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["row"], record["label"]), []).append(record["result"])

    def success(key: tuple[str, str]) -> str:
        return mean_and_range([r["student"]["success_once"] for r in groups[key]]) if key in groups else "-"

    def teacher(key: tuple[str, str]) -> str:
        return mean_and_range([r["teacher"]["success_once"] for r in groups[key]]) if key in groups else "-"

    lines = ["| task | teacher | PPO | RPD | seeds |", "|---|---|---|---|---|"]
    for task in TASKS:
        ppo, rpd = ("tasks", f"ppo {task}"), ("tasks", f"rpd_ppo {task}")
        if ppo in groups or rpd in groups:
            seeds = max(len(groups.get(ppo, [])), len(groups.get(rpd, [])))
            lines.append(f"| {task} | {teacher(rpd)} | {success(ppo)} | {success(rpd)} | {seeds} |")
    lines += [
        "",
        "| teacher | its success | student | env steps | training time | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for section in ("noisy-teacher", "biased-teacher"):
        key = ("weak-teachers", section)
        if key in groups:
            runs = groups[key]
            wall = statistics.mean(r["wall_s"] for r in runs)
            steps = f"{runs[0]['timesteps']:,}"
            lines.append(f"| {section} | {teacher(key)} | {success(key)} | {steps} | {wall:.0f} s | {len(runs)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["weak-teachers", "tasks"], choices=("weak-teachers", "tasks"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--algos", nargs="+", default=["rpd_ppo", "ppo"], choices=("rpd_ppo", "ppo"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--root", type=Path, default=Path("logs/benchmark"), help="where the run folders go")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    if not args.tables_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            todo = cells(args.rows, args.tasks, args.algos, args.seeds)
            for record in pool.map(lambda cell: train(cell, args.root), todo):
                same = ("row", "label", "seed")
                records = [r for r in records if any(r[key] != record[key] for key in same)] + [record]
                RESULTS.parent.mkdir(exist_ok=True)
                RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    print(tables(records))


if __name__ == "__main__":
    main()
