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

MAX_FAILED = 1024
"""Queries without an answer that are remembered in case they are repeated."""


class Chunk:
    """T actions that are planned, or will be.

    :param answer: (T, A)
    """

    def __init__(self, answer: Future[np.ndarray]) -> None:
        self.answer = answer

    @property
    def failed(self) -> bool:
        """True if it will never be planned."""
        return self.answer.cancelled() or (self.answer.done() and self.answer.exception() is not None)


class Step(NamedTuple):
    """One action of a chunk."""

    chunk: Chunk
    at: int


class ChunkMemory:
    """What each environment is executing.

    It is known when a query is asked, not when it is answered, so that queries may overtake one another. A query that is
    repeated because some of its rows failed (it has the same number) gets the steps that it had before: nothing is
    executed twice or left out.

    :param horizon: T
    """

    def __init__(self, horizon: int) -> None:
        self._horizon = horizon
        self._current: dict[int, Step] = {}
        self._unanswered: dict[int, dict[int, Step]] = {}

    def plan(self, query: Query, ask: Callable[[int], Future[np.ndarray]], whole: Future[Labels]) -> list[Step]:
        """The steps of a query's rows; asks where a chunk is used up, has failed, or an episode starts.

        :param query: N questions
        :param ask: about a row
        :param whole: the answer to the query
        """
        before = {} if query.number is None else self._unanswered.get(query.number, {})
        steps = []
        for row, env in enumerate(np.asarray(query.env_ids).tolist()):
            if env in before:
                steps.append(self._again(env, before[env], row, ask))
            else:
                self._current[env] = self._next(env, bool(query.episode_starts[row]), row, ask)
                steps.append(self._current[env])
        if query.number is not None:
            self._remember(query.number, dict(zip(np.asarray(query.env_ids).tolist(), steps)), whole)
        return steps

    def _next(self, env: int, start: bool, row: int, ask: Callable[[int], Future[np.ndarray]]) -> Step:
        step = self._current.get(env)
        if start or step is None or step.at + 1 == self._horizon or step.chunk.failed:
            return Step(Chunk(ask(row)), 0)
        return Step(step.chunk, step.at + 1)

    def _again(self, env: int, step: Step, row: int, ask: Callable[[int], Future[np.ndarray]]) -> Step:
        if not step.chunk.failed:
            return step
        if step.at == 0:  # later steps of the chunk may wait for it
            step.chunk.answer = ask(row)
            return step
        fresh = Step(Chunk(ask(row)), 0)
        if self._current[env].chunk is step.chunk:
            self._current[env] = fresh
        return fresh

    def _remember(self, number: int, steps: dict[int, Step], whole: Future[Labels]) -> None:
        self._unanswered[number] = steps
        if len(self._unanswered) > MAX_FAILED:
            self._unanswered.pop(next(iter(self._unanswered)), None)

        def forget(answered: Future[Labels]) -> None:
            if answered.exception() is None and self._unanswered.get(number) is steps:
                self._unanswered.pop(number, None)

        whole.add_done_callback(forget)


def gather(whole: Future[Labels], steps: Sequence[Step]) -> None:
    """Resolve ``whole`` when all steps are known, or one has failed; what waits in line for this query is given up then.

    :param whole: to become ``action`` (N, A)
    :param steps: of the N rows
    """
    answers = [step.chunk.answer for step in steps]
    left = len(answers)
    lock = threading.Lock()

    def arrived(answer: Future[np.ndarray]) -> None:
        nonlocal left
        error = _error(answer)
        with lock:
            if left == 0:
                return
            left = left - 1 if error is None else 0
            if left:
                return
        if error is None:
            actions = [answer.result()[step.at] for answer, step in zip(answers, steps)]
            whole.set_result({"action": np.stack(actions)})
            return
        for other, step in zip(answers, steps):
            if step.at == 0:  # a chunk that runs already is an earlier query's
                other.cancel()
        whole.set_exception(error)

    for answer in answers:
        answer.add_done_callback(arrived)


def _error(answer: Future[np.ndarray]) -> BaseException | None:
    if answer.cancelled():
        return TeacherUnavailable("given up, because another question of the same query had no answer")
    return answer.exception()
