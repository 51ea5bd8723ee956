"""PPO and RPD on the paper's tasks, sparse reward, state observations: trains every cell of the README's tables.

    python benchmarks/distillation.py                      # everything: 6 tasks, 2 algorithms, 3 seeds, 2 at a time
    python benchmarks/distillation.py --rows weak-teachers # PickCube with a noisy and with a biased teacher
    python benchmarks/distillation.py --tables-only        # print the tables from what is there

Each cell is one ``python -m rpd_sb3.train`` in a folder of its own; cells that have a complete result.json are not
trained again. Results are collected in benchmarks/results/distillation.json, which the tables are made from.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from harness import Cell, mean_and_range, run

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "distillation.json"
TASKS = ("LiftPegUpright-v1", "PickCube-v1", "PullCube-v1", "PushCube-v1", "RollBall-v1", "StackCube-v1")
"""The tasks that the paper trained on."""
COMMON = ["--eval-freq", "50000", "--eval-episodes", "100"]


def cells(rows: list[str], tasks: list[str], algos: list[str], seeds: int) -> list[Cell]:
    """Every training run of the tables, seed by seed, so that an interrupted benchmark is still a table."""
    found = []
    for seed in range(seeds):
        if "weak-teachers" in rows:
            for section in ("noisy-teacher", "biased-teacher"):
                arguments = ["--algo", "rpd_ppo", "--env", "PickCube-v1", "--section", section, *COMMON]
                found.append(Cell("weak-teachers", section, arguments, seed))
        if "tasks" in rows:
            for task in tasks:
                for algo in algos:
                    arguments = ["--algo", algo, "--env", task, "-n", "100000", *COMMON]
                    found.append(Cell("tasks", f"{algo} {task}", arguments, seed))
    return found


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
    todo = [] if args.tables_only else cells(args.rows, args.tasks, args.algos, args.seeds)
    print(tables(run(todo, args.root, RESULTS, args.jobs)))


if __name__ == "__main__":
    main()
