"""The one retry policy: how long an answer is waited for, what is asked again, and which answers are usable.

A client makes one attempt for each query and raises TeacherUnavailable where the same question may be answered later.
What happens then is decided here, for all teachers alike.

Shape letters: N queries, K action dimensions, V bins.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future
from concurrent.futures import wait as wait_for_futures
from numbers import Real
from typing import Any

import numpy as np

from rpd_sb3.contract.names import check_choice
from rpd_sb3.contract.teacher import Labels, Query, Teacher, TeacherError, TeacherSpec, TeacherUnavailable

logger = logging.getLogger(__name__)
ON_FAILURE = ("raise", "wait", "skip")
PAUSE = 0.1
"""Seconds between the first and the second attempt; doubled after each further one."""
MAX_PAUSE = 2.0
"""Seconds between two attempts, unless the teacher asks for more."""


class RetryPolicy:
    """What to do while a teacher gives no answer. All questions of one asker share it.

    A question whose attempt failed for a reason that may pass (TeacherUnavailable) is asked again, after a pause, until
    its time is over. The time counts from the asking, or from the teacher's last answer if that was later: questions
    wait in line, and a teacher that answers those before is not gone.

    :param owner: who asks, for messages
    :param mode: what to do when the time is over: ``raise`` the TeacherError; ``wait``: the same, but only after
        ``patience``; ``skip``: the labels are NaN
    :param timeout: seconds until an answer must be there
    :param patience: the same in mode ``wait``, which logs a warning after each ``timeout``
    :raises ValueError: for an unknown mode, or a time that is not a positive number
    """

    def __init__(self, owner: str, mode: str, timeout: float, patience: float) -> None:
        check_choice(owner, "on_failure", mode, ON_FAILURE)
        for name, seconds in (("timeout", timeout), ("patience", patience)):
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
                raise ValueError(f"{owner}: {name}={seconds!r} must be positive and finite: a number of seconds")
        self.mode = mode
        self.timeout = float(timeout)
        self.limit = float(patience) if mode == "wait" else self.timeout
        """Seconds until the question is given up."""
        self.last_answer = -math.inf
        """``time.monotonic()`` of the last answer to any of the questions."""


def check_label_fraction(fraction: float) -> float:
    """The share of transitions to label.

    :raises ValueError: outside [0, 1]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"label_fraction={fraction} must lie between 0 and 1")
    return fraction


def label_shape(spec: TeacherSpec, name: str) -> tuple[int, ...] | None:
    """Shape of a label of one question; None if the library does not know the label, so that it may have any.

    :param spec: the teacher's
    :param name: of the label
    """
    actions = tuple(spec.action_space.shape or ())
    if name in ("action", "std"):
        return actions
    if name == "logits":
        return (math.prod(actions), spec.n_bins or 0)
    return () if name in ("log_prob", "value") else None


def check_labels(labels: Labels, spec: TeacherSpec, n: int) -> Labels:
    """The labels that the teacher has promised, as arrays, if the answer is usable.

    :param labels: the teacher's answer
    :param spec: what the teacher promised
    :param n: number of questions
    :return: label name to ``(n, ...)``, finite real numbers of the shape that the spec says
    :raises TeacherError: naming the first label that is missing, of another type or shape, or not finite
    """
    who = f"teacher {spec.name!r}"
    if not isinstance(labels, Mapping):
        raise TeacherError(f"{who} answered with a {type(labels).__name__}, expected a dict of label names to arrays")
    checked: Labels = {}
    for name in sorted(spec.labels):
        if name not in labels:
            raise TeacherError(f"{who} promised the label {name!r}, but answered with {sorted(map(str, labels))}")
        try:
            value = np.asarray(labels[name])
        except (TypeError, ValueError) as error:  # rows of different lengths, a tensor on a GPU
            raise TeacherError(f"{who} gave {name!r} as something that is not an array: {error}") from error
        if value.dtype.kind not in "fiu":
            raise TeacherError(f"{who} gave {name!r} of dtype {value.dtype}, expected real numbers")
        shape = label_shape(spec, name)
        expected = (n, *(value.shape[1:] if shape is None else shape))
        if value.shape != expected:
            raise TeacherError(f"{who} gave {name!r} of shape {value.shape}, expected {expected}")
        finite = np.isfinite(value)
        if not finite.all():
            row = int(np.argwhere(~finite)[0][0])
            raise TeacherError(f"{who} gave a {name!r} that is not finite for query {row} of {n}: {value[row]}")
        if name == "std" and (value < 0).any():
            row = int(np.argwhere(value < 0)[0][0])
            raise TeacherError(f"{who} gave a 'std' that is negative for query {row} of {n}: {value[row]}")
        checked[name] = value
    return checked


