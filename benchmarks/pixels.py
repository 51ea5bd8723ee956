"""Students that see 64 x 64 pixels of the side-view camera, taught by the scripted experts; sparse reward.

    python benchmarks/pixels.py                                   # every cell of the README's table, one after the other
    python benchmarks/pixels.py --rows PickCube-v1 --seeds 0 1 2  # some rows
    python benchmarks/pixels.py --tables-only                     # print the table from what is there
    taskset -c 0 python benchmarks/pixels.py --seeds 1            # on one core; another seed may train on another one

Each cell is one ``python -m rpd_sb3.train`` on all cores that it may use; cells that have a complete result.json are not trained again. Then the
best student is evaluated on the same episodes with ManiSkill's own visuals, and PPO is trained for as many steps without the
teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from harness import Cell, Record, load, mean_and_range, run, service, trained

from rpd_sb3.contract.cores import n_cores
from rpd_sb3.envs.tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "pixels.json"
URL = "http://127.0.0.1:8765"
"""Of the service, for the rows that ask one."""
ROWS = {
    **{task: ["--env", task, "--obs", "rgb"] for task in TASKS},
    **{f"{task}, joints beside": ["--env", task, "--obs", "rgb+state"] for task in TASKS},
    "PickCube-v1, noisy teacher": ["--env", "PickCube-v1", "--section", "noisy-teacher-rgb"],
    "PickCube-v1, biased teacher": ["--env", "PickCube-v1", "--section", "biased-teacher-rgb"],
    "PushCube-v1, tiny OpenVLA": ["--env", "PushCube-v1", "--section", "half-working-vla-rgb", "--teacher", URL],
    "PushCube-v1, whole image": ["--env", "PushCube-v1", "--section", "whole-image"],
    "PushCube-v1, moved camera": ["--env", "PushCube-v1", "--section", "moved-camera", "--teacher", "STUDENT"],
}
"""Label of a row, and the arguments of its trainings. STUDENT: the first one of the row before, which this trains where it is missing."""
CHECKPOINT = Path(__file__).parents[1] / "examples/tiny_openvla/checkpoint"
SERVICE = ["--teacher", f"openvla:{CHECKPOINT}", "--port", URL.rpartition(":")[2]]
SERVICE += ["--teacher-kwargs", "image_size:224", "control_mode:pd_ee_delta_pose"]
COMMON = ["--eval-freq", "0", "--eval-episodes", "100"]


def cell(label: str, seed: int, root: Path) -> Cell:
    """One student; its teacher is trained first where that is a student, too."""
    arguments = list(ROWS[label])
    if arguments[-1] == "STUDENT":
        arguments[-1] = f"sb3:{trained(cell('PushCube-v1, whole image', 0, root), root)}/best_model.zip"
    return Cell("pixels", label, ["--algo", "rpd_ppo", *arguments, *COMMON], seed)


def baseline(label: str, seed: int, timesteps: int) -> Cell:
    """PPO alone in the same environment for as many steps; rows of the same task, observation and length share it."""
    task, obs, steps = label.split(",")[0], "rgb+state" if "rgb+state" in ROWS[label] else "rgb", str(timesteps)
    arguments = ["--algo", "ppo", "--env", task, "--obs", obs, "-n", steps, *COMMON]
    return Cell("pixels", f"ppo {task} {obs} {steps}", arguments, seed)


def beside(run_folder: Path) -> Record:
    """The student of a run on ManiSkill's own visuals, on the episodes of its evaluation, and on how many cores that was."""
    out = run_folder / "beside.json"
    if not out.is_file():
        command = ["-m", "rpd_sb3.evaluate", "--run", str(run_folder), "--env-kwargs", "visuals:full", "-n", "100"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "full_frames.json")
            subprocess.run([sys.executable, *command, "--json", str(path)], stdout=subprocess.DEVNULL, check=True)
            result = json.loads(path.read_text())
        del result["name"]  # a path of this machine
        out.write_text(json.dumps({"n_cores": n_cores(), "full_frames": result}))
    return json.loads(out.read_text())


def table(records: list[Record]) -> str:
    """Markdown: mean success over seeds, range in brackets."""
    head = "| task | teacher | PPO | RPD | on full frames | frames | training time, cores | seeds |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for label in ROWS:
        mine = [record for record in records if record["label"] == label]
        if not mine:
            continue
        results = [record["result"] for record in mine]
        ppo = [r for r in records if r["label"] == baseline(label, 0, results[0]["timesteps"]).label]
        cells = [
            label,
            f"{statistics.mean(r['teacher']['success_once'] for r in results):.0%}",
            _success(ppo, lambda record: record["result"]["student"]["success_once"]),
            _success(mine, lambda record: record["result"]["student"]["success_once"]),
            _success(mine, lambda record: record["full_frames"]["success_once"]),
            f"{results[0]['timesteps']:,}",
            _minutes(mine),
            str(len(mine)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _minutes(records: list[Record]) -> str:
    """Of the trainings that had most cores."""
    most = max(record["n_cores"] for record in records)
    times = [record["result"]["wall_s"] / 60 for record in records if record["n_cores"] == most]
    return f"{statistics.mean(times):.0f} min on {most}"


def _success(records: list[Record], rate: Callable[[Record], float]) -> str:
    rates = [rate(record) for record in records]
    return mean_and_range(rates) if len(rates) > 1 else f"{rates[0]:.0%}" if rates else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ppo-seeds", type=int, nargs="*", default=[0], help="of the baseline")
    parser.add_argument("--root", type=Path, default=Path("logs/benchmark"), help="where the run folders go")
    parser.add_argument("--tables-only", action="store_true")
    args = parser.parse_args()
    if args.tables_only:
        print(table(load(RESULTS)))
        return
    for label in args.rows:
        todo = [cell(label, seed, args.root) for seed in args.seeds]
        # In one thread, as the simulator wants the other core.
        with service(*SERVICE, OMP_NUM_THREADS="1") if URL in ROWS[label] else nullcontext():
            records = run(todo, args.root, RESULTS, jobs=1, extra=beside)
        timesteps = max(r["result"]["timesteps"] for r in records if r["label"] == label)
        run([baseline(label, seed, timesteps) for seed in args.ppo_seeds], args.root, RESULTS, jobs=1)
    print(table(load(RESULTS)))


if __name__ == "__main__":
    main()
