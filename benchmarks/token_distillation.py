"""Action tokens on PickCube and PushCube, sparse reward, state observations: the tables of docs/tokens.md.

    python benchmarks/token_distillation.py                     # everything, about 3 hours, 2 runs at a time
    python benchmarks/token_distillation.py --rows divergence   # one table
    python benchmarks/token_distillation.py --tables-only       # print the tables from what is there

Each cell is one ``python -m rpd_sb3.train``; its command is in benchmarks/results/token_distillation.json. Rows that begin
with a warm start record demonstrations and clone them first.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from harness import Cell, Record, load, mean_and_range, run, trained

RESULTS = Path(__file__).parent / "results" / "token_distillation.json"
RARELY = ["--eval-freq", "10000", "--eval-episodes", "24", "--vec-env", "dummy"]
ONCE = ["--eval-freq", "30000", "--eval-episodes", "100", "--vec-env", "dummy"]
"""At the beginning and at the end."""
OFTEN = ["--eval-freq", "2560", "--eval-episodes", "24", "--vec-env", "dummy"]
COLUMNS = (
    "success_rate",
    "student_entropy",
    "teacher_entropy",
    "reverse_kl",
    "forward_kl",
    "top1_agreement",
    "mean_weight",
    "mean_abs_weight",
    "clipped_weights",
    "critic_agreement",
    "distill_kl",
)
"""What is kept of progress.csv; success_rate is that of the last 100 training episodes, which sample their tokens."""
WARM = {"PickCube-v1": ("500", "500000"), "PushCube-v1": ("60", "100000")}
"""Demonstrations and transitions to train on, so that the student half-works."""
DIVERGENCES = ("reverse_kl", "forward_kl", "hard_ce", "jsd")


def opd(*params: str, env: str = "PickCube-v1", n: int = 20_000) -> list[str]:
    """Arguments of a run of OPD."""
    arguments = ["--algo", "opd", "--env", env, "-n", str(n), *OFTEN]
    return [*arguments, "-params", *params] if params else arguments


def divergence_cells(seed: int, root: Path) -> list[Cell]:
    long = {"hard_ce": 30_000}
    full = [Cell("divergence", name, opd(f"divergence:{name}", n=long.get(name, 20_000)), seed) for name in DIVERGENCES]
    return [*full, Cell("divergence", "reverse_kl sampled", opd("estimator:sampled", n=30_000), seed)]


def floor_cells(seed: int, root: Path) -> list[Cell]:
    """A sharp teacher, std 0.02: about four bins wide."""
    sharp = "teacher_kwargs.std:0.02"
    return [
        Cell("floor", floor, opd(sharp, f"teacher_floor:{floor}"), seed) for floor in ("0.0", "0.001", "0.01", "0.1")
    ]


def mind_cells(seed: int, root: Path) -> list[Cell]:
    """A teacher of two minds, whose tokens are scored one by one."""
    two = ("teacher_kwargs.detour:0.5", "teacher_kwargs.autoregressive:false")
    return [Cell("two minds", name, opd(f"divergence:{name}", *two), seed) for name in DIVERGENCES]


def group_cells(seed: int, root: Path) -> list[Cell]:
    return [
        Cell("groups", f"G = {size}", opd(f"group_size:{size}", "n_envs:32", "n_steps:50"), seed)
        for size in (1, 2, 4, 8)
    ]


def warm_start(env: str, root: Path) -> Path:
    """A student that half-works: a clone of a slightly noisy teacher."""
    n_demos, n_transitions = WARM[env]
    folder = root / "warm" / env
    models = folder / "sft" / f"{env}_1" / f"{env}.zip"
    if not models.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        demos = str(folder / "demos.npz")
        record = ["--env", env, "--teacher", "scripted", "--teacher-kwargs", "noise:0.1", "-n", n_demos, "--out", demos]
        clone = [
            "--algo",
            "sft",
            "--env",
            env,
            "-n",
            n_transitions,
            "--eval-freq",
            "0",
            "--eval-episodes",
            "100",
            "--no-video",
        ]
        params = ["-f", str(folder), "-params", f"demonstrations:{demos}"]
        for command in (["rpd_sb3.collect", *record, "--overwrite"], ["rpd_sb3.train", *clone, *params]):
            subprocess.run([sys.executable, "-m", *command], check=True)
    return models


def then_cells(seed: int, root: Path) -> list[Cell]:
    """All from the same warm start: the teacher, the reward, and one after the other."""
    params = ["-params", f"warm_start:{warm_start('PickCube-v1', root)}"]
    sizes = [
        "group_size:4",
        "n_envs:32",
        "n_steps:50",
        "batch_size:100",
        "then:grpo",
        "then_on:step",
        "then_value:12000",
    ]
    grpo = ["--algo", "grpo", "--env", "PickCube-v1", "-n", "60000", *RARELY]
    return [
        Cell("then", "OPD", [*opd(n=15_000), *params], seed),
        Cell(
            "then",
            "OPD then GRPO",
            [*opd(n=30_000), *params, *sizes, "reward_learning_rate:5e-5", "target_kl:0.03"],
            seed,
        ),
        Cell("then", "GRPO", [*grpo, *params], seed),
    ]


def road_cells(env: str, seed: int, root: Path) -> list[Cell]:
    """PPO and ROAD from the same warm start at equal steps; the reference critic is that of the PPO run."""
    row = f"road {env.partition('-')[0]}"
    start = f"warm_start:{warm_start(env, root)}"
    common = ["--env", env, "-n", "30000", *ONCE]
    ppo = Cell(row, "PPO", ["--algo", "ppo", *common, "--section", "tokens", "-params", start], seed)
    run_folder = trained(ppo, root)
    variants = {
        "ROAD": (),
        "JSD": ("divergence:jsd",),
        "no gate": ("gate:false",),
        "positive only": ("positive_only:true",),
        "alpha 0": ("alpha:0",),
        "alpha 1": ("alpha:1",),
        "Algorithm 1": ("ppo_coef:0", "token_reduction:sum"),
    }
    found = [ppo]
    for name, changes in variants.items():
        params = ["-params", start, f"reference:{run_folder / env}.zip", "alpha:0.5", *changes]
        found.append(Cell(row, name, ["--algo", "road", *common, *params], seed))
    return found


def ppd_cells(seed: int, root: Path) -> list[Cell]:
    """Continuous actions: a teacher of one mind, and one of two, as the Gaussian of ten samples."""
    ppd = ["--algo", "ppd", "--env", "PickCube-v1", "-n", "30000", *RARELY]
    return [
        Cell("ppd", f"{direction}, {name}", [*ppd, "-params", f"direction:{direction}", *changes], seed)
        for direction in ("forward", "reverse")
        for name, changes in {"one mind": (), "two minds": ("teacher_kwargs.detour:0.5",)}.items()
    ]


ROWS: dict[str, Callable[[int, Path], list[Cell]]] = {
    "divergence": divergence_cells,
    "floor": floor_cells,
    "two minds": mind_cells,
    "then": then_cells,
    "ppd": ppd_cells,
    "road PickCube": partial(road_cells, "PickCube-v1"),
    "road PushCube": partial(road_cells, "PushCube-v1"),
    "groups": group_cells,
}


def extra(folder: Path) -> Record:
    """Success and logged values along training."""
    with np.load(folder / "evaluations.npz") as file:
        curve = {"timesteps": file["timesteps"].tolist(), "success": file["successes"].mean(axis=1).tolist()}
    with open(folder / "progress.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    logged = {}
    for name in COLUMNS:
        key = f"{'rollout' if name == 'success_rate' else 'train'}/{name}"
        values = [[int(line["time/total_timesteps"]), float(line[key])] for line in lines if line.get(key)]
        if values:
            logged[name] = values[:: -max(len(values) // 20, 1)][::-1]
    return {"curve": curve, "logged": logged}


def steps_to(record: Record, success: float) -> int | None:
    """Environment steps at the first evaluation with this success rate; None if there is none."""
    curve = record["curve"]
    return next((n for n, rate in zip(curve["timesteps"], curve["success"]) if rate >= success), None)


def median_steps(records: list[Record], success: float) -> str:
    """``12,288 (10,240 to 15,360)``, or how many seeds got there."""
    steps = [n for record in records if (n := steps_to(record, success)) is not None]
    if len(steps) < len(records):
        return f"{len(steps)} of {len(records)} seeds"
    return f"{statistics.median(steps):,.0f} ({min(steps):,} to {max(steps):,})"


def mean_of_last(records: list[Record], name: str) -> str:
    """Mean over seeds of the last value that was logged."""
    values = [record["logged"][name][-1][1] for record in records if name in record["logged"]]
    return f"{statistics.mean(values):.2f}" if values else "-"


def table(row: str, records: list[Record]) -> str:
    """One row per label, over seeds: final success, steps to 90 %, what was logged last."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["row"] == row:
            groups.setdefault(record["label"], []).append(record)
    found = [r["logged"] for group in groups.values() for r in group]
    names = [name for name in COLUMNS if any(name in logged for logged in found)]
    lines = [
        f"| {row} | success at the end | env steps to 90 % | {' | '.join(names)} | seeds |".replace("_", " "),
        "|---" * (4 + len(names)) + "|",
    ]
    for label, group in groups.items():
        success = mean_and_range([r["result"]["student"]["success_once"] for r in group])
        values = " | ".join(mean_of_last(group, name) for name in names)
        lines.append(f"| {label} | {success} | {median_steps(group, 0.9)} | {values} | {len(group)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", nargs="+", help="only these runs of the rows, e.g. PPO ROAD")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--root", type=Path, default=Path("logs/tokens"), help="where the run folders go")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    todo = [cell for seed in args.seeds for row in args.rows for cell in ROWS[row](seed, args.root)]
    todo = [cell for cell in todo if args.labels is None or cell.label in args.labels]
    records = load(RESULTS) if args.tables_only else run(todo, args.root, RESULTS, args.jobs, extra)
    print("\n\n".join(table(row, records) for row in args.rows))


if __name__ == "__main__":
    main()
