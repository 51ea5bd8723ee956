"""Labels that are still on their way, and labels that turned out wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, NamedTuple

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, Teacher, TeacherError, TeacherSpec, TeacherUnavailable

logger = logging.getLogger(__name__)
ON_FAILURE = ("raise", "wait", "skip")
PAUSE = 1.0
"""Seconds between questions to a teacher that may come back."""


class Failure(NamedTuple):
    """What to do about a teacher that does not answer."""

    mode: str
    """``raise`` a TeacherError; ``wait`` and ask again while the failure may pass; ``skip``: the labels are NaN."""
    timeout: float
    """Seconds to wait for one answer once somebody needs it."""
    patience: float
    """Seconds for which ``wait`` asks again before it raises."""


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
    """The answer to one query, which is asked at once and checked when it is first looked at.

    :param teacher: who answers
    :param query: n questions; nobody else writes to its arrays
    :param failure: what to do without an answer
    :param adapt: converts the labels to the environment's conventions
    :param on_answer: gets the seconds that an answer took, in the thread that brings it
    """

    def __init__(
        self,
        teacher: Teacher,
        query: Query,
        failure: Failure,
        adapt: Callable[[Labels], Labels],
        on_answer: Callable[[float], None] | None = None,
    ) -> None:
        self.latency: float | None = None
        self._adapt, self._on_answer = adapt, on_answer
        self._teacher, self._failure = teacher, failure
        self._query: Query | None = query
        self._spec, self._n = teacher.spec, len(query.env_ids)
        self._labels: Labels | None = None
        self._skipped = False
        self._ask()

    def _ask(self) -> None:
        asked = time.monotonic()

        def answered(future: Future[Labels]) -> None:
            self.latency = seconds = time.monotonic() - asked
            if self._on_answer is not None and not future.cancelled() and future.exception() is None:
                self._on_answer(seconds)
            if future.cancelled() or future.exception() is None or self._failure.mode != "wait":
                self._query = None  # a rollout of images would not fit into memory

        assert self._query is not None, "asked again after an answer"
        self._future = self._teacher.submit(self._query)
        self._future.add_done_callback(answered)

    def get(self) -> Labels | None:
        """The labels, or None if they were skipped.

        :raises TeacherError: if the answer is late or unusable, and is not to be skipped
        """
        until = time.monotonic() + self._failure.patience
        pause = 0.0  # the failure may be long past, and the teacher back
        while self._labels is None and not self._skipped:
            try:
                self._labels = self._adapt(check_labels(self._answer(), self._spec, self._n))
            except TeacherUnavailable as error:
                if self._failure.mode != "wait" or time.monotonic() > until:
                    self._give_up(error)
                else:
                    logger.warning("waiting for the teacher: %s", error)
                    time.sleep(pause)
                    pause = PAUSE
                    self._ask()
            except TeacherError as error:
                self._give_up(error)
        return self._labels

    def _give_up(self, error: TeacherError) -> None:
        if self._failure.mode != "skip":
            raise error
        logger.warning("labels skipped: %s", error)
        self._skipped = True

    def _answer(self) -> Labels:
        try:
            return self._future.result(timeout=self._failure.timeout)
        except TeacherError:
            raise
        except FutureTimeoutError as error:
            if self._future.done():
                raise TeacherError(f"teacher {self._spec.name!r} failed: {error!r}") from error
            raise TeacherUnavailable(
                f"teacher {self._spec.name!r} gave no answer within {self._failure.timeout} s"
            ) from error
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
