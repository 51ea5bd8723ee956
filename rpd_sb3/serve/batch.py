"""Queries of clients, merged into batches, and what a teacher's answer must be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, TeacherError, TeacherSpec


class Unanswerable(ValueError):
    """The teacher's answer to this query cannot be used."""


@dataclass
class PendingQuery:
    """A query of one client, and the answer that it waits for."""

    query: Query
    client: str = ""
    sequence: int | None = None
    deadline: float = float("inf")
    """In time.monotonic()'s seconds."""
    still_valid: Callable[[], None] = lambda: None
    """Raises if the inputs have been overwritten meanwhile."""
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Labels] = field(default_factory=Future)

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.query.env_ids)


def fits(first: Query, other: Query) -> bool:
    """True if two queries can be one batch."""

    def form(query: Query) -> dict[str, tuple[tuple[int, ...], str]]:
        arrays = dict(query.inputs) if query.actions is None else {**query.inputs, "": query.actions}
        return {name: (array.shape[1:], array.dtype.kind) for name, array in arrays.items()}

    return form(first) == form(other)


def merge(queries: Sequence[Query]) -> Query:
    """One query of all the rows, in this order."""
    if len(queries) == 1:
        return queries[0]
    first = queries[0]
    actions = [query.actions for query in queries if query.actions is not None]
    return Query(
        {name: np.concatenate([query.inputs[name] for query in queries]) for name in first.inputs},
        np.concatenate([query.env_ids for query in queries]),
        np.concatenate([query.episode_starts for query in queries]),
        np.concatenate(actions) if actions else None,
    )


def take(query: Query, rows: slice) -> Query:
    """Some rows of a query."""
    inputs = {name: array[rows] for name, array in query.inputs.items()}
    actions = None if query.actions is None else query.actions[rows]
    return Query(inputs, query.env_ids[rows], query.episode_starts[rows], actions)


def check_rows(spec: TeacherSpec, labels: Labels, n: int) -> None:
    """Check that the teacher has given every label for every row.

    :raises TeacherError: if it has not
    """
    for name in spec.labels:
        value = labels.get(name)
        if value is None or value.ndim == 0 or len(value) != n:
            got = len(value) if value is not None and value.ndim else "no"
            raise TeacherError(f"teacher {spec.name!r} gave {got} rows of {name!r} for {n} queries")
        if value.dtype.kind not in "fiub":
            raise TeacherError(f"teacher {spec.name!r} gave {name!r} as {value.dtype}, which is not a number")


def as_arrays(spec: TeacherSpec, labels: Labels) -> Labels:
    """The labels that were promised, as they are sent: float32, int64 or bool."""
    kinds = {"f": np.float32, "i": np.int64, "u": np.int64}
    found = {}
    for name in spec.labels & set(labels):
        value = np.asarray(labels[name])
        with np.errstate(over="ignore"):  # too large for a float32: not finite, which is an error of its own
            found[name] = value.astype(kinds.get(value.dtype.kind, value.dtype), copy=False)
    return found


def check_finite(labels: Labels) -> None:
    """Check that labels are numbers.

    :raises Unanswerable: naming the first row that is not
    """
    for name, value in labels.items():
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise Unanswerable(f"the teacher's {name!r} for row {row} is not finite: {value[row].ravel()[:8].tolist()}")
