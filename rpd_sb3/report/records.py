"""The runs of a report, read from their folders; what a run has not written yet is None or empty."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.train.folder import Evaluations, SavedRun, load_run, read_evaluations

VIDEO = "video.mp4"
TEACHER_VIDEO = "teacher_video.mp4"


class Rate(NamedTuple):
    """A success rate with its 95 % Wilson interval."""

    mean: float
    low: float
    high: float
    n: int
    """Episodes."""

    @classmethod
    def of(cls, successes: np.ndarray) -> Rate:
        """The rate of boolean outcomes of any shape."""
        k = int(successes.sum())
        n = int(successes.size)
        return cls(k / n, *wilson_interval(k, n), n)


class Record(NamedTuple):
    """One run."""

    run: SavedRun
    result: dict[str, Any]
    """Empty while the run goes on, or if it was killed."""
    evaluations: Evaluations
    progress: dict[str, tuple[np.ndarray, np.ndarray]]
    """Column of ``progress.csv`` to steps and values, where there are any."""

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def algo(self) -> str:
        return self.run.args["algo"]

    @property
    def seed(self) -> int:
        return self.run.args.get("seed", 0)

    @property
    def value(self) -> float:
        """Mean of the last evaluation: success at any step, or return where there is no success."""
        rows = self.evaluations.returns if self.evaluations.once is None else self.evaluations.once
        return float(rows[-1].mean())

    @property
    def complete(self) -> bool:
        return bool(self.result.get("complete"))

    @property
    def has_teacher(self) -> bool:
        return bool(self.config.get("teacher"))

    def video(self, name: str) -> Path | None:
        """A video of the run, if it was filmed."""
        path = self.run.folder / name
        return path if path.is_file() and path.stat().st_size else None

    def teacher(self, key: str) -> Any:
        """A number of the teacher's own evaluation; None if there was none."""
        return (self.result.get("teacher") or {}).get(key)


def read_records(folders: Iterable[str]) -> list[Record]:
    """Read run folders.

    :raises ValueError: if one is not a run folder, is named twice, holds no evaluation, or is damaged
    """
    records: dict[Path, Record] = {}
    for folder in folders:
        path = Path(folder).resolve()
        if path in records:
            raise ValueError(f"run folder {folder!r} is named twice; name each run once")
        run = load_run(folder)
        evaluations = read_evaluations(run.folder)
        if evaluations is None:
            raise ValueError(f"run folder {folder!r} holds no evaluation yet (evaluations.npz); wait for its first one")
        records[path] = Record(run, run.result, evaluations, _progress(run.folder / "progress.csv"))
    return list(records.values())


def _progress(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Columns with numbers in them; a row that a killed run has left half written is dropped."""
    columns: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (steps := _number(row, "time/total_timesteps")) is None:
                continue
            for name in row:
                if name and (value := _number(row, name)) is not None:
                    columns.setdefault(name, []).append((steps, value))
    return {name: tuple(np.array(pairs).T) for name, pairs in columns.items()}


def _number(row: Mapping[str, str | None], name: str) -> float | None:
    try:
        value = float(row.get(name) or "")
    except (ValueError, TypeError):
        return None
    return value if np.isfinite(value) else None
