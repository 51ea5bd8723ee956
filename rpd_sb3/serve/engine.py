"""Dynamic batching: many small queries, one thread that owns the teacher."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, Teacher, TeacherError, TeacherSpec
from rpd_sb3.serve.batch import PendingQuery, Unanswerable, as_arrays, check_finite, check_rows, fits, merge, take
from rpd_sb3.serve.memory import ClientMemory, OutOfStep
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.wire.spec import input_form
from rpd_sb3.wire.tensors import DATATYPES

logger = logging.getLogger(__name__)
RECENT = 1.0
"""Seconds for which a client counts as active: a batch waits for active clients only."""


class Busy(RuntimeError):
    """Nothing is wrong with the query, but it cannot be answered now."""


class Engine:
    """Loads a teacher and answers queries in batches, all in one thread.

    A batch is run when it is full, when every client that was active within the last second has asked, or when its
    first query has waited for ``max_wait`` with the teacher free. So a lone client never waits.

    :param load: makes the teacher
    :param max_batch: rows of one call of the teacher
    :param max_wait: seconds that a query waits for company; None: a quarter of what the last batch took, at least 5 ms
    :param queue_size: queries that may wait; more are refused
    :param metrics: where to count
    """

    def __init__(
        self,
        load: Callable[[], Teacher],
        metrics: Metrics,
        *,
        max_batch: int = 64,
        max_wait: float | None = None,
        queue_size: int = 256,
    ) -> None:
        self.metrics = metrics
        self.max_batch = max_batch
        self.max_wait = max_wait
        self.queue_size = queue_size
        self.memory = ClientMemory()
        self.spec: TeacherSpec | None = None
        """Of the loaded teacher; None before."""
        self.error: str | None = None
        """Why the teacher could not be loaded, or the thread ended."""
        self.finished = threading.Event()
        self._load = load
        self._queue: deque[PendingQuery] = deque()
        self._batch: list[PendingQuery] = []
        self._active: dict[str, float] = {}
        self._wake = threading.Condition()
        self._closing = False
        self._last_batch = 0.0
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)

    @property
    def ready(self) -> bool:
        """True while queries are answered."""
        return self.spec is not None and self.error is None and not self._closing

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return len(self._queue)

    def start(self) -> None:
        """Begin to load the teacher, and return at once."""
        self._thread.start()

    def submit(self, pending: PendingQuery) -> Future[Labels]:
        """Queue a query; the same answer again for one that is repeated.

        :raises Busy: if the teacher is not ready or the queue is full
        :raises OutOfStep: if it does not continue what a teacher with a memory knows
        """
        with self._wake:
            if not self.ready:
                raise Busy(f"the teacher {self.state()}")
            assert self.spec is not None
            pending.answer.set_running_or_notify_cancel()  # cannot be cancelled any more: others may wait for it
            if self.spec.stateful and pending.sequence is not None:
                known = self.memory.repeated(pending.client, pending.sequence)
                # One that was put off has not reached the teacher's memory, and is asked now.
                if known is not None and not (known.done() and isinstance(known.exception(), Busy)):
                    return known
            if self.spec.stateful:
                query = pending.query
                slots = self.memory.slots(pending.client, query.env_ids, query.episode_starts)
                pending.query = query._replace(env_ids=slots)
                if pending.sequence is not None:
                    self.memory.asked(pending.client, pending.sequence, pending.answer)
            if len(self._queue) >= self.queue_size:
                busy = Busy(f"the queue is full: {self.queue_size} queries wait")
                self._fail(pending, busy)
                raise busy
            self._queue.append(pending)
            self._active[pending.client] = pending.arrived
            self.metrics.queue.set(len(self._queue))
            self._wake.notify()
        return pending.answer

    def state(self) -> str:
        """What the teacher is doing: ``is ready``, ``is loading``, ``is shutting down`` or ``failed: <why>``."""
        if self.error is not None:
            return f"failed: {self.error}"
        if self._closing:
            return "is shutting down"
        return "is loading" if self.spec is None else "is ready"

    def close(self, timeout: float = 30.0) -> None:
        """Answer what was accepted, then end the thread and close the teacher."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive() and self.spec is not None:  # nothing was accepted from a teacher that still loads
            self._thread.join(timeout)

    def _run(self) -> None:
        teacher: Teacher | None = None
        try:
            teacher = self._load()
            warm_up(teacher)
            self.spec = teacher.spec
            logger.info("teacher %r is ready", teacher.spec.name)
            while self._next_batch():
                self._answer(teacher, self._batch)
                self._batch = []  # its arrays may be large, or a client's shared memory
        except BaseException as error:  # whatever a model does, exit() included, is reported here and by the exit code
            logger.exception("the teacher failed")
            self.error = f"{type(error).__name__}: {error}"
        finally:
            with self._wake:
                for pending in [*self._batch, *self._queue]:
                    if not pending.answer.done():
                        pending.answer.set_exception(Busy(f"the teacher {self.state()}"))
                self._queue.clear()
            try:
                if teacher is not None:
                    teacher.close()
            finally:
                self.finished.set()

    def _next_batch(self) -> bool:
        """Wait for queries, and take some; False when closing and all are answered."""
        free = time.monotonic()
        with self._wake:
            while not self._queue:
                if self._closing:
                    return False
                self._wake.wait()
            wait = max(0.005, self._last_batch / 4) if self.max_wait is None else self.max_wait
            # Not from its arrival during the last batch: two groups of clients would take turns for ever, each half a batch.
            until = max(self._queue[0].arrived, free) + wait
            while not self._closing and not self._complete() and (left := until - time.monotonic()) > 0:
                self._wake.wait(left)
            self._batch = self._take_batch()
            self.metrics.queue.set(len(self._queue))
            return True

    def _take_batch(self) -> list[PendingQuery]:
        """The first query of the queue, and those behind it that fit."""
        assert self.spec is not None
        batch: list[PendingQuery] = []
        rows = 0
        slots: set[int] = set()
        while self._queue:
            pending = self._queue[0]
            if batch and not (rows + pending.n <= self.max_batch and fits(batch[0].query, pending.query)):
                break
            if self.spec.stateful:
                if not slots.isdisjoint(pending.query.env_ids.tolist()):
                    break  # the second query of the same environment needs the memory of the first
                slots.update(pending.query.env_ids.tolist())
            batch.append(self._queue.popleft())
            rows += pending.n
        return batch

    def _complete(self) -> bool:
        if sum(pending.n for pending in self._queue) >= self.max_batch:
            return True
        now = time.monotonic()
        self._active = {client: seen for client, seen in self._active.items() if now - seen < RECENT}
        return set(self._active) <= {pending.client for pending in self._queue}

    def _answer(self, teacher: Teacher, batch: list[PendingQuery]) -> None:
        live = [pending for pending in batch if self._admit(pending)]
        if not live:
            return
        try:
            parts = self._ask(teacher, live)
        except Exception as error:
            if len(live) > 1 and not teacher.spec.stateful:  # one bad query must not cost the others their answers
                for pending in live:
                    self._answer(teacher, [pending])
                return
            logger.warning("the teacher failed on %d queries", len(live), exc_info=True)
            for pending in live:
                self._fail(pending, TeacherError(f"the teacher failed: {type(error).__name__}: {error}"))
            return
        for pending, labels in zip(live, parts):
            try:
                pending.still_valid()
                check_finite(labels)
            except Exception as error:
                self._fail(pending, error)
            else:
                pending.answer.set_result(labels)

    def _admit(self, pending: PendingQuery) -> bool:
        """True if the query is to be asked now; otherwise it has its answer."""
        try:
            if pending.deadline < time.monotonic():
                raise Busy("the query's deadline passed while it waited")
            pending.still_valid()
            if self.spec is not None and self.spec.stateful:
                with self._wake:
                    self.memory.close_gaps(pending.query.env_ids, pending.query.episode_starts, pending.sequence)
        except Exception as error:
            self._fail(pending, error)
            return False
        return True

    def _fail(self, pending: PendingQuery, error: Exception) -> None:
        """Answer with an error; a teacher with a memory may not have seen the query."""
        if self.spec is not None and self.spec.stateful and not isinstance(error, (Unanswerable, OutOfStep)):
            with self._wake:
                self.memory.missed(pending.query.env_ids, pending.sequence if isinstance(error, Busy) else None)
        pending.answer.set_exception(error)

    def _ask(self, teacher: Teacher, batch: list[PendingQuery]) -> list[Labels]:
        started = time.monotonic()
        query = merge([pending.query for pending in batch])
        n = len(query.env_ids)
        starts = range(0, n, self.max_batch)
        answers = [_label(teacher, take(query, slice(at, at + self.max_batch))) for at in starts]
        labels = answers[0]
        if len(answers) > 1:
            labels = {name: np.concatenate([answer[name] for answer in answers]) for name in labels}
        check_rows(teacher.spec, labels, n)
        self._last_batch = time.monotonic() - started
        self.metrics.batch(n, self._last_batch, [started - pending.arrived for pending in batch])
        ends = np.cumsum([pending.n for pending in batch])
        # Copies: the teacher may use its arrays again, and a kept answer must not keep its whole batch.
        return [{k: v[end - p.n : end].copy() for k, v in labels.items()} for p, end in zip(batch, ends)]


def warm_up(teacher: Teacher) -> None:
    """Have the teacher answer once, where the spec says what its inputs look like: the first answer is the slowest."""
    inputs: dict[str, np.ndarray] = {}
    for name in teacher.spec.inputs:
        datatype, row = input_form(name, teacher.spec)
        if row is None or -1 in row:
            return
        inputs[name] = np.array(["do nothing"]) if datatype == "BYTES" else np.zeros((1, *row), DATATYPES[datatype])
    with np.errstate(all="ignore"):
        _label(teacher, Query(inputs, np.zeros(1, np.int64), np.ones(1, bool)))


def _label(teacher: Teacher, query: Query) -> Labels:
    # Strings are objects until here: as NumPy's own they would take rows x longest x 4 bytes for as long as they wait.
    inputs = {name: array.astype(str) if array.dtype == object else array for name, array in query.inputs.items()}
    query = query._replace(inputs=inputs)
    label = getattr(teacher, "label", None)  # in this thread, if the teacher can
    return as_arrays(teacher.spec, label(query) if label is not None else teacher.submit(query).result())
