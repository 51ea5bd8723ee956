"""Queries of clients, joined into batches and taken apart again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rpd_sb3.contract.teacher import Labels, TeacherError, TeacherSpec


class Unanswerable(ValueError):
    """The teacher's answer to this query cannot be used."""


@dataclass
class Job:
    """One query of one client."""

    inputs: Mapping[str, np.ndarray]
    n: int
    env_ids: np.ndarray
    episode_starts: np.ndarray
    actions: np.ndarray | None = None
    client: str = ""
    sequence: int | None = None
    deadline: float = float("inf")
    """In time.monotonic()'s seconds."""
    still_valid: Callable[[], None] = lambda: None
    """Raises if the inputs have been overwritten meanwhile."""
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Labels] = field(default_factory=Future)


def fit(first: Job, other: Job) -> bool:
    """True if two queries can be one batch."""

    def form(job: Job) -> dict[str, Any]:
        arrays = dict(job.inputs) if job.actions is None else {**job.inputs, "": job.actions}
        return {name: (array.shape[1:], array.dtype.kind) for name, array in arrays.items()}

    return form(first) == form(other)


def join(jobs: list[Job]) -> Job:
    """One query of all the rows, in this order."""
    actions = (
        None if jobs[0].actions is None else np.concatenate([job.actions for job in jobs if job.actions is not None])
    )
    return Job(
        {name: np.concatenate([job.inputs[name] for job in jobs]) for name in jobs[0].inputs},
        sum(job.n for job in jobs),
        np.concatenate([job.env_ids for job in jobs]),
        np.concatenate([job.episode_starts for job in jobs]),
        actions,
    )


def take(job: Job, rows: slice) -> Job:
    """Some rows of a query."""
    inputs = {name: array[rows] for name, array in job.inputs.items()}
    actions = None if job.actions is None else job.actions[rows]
    return Job(inputs, len(job.env_ids[rows]), job.env_ids[rows], job.episode_starts[rows], actions)


def check_rows(spec: TeacherSpec, labels: Labels, n: int) -> None:
    """Make sure that the teacher has given every label for every row.

    :raises TeacherError: if it has not
    """
    for name in spec.labels:
        value = labels.get(name)
        if value is None or value.ndim == 0 or len(value) != n:
            got = len(value) if value is not None and value.ndim else "no"
            raise TeacherError(f"teacher {spec.name!r} gave {got} rows of {name!r} for {n} queries")
        if value.dtype.kind not in "fiub":
            raise TeacherError(f"teacher {spec.name!r} gave {name!r} as {value.dtype}, which is no number")


def as_arrays(spec: TeacherSpec, labels: Labels) -> Labels:
    """The labels that were promised, as they are sent: float32, int64 or bool."""
    with np.errstate(over="ignore"):  # too large for a float32: not finite, which is an error of its own
        return {name: _as_sent(np.asarray(labels[name])) for name in spec.labels if name in labels}


def _as_sent(value: np.ndarray) -> np.ndarray:
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64}
    return value.astype(kinds.get(value.dtype.kind, value.dtype), copy=False)


def check_finite(labels: Labels) -> None:
    """Make sure that labels are numbers.

    :raises Unanswerable: naming the first row that is not
    """
    for name, value in labels.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise Unanswerable(f"the teacher's {name!r} for row {row} is not finite: {value[row].ravel()[:8].tolist()}")