class PendingLabels:
    """The answer to one query, which is asked at once; it is checked, and asked for again, when it is first looked at.

    :param teacher: who answers
    :param query: n questions; nobody else writes to its arrays
    :param policy: what to do without an answer
    :param adapt: converts the labels to the environment's conventions
    :param on_answer: gets the seconds that the answer took, in the thread that brings it
    """

    def __init__(
        self,
        teacher: Teacher,
        query: Query,
        policy: RetryPolicy,
        adapt: Callable[[Labels], Labels],
        on_answer: Callable[[float], None] | None = None,
    ) -> None:
        self.latency: float | None = None
        """Seconds from the asking to the answer; None before it."""
        self._teacher = teacher
        self._query: Query | None = query
        self._policy = policy
        self._adapt = adapt
        self._on_answer = on_answer
        self._n = len(query.env_ids)
        self._labels: Labels | None = None
        self._error: TeacherError | None = None
        self._failed_at: float | None = None
        self._asked = time.monotonic()
        self._future = self._ask(query)

    def _ask(self, query: Query) -> Future[Labels]:
        asked = time.monotonic()

        def ended(future: Future[Labels]) -> None:
            now = time.monotonic()
            error = _error_of(future)
            if isinstance(error, TeacherUnavailable):
                self._failed_at = now
                return
            self._query = None  # it is not asked again, and a rollout of images would not fit into memory
            if error is None:
                self.latency = now - asked
                self._policy.last_answer = now
                if self._on_answer is not None:
                    self._on_answer(self.latency)

        self._failed_at = None
        future = self._teacher.submit(query)
        future.add_done_callback(ended)
        return future

    def get(self) -> Labels | None:
        """The labels, or None if they were skipped.

        :raises TeacherError: if there is no usable answer in time, and it is not to be skipped
        """
        skip = self._policy.mode == "skip"
        if self._labels is None and self._error is None:
            try:
                self._labels = self._adapt(check_labels(self._answer(), self._teacher.spec, self._n))
            except TeacherError as error:
                self._error = error
                if skip:
                    logger.warning("labels skipped: %s", error)
        if self._error is not None and not skip:
            raise self._error
        return self._labels

    def _answer(self) -> Labels:
        """The teacher's answer; asks again after failures that may pass.

        A late answer counts: a question is asked again only after the attempt before has failed.
        """
        policy, name = self._policy, self._teacher.spec.name
        # An attempt that failed before its answer was wanted says nothing about now: the teacher may be back. With
        # `skip`, every label of a rollout would be waited for anew.
        start = time.monotonic() if self._future.done() and policy.mode != "skip" else self._asked
        attempts = 1
        earlier = ""
        while True:
            left = max(start, policy.last_answer) + policy.limit - time.monotonic()
            if not self._future.done():
                if left <= 0:
                    raise TeacherUnavailable(f"teacher {name!r} gave no answer within {policy.limit:g} s{earlier}")
                wait_for_futures([self._future], min(left, policy.timeout))
                if policy.timeout < left and not self._future.done():
                    logger.warning("waiting for the teacher: no answer within %g s", policy.timeout)
                continue
            error = _error_of(self._future)
            if error is None:
                return self._future.result()
            if not isinstance(error, TeacherError):
                raise TeacherError(f"teacher {name!r} failed: {error!r}") from error
            query = self._query
            if not isinstance(error, TeacherUnavailable) or query is None:
                raise error
            pause = max(error.retry_after, min(PAUSE * 2 ** (attempts - 1), MAX_PAUSE))
            pause -= 0.0 if self._failed_at is None else time.monotonic() - self._failed_at
            if max(pause, 0.0) >= left:
                tries = f" ({attempts} attempts)" if attempts > 1 else ""
                raise TeacherUnavailable(f"{error}{tries}", error.retry_after) from error
            if attempts == 1:
                logger.warning("asking the teacher again: %s", error)
            time.sleep(max(pause, 0.0))
            attempts += 1
            earlier = f"; before: {error}"
            self._future = self._ask(query)

    def row(self, name: str, index: int) -> np.ndarray:
        """One label of one question; NaN if the answer was skipped.

        :param name: of the label
        :param index: question, 0 to n - 1
        :return: of the shape that :func:`label_shape` says; a skipped label of any shape is one NaN
        """
        labels = self.get()
        if labels is None:
            return np.full(label_shape(self._teacher.spec, name) or (), np.nan, np.float32)
        return labels[name][index]


class LazyLabel:
    """One label of one transition: ``np.asarray(label)`` waits for the teacher and gives the array."""

    __slots__ = ("_index", "_name", "_pending")

    def __init__(self, pending: PendingLabels, name: str, index: int) -> None:
        self._pending = pending
        self._name = name
        self._index = index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._pending.row(self._name, self._index), dtype=dtype)

    def __repr__(self) -> str:
        return f"LazyLabel({self._name!r}, waiting)" if self._pending.latency is None else repr(np.asarray(self))


def _error_of(future: Future[Labels]) -> BaseException | None:
    """Why a future that is done has no result; None if it has one."""
    try:
        return future.exception()
    except CancelledError:
        return TeacherError("the question was cancelled; was the teacher closed?")
