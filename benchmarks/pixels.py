"""Students that see one 128 x 128 image of the side-view camera and nothing else; sparse reward.

    python benchmarks/pixels.py                                       # every cell of the README's table, 2 at a time
    python benchmarks/pixels.py --rows "rpd_ppo PushCube-v1" camera   # some rows
    python benchmarks/pixels.py --tables-only                         # print the table from what is there

Each cell is one ``python -m rpd_sb3.train`` with one thread; cells that have a complete result.json are not trained again.
The teachers are the scripted experts. In the row ``camera`` it is the student of PushCube, seed 0, on a camera that has moved; a
first run imitates it, a second one goes on with the reward.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from harness import Cell, Record, complete_run, load, mean_and_range, run

RESULTS = Path(__file__).parent / "results" / "pixels.json"
CAMERA = "camera"
ROWS = {
    "rpd_ppo PushCube-v1": (0, 1, 2),
    "rpd_ppo PullCube-v1": (0,),
    "rpd_ppo PickCube-v1": (0,),
    "ppo PushCube-v1": (0,),
    "ppo PullCube-v1": (0,),
    CAMERA: (0,),
}
"""Algorithm and task, and the seeds; the row of the camera comes after that of its teacher."""
STEPS = {"PushCube-v1": 16_000, "PullCube-v1": 16_000, "PickCube-v1": 32_000}
COMMON = ["--eval-freq", "0", "--eval-episodes", "100", "--num-threads", "1"]


def cell(label: str, seed: int) -> Cell:
    """One student of one task."""
    algo, task = label.split()
    arguments = ["--algo", algo, "--env", task, "--obs", "rgb", "-n", str(STEPS[task])]
    return Cell("pixels", label, arguments + COMMON, seed)


def train_on_moved_camera(root: Path, seeds: tuple[int, ...], jobs: int) -> list[Record]:
    """Students whose teacher knows another camera: imitation, then reward."""
    teacher = complete_run(cell("rpd_ppo PushCube-v1", 0), root)
    if teacher is None:
        raise SystemExit(
            f"error: row {CAMERA} needs its teacher, seed 0 of 'rpd_ppo PushCube-v1', in {root}; train it first"
        )
    task = ["--algo", "rpd_ppo", "--env", "PushCube-v1", "--teacher", f"sb3:{teacher / 'best_model.zip'}"]
    records = []
    for seed in seeds:
        imitation = Cell("pixels", f"{CAMERA} imitation", [*task, "--section", "moved-camera", *COMMON], seed)
        run([imitation], root, RESULTS, jobs)
        start = complete_run(imitation, root)
        assert start is not None
        reward = ["--section", "moved-camera-reward", "-params", f"warm_start:{start / 'best_model.zip'}"]
        records = run([Cell("pixels", CAMERA, [*task, *reward, *COMMON], seed)], root, RESULTS, jobs)
    return records


def table(records: list[Record]) -> str:
    """Markdown: mean success over seeds, range in brackets."""
    lines = ["| task | teacher | PPO | RPD | env steps | training time | seeds |", "|---|---|---|---|---|---|---|"]
    rows = {task: (f"rpd_ppo {task}", f"ppo {task}") for task in STEPS}
    rows |= {"PushCube-v1, moved camera": (f"{CAMERA} imitation", "-"), "the same, then reward": (CAMERA, "-")}
    for task, labels in rows.items():
        rpd, ppo = ([r["result"] for r in records if r["label"] == label] for label in labels)
        if not rpd:
            continue
        teacher = statistics.mean(r["teacher"]["success_once"] for r in rpd)
        minutes = statistics.mean(r["wall_s"] for r in rpd) / 60
        cells = [task, f"{teacher:.0%}", _success(ppo), _success(rpd), f"{rpd[0]['timesteps']:,}", f"{minutes:.0f} min"]
        lines.append(f"| {' | '.join(cells)} | {len(rpd)}{f' (PPO {len(ppo)})' if ppo else ''} |")
    return "\n".join(lines)


def _success(results: list[Record]) -> str:
    rates = [result["student"]["success_once"] for result in results]
    return mean_and_range(rates) if len(rates) > 1 else f"{rates[0]:.0%}" if rates else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of those of the README's table")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--root", type=Path, default=Path("logs/benchmark"), help="where the run folders go")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    if args.tables_only:
        print(table(load(RESULTS)))
        return
    seeds = {row: tuple(args.seeds or ROWS[row]) for row in args.rows}
    records = run(
        [cell(row, seed) for row in seeds if row != CAMERA for seed in seeds[row]], args.root, RESULTS, args.jobs
    )
    if CAMERA in seeds:
        records = train_on_moved_camera(args.root, seeds[CAMERA], args.jobs)
    print(table(records))


if __name__ == "__main__":
    main()
