"""What benchmarks share: the machine, a service, and training runs as the cells of a table.

A cell is one ``python -m rpd_sb3.train`` in a folder of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch as th

from rpd_sb3.contract.cores import n_cores
from rpd_sb3.export.runtime import cpu_name

Record = dict[str, Any]
"""row, label, seed, command and result of a cell."""


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
        return ["-m", "rpd_sb3.train", *self.arguments, "--seed", str(self.seed), "--no-video", "--no-progress"]

    @property
    def text(self) -> str:
        """The command as one would type it."""
        return shlex.join(["python", *self.command])


def complete_run(cell: Cell, root: Path) -> Path | None:
    """The folder of the run of this very command that went to its end; None if there is none yet."""
    for path in (root / cell.folder).glob("*/*/result.json"):
        command = (path.parent / "command.txt").read_text()
        if json.loads(path.read_text())["complete"] and command.startswith(cell.text):
            return path.parent
    return None


def trained(cell: Cell, root: Path) -> Path:
    """The run folder of a cell, which is trained unless that is done already."""
    folder = root / cell.folder
    run_folder = complete_run(cell, root)
    if run_folder is None:
        command = [sys.executable, *cell.command, "-f", str(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "w") as log:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
        run_folder = complete_run(cell, root)
        assert run_folder is not None, "a run that ends well has a complete result.json"
    return run_folder


def train(cell: Cell, root: Path) -> Record:
    """The record of a cell, which is trained unless that is done already."""
    result = json.loads((trained(cell, root) / "result.json").read_text())
    print(f"{cell.folder}: {result['student']['success_once']:.0%} in {result['wall_s']:.0f} s", flush=True)
    command = cell.text.replace(str(root), "ROOT")  # the root differs between machines
    return {"row": cell.row, "label": cell.label, "seed": cell.seed, "command": command, "result": result}


def mean_and_range(values: list[float]) -> str:
    """``93 % (88 to 97)``"""
    return f"{statistics.mean(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def run(
    todo: Iterable[Cell], root: Path, results: Path, jobs: int, extra: Callable[[Path], Record] | None = None
) -> list[Record]:
    """Train the cells that are not complete yet, and write what there is to the results after each of them.

    :param todo: cells
    :param root: where the run folders go
    :param results: JSON file of all records, those of other cells included
    :param jobs: runs at a time
    :param extra: more entries of a record, read from the run folder
    """
    with ThreadPoolExecutor(jobs) as pool:
        for cell, record in pool.map(lambda cell: (cell, train(cell, root)), todo):
            if extra is not None:
                record |= extra(trained(cell, root))
            same = ("row", "label", "seed")
            # Read again: another benchmark may have written rows of its own.
            records = [r for r in load(results) if any(r[key] != record[key] for key in same)] + [record]
            results.parent.mkdir(exist_ok=True)
            lines = ",\n".join(json.dumps(record) for record in records)  # one line for each run
            results.write_text(f"[\n{lines}\n]\n")
    return load(results)


def load(results: Path) -> list[Record]:
    """All records; none if there is no such file yet."""
    return json.loads(results.read_text()) if results.is_file() else []


def machine() -> dict[str, Any]:
    """What numbers depend on, and how many processes wanted to run meanwhile."""
    return {
        "cpu": cpu_name(),
        "cpu_capability": th.backends.cpu.get_cpu_capability(),
        "cores": n_cores(),
        "load_average": round(os.getloadavg()[1], 1),
        "gpu": th.cuda.get_device_name() if th.cuda.is_available() else None,
        "torch": th.__version__,
    }


@contextmanager
def service(*arguments: str, **environment: str) -> Iterator[str]:
    """A ``python -m rpd_sb3.serve`` with these arguments, run in this folder.

    :param environment: more variables of its environment
    :return: its address, once it listens
    :raises RuntimeError: if it ends instead
    """
    command = [sys.executable, "-m", "rpd_sb3.serve", *arguments]
    where: Record = {"cwd": Path(__file__).parent, "env": os.environ | environment}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **where) as process:
        try:
            assert process.stdout is not None
            listens = process.stdout.readline()
            if not listens:
                raise RuntimeError(f"the service ended: {shlex.join(command)}")
            yield listens.split()[-1]
        finally:
            process.terminate()
