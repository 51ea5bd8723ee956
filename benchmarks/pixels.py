"""Students that see one 128 x 128 image of the side-view camera and nothing else; sparse reward, scripted teacher.

    python benchmarks/pixels.py                                      # every cell of the README's table, 2 at a time
    python benchmarks/pixels.py --tasks PushCube-v1 --seeds 0 1 2    # some of them
    python benchmarks/pixels.py --tables-only                        # print the table from what is there

Each cell is one ``python -m rpd_sb3.train`` with one thread; cells that have a complete result.json are not trained again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from harness import Cell, Record, load, mean_and_range, run

RESULTS = Path(__file__).parent / "results" / "pixels.json"
TASKS = ("PushCube-v1", "PullCube-v1", "PickCube-v1")
STEPS = 16_000


def cell(algo: str, task: str, seed: int) -> Cell:
    """One student of one task."""
    arguments = ["--algo", algo, "--env", task, "--obs", "rgb", "-n", str(STEPS)]
    arguments += ["--eval-freq", "0", "--eval-episodes", "100", "--num-threads", "1"]
    return Cell("pixels", f"{algo} {task}", arguments, seed)


def table(records: list[Record]) -> str:
    """Markdown: mean success over seeds, range in brackets."""
    lines = ["| task | teacher | PPO | RPD | env steps | training time | seeds |", "|---|---|---|---|---|---|---|"]
    for task in TASKS:
        rpd = [r["result"] for r in records if r["label"] == f"rpd_ppo {task}"]
        ppo = [r["result"] for r in records if r["label"] == f"ppo {task}"]
        if not rpd:
            continue
        success = [mean_and_range([r["student"]["success_once"] for r in runs]) if runs else "-" for runs in (ppo, rpd)]
        teacher = statistics.mean(r["teacher"]["success_once"] for r in rpd)
        minutes = statistics.mean(r["wall_s"] for r in rpd) / 60
        seeds = f"{len(rpd)} (PPO {len(ppo)})"
        steps = f"{rpd[0]['timesteps']:,}"
        lines.append(
            f"| {task} | {teacher:.0%} | {success[0]} | {success[1]} | {steps} | {minutes:.0f} min | {seeds} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--algos", nargs="+", default=["rpd_ppo", "ppo"], choices=("rpd_ppo", "ppo"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--root", type=Path, default=Path("logs/benchmark"), help="where the run folders go")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    if args.tables_only:
        print(table(load(RESULTS)))
        return
    cells = [cell(algo, task, seed) for seed in args.seeds for algo in args.algos for task in args.tasks]
    print(table(run(cells, args.root, RESULTS, args.jobs)))


if __name__ == "__main__":
    main()
