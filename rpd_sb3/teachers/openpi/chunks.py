"""Chunks of actions: which step of which chunk an environment executes, and the rows of a query put together.

Shape letters: N queries, A action dimensions, T actions of a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, TeacherUnavailable


class Step(NamedTuple):
    """One action of a chunk that is planned, or will be."""

    chunk: Future[np.ndarray]
    """(T, A)"""
    at: int

    @property
    def failed(self) -> bool:
        """True if the chunk will never be planned."""
        return self.chunk.cancelled() or (self.chunk.done() and self.chunk.exception() is not None)


class ChunkMemory:
    """What each environment is executing.

    A query that is repeated because some of its rows failed (it has the same number) gets the steps that it had before:
    nothing is executed twice or left out.

    :param horizon: T
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._current: dict[int, Step] = {}
        self._number: int | None = None
        self._answer: Future[Labels] = Future()

    def plan(self, query: Query, ask: Callable[[int], Future[np.ndarray]], whole: Future[Labels]) -> list[Step]:
        """The steps of a query's rows; asks where a chunk is used up, has failed, or an episode starts.

        :param query: N questions
        :param ask: about a row
        :param whole: the answer to the query
        """
        failed = self._answer.done() and self._answer.exception() is not None
        repeated = failed and query.number is not None and query.number == self._number
        self._number = query.number
        self._answer = whole
        steps = []
        for row, env in enumerate(np.asarray(query.env_ids).tolist()):
            step = self._current.get(env)
            if step is None or step.failed:
                step = Step(ask(row), 0)
            elif not repeated:
                goes_on = step.at + 1 < self._horizon and not query.episode_starts[row]
                step = Step(step.chunk, step.at + 1) if goes_on else Step(ask(row), 0)
            self._current[env] = step
            steps.append(step)
        return steps


def gather(whole: Future[Labels], steps: Sequence[Step]) -> None:
    """Resolve ``whole`` when all steps are known, or one has failed; what waits in line for this query is given up then.

    :param whole: to become ``action`` (N, A)
    :param steps: of the N rows
    """
    left = len(steps)
    lock = threading.Lock()

    def arrived(chunk: Future[np.ndarray]) -> None:
        nonlocal left
        error = _error(chunk)
        with lock:
            if left == 0:
                return
            left = left - 1 if error is None else 0
            if left:
                return
        if error is None:
            whole.set_result({"action": np.stack([step.chunk.result()[step.at] for step in steps])})
            return
        for step in steps:
            if step.at == 0:  # a chunk that runs already is an earlier query's
                step.chunk.cancel()
        whole.set_exception(error)

    for step in steps:
        step.chunk.add_done_callback(arrived)


def _error(chunk: Future[np.ndarray]) -> BaseException | None:
    if chunk.cancelled():
        return TeacherUnavailable("given up, because another question of the same query had no answer")
    return chunk.exception()
