"""Labels that are still on their way, and labels that turned out wrong."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np

from rpd_sb3.teachers.base import Labels, TeacherError, TeacherSpec

logger = logging.getLogger(__name__)
ON_FAILURE = ("raise", "skip")


def check_label_fraction(fraction: float) -> float:
    """The share of transitions to label.

    :raises ValueError: outside [0, 1]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"label_fraction={fraction} must lie between 0 and 1")
    return fraction


def check_labels(labels: Labels, spec: TeacherSpec, n: int) -> Labels:
    """Make sure that an answer is complete, has the right shape and is finite.

    :param labels: the teacher's answer
    :param spec: what the teacher promised
    :param n: number of questions
    :raises TeacherError: naming the first label that is missing, misshapen or not finite
    """
    for name in sorted(spec.labels):
        if name not in labels:
            raise TeacherError(f"teacher {spec.name!r} promised the label {name!r}, but answered with {sorted(labels)}")
        value = labels[name]
        shape = (n, *(spec.action_space.shape or ())) if name in ("action", "std") else (n, *np.shape(value)[1:])
        if np.shape(value) != shape:
            raise TeacherError(f"teacher {spec.name!r} gave {name!r} of shape {np.shape(value)}, expected {shape}")
        if not np.isfinite(value).all():
            row = int(np.argwhere(~np.isfinite(value))[0][0])
            raise TeacherError(
                f"teacher {spec.name!r} gave a {name!r} that is not finite for query {row} of {n}: {value[row]}"
            )
    return labels


class PendingLabels:
    """The answer to one query, checked when it is first looked at.

    :param future: what ``Teacher.submit`` returned
    :param spec: of the teacher
    :param n: number of questions
    :param timeout: seconds to wait for the answer once somebody needs it
    :param on_failure: ``raise`` a TeacherError, or ``skip``: the labels are NaN and count as missing
    """

    def __init__(self, future: Future[Labels], spec: TeacherSpec, n: int, timeout: float, on_failure: str) -> None:
        self.latency: float | None = None
        self._spec, self._n, self._timeout, self._on_failure = spec, n, timeout, on_failure
        self._labels: Labels | None = None
        self._skipped = False
        asked = time.monotonic()

        def note_latency(_: Future[Labels]) -> None:
            self.latency = time.monotonic() - asked

        self._future = future
        future.add_done_callback(note_latency)

    def get(self) -> Labels | None:
        """The labels, or None if they were skipped.

        :raises TeacherError: if the answer is late or unusable and ``on_failure`` is ``raise``
        """
        if self._labels is None and not self._skipped:
            try:
                self._labels = check_labels(self._answer(), self._spec, self._n)
            except TeacherError as error:
                if self._on_failure == "raise":
                    raise
                logger.warning("labels skipped: %s", error)
                self._skipped = True
        return self._labels

    def _answer(self) -> Labels:
        try:
            return self._future.result(timeout=self._timeout)
        except TeacherError:
            raise
        except FutureTimeoutError as error:
            if self._future.done():
                raise TeacherError(f"teacher {self._spec.name!r} failed: {error!r}") from error
            raise TeacherError(f"teacher {self._spec.name!r} gave no answer within {self._timeout} s") from error
        except Exception as error:
            raise TeacherError(f"teacher {self._spec.name!r} failed: {error!r}") from error

    def row(self, name: str, index: int) -> np.ndarray:
        """One label of one question; NaN if the answer was skipped.

        :param name: label
        :param index: question, 0 to n - 1
        """
        labels = self.get()
        if labels is None:
            return np.full(self._spec.action_space.shape or (), np.nan, np.float32)
        return labels[name][index]


class LazyLabel:
    """One label of one transition: ``np.asarray(label)`` waits for the teacher and gives the array."""

    __slots__ = ("_index", "_name", "_pending")

    def __init__(self, pending: PendingLabels, name: str, index: int) -> None:
        self._pending, self._name, self._index = pending, name, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._pending.row(self._name, self._index), dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyLabel({self._name!r}, waiting)" if self._pending.latency is None else repr(np.asarray(self))
