"""A teacher that lives in another process or on another machine."""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, TeacherError, TeacherUnavailable
from rpd_sb3.teachers.remote.handshake import check_expected, handshake
from rpd_sb3.teachers.remote.replica import Piece, Replica


class RemoteTeacher:
    """Asks one teacher service, or several replicas of one.

    A query is split over the replicas: a teacher with a memory always sees an environment at the same replica, any other
    one where the fewest rows are waiting. Failures that may pass (no connection, no answer in time, 503) are tried again,
    elsewhere if possible; the query of a teacher with a memory carries a number, so that the server answers a repeated
    one from its cache.

    :param urls: of the replicas, e.g. ``http://127.0.0.1:8000``
    :param name: of the model
    :param token: that the service wants; None: environment variable ``RPD_SB3_TOKEN``
    :param timeout: seconds for one attempt
    :param retries: further attempts
    :param ready_timeout: seconds to wait for a service that is loading its teacher
    :param max_pending: queries at a time and replica; :meth:`submit` waits for room beyond that
    :param shared_memory: True, False, or None: where it works. Images of one machine's processes need no socket
    :param expect: fields of the spec that must have these values, e.g. ``unnorm_key``
    :raises ValueError: for an impossible argument
    :raises TeacherError: if a replica does not answer, or is not the teacher that is expected
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        name: str = "teacher",
        token: str | None = None,
        timeout: float = 20.0,
        retries: int = 3,
        ready_timeout: float = 300.0,
        max_pending: int = 4,
        shared_memory: bool | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> None:
        _check_arguments(urls, timeout, retries, max_pending)
        self._timeout, self._retries = timeout, retries
        self._client_id = uuid.uuid4().hex
        self._numbers = count()
        self._closed = False
        token = token or os.environ.get("RPD_SB3_TOKEN")
        self.spec, shares = handshake(urls, name, token, ready_timeout)
        check_expected(self.spec, expect or {}, urls[0])
        self.replicas = [
            Replica(
                url,
                name,
                token,
                timeout=timeout,
                # The queries of a teacher with a memory must arrive in order.
                n_connections=1 if self.spec.stateful else max_pending,
                max_pending=max_pending,
                shared_memory=shared_memory if shares else False,
                failed=self._try_again,
            )
            for url in urls
        ]

    def submit(self, query: Query) -> Future[Labels]:
        """Ask; returns when the query is on its way, or waits in line for a connection.

        :param query: N questions
        :return: the labels, or the TeacherError that prevents them
        """
        whole: Future[Labels] = Future()
        if self._closed:
            whole.set_exception(TeacherError("the teacher is closed"))
            return whole
        n = len(query.env_ids)
        parts = self._split(query)
        parameters = {
            "client_id": self._client_id,
            "sequence": next(self._numbers) if query.number is None else query.number,
            "timeout": int(self._timeout * 1e6),
        }
        arrays = _arrays(query)
        pieces = []
        for replica, rows in parts:
            mine = arrays if len(rows) == n else {name: array[rows] for name, array in arrays.items()}
            pieces.append((replica, rows, Piece(mine, len(rows), parameters)))
        _gather(whole, [(rows, piece) for _, rows, piece in pieces], n)
        for replica, _, piece in pieces:
            try:
                replica.submit(piece)
            except TeacherError as error:
                piece.answer.set_exception(error)
        return whole

    def close(self) -> None:
        """Close the connections; what is still on its way may fail."""
        self._closed = True
        for replica in self.replicas:
            replica.close()

    def _split(self, query: Query) -> list[tuple[Replica, np.ndarray]]:
        n, replicas = len(query.env_ids), self.replicas
        if self.spec.stateful:
            places = np.asarray(query.env_ids) % len(replicas)
            return [(replica, rows) for i, replica in enumerate(replicas) if len(rows := np.flatnonzero(places == i))]
        now = time.monotonic()
        up = [replica for replica in replicas if replica.down_until < now] or replicas
        free = sorted(up, key=lambda replica: replica.outstanding)
        ends = [n * (i + 1) // len(free) for i in range(len(free))]
        parts = zip(free, [0, *ends], ends)
        return [(replica, np.arange(start, end)) for replica, start, end in parts if end > start]

    def _try_again(self, piece: Piece, error: TeacherUnavailable) -> bool:
        """After a failure that may pass: True to ask the same replica again; else it is given up, or another's."""
        if self._closed or piece.failures > self._retries:
            tries = f" ({piece.failures} attempts)" if piece.failures > 1 else ""
            piece.answer.set_exception(TeacherUnavailable(f"{error}{tries}"))
            return False
        others = [] if self.spec.stateful else [r for r in self.replicas if r.down_until < time.monotonic()]
        if others:
            min(others, key=lambda replica: replica.outstanding).resubmit(piece)
        return not others


def _arrays(query: Query) -> dict[str, np.ndarray]:
    """A query as the protocol's inputs."""
    arrays = {name: np.asarray(array) for name, array in query.inputs.items()}
    arrays["env_id"] = np.asarray(query.env_ids, np.int64)
    arrays["episode_start"] = np.asarray(query.episode_starts, np.bool_)
    if query.actions is not None:
        tokens = np.asarray(query.actions).dtype.kind in "iu"
        arrays["action_tokens" if tokens else "action"] = np.asarray(query.actions, np.int64 if tokens else np.float32)
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}


def _gather(whole: Future[Labels], parts: Sequence[tuple[np.ndarray, Piece]], n: int) -> None:
    """Resolve ``whole`` when all parts are answered, rows in the order of the query."""
    left = [len(parts)]
    lock = threading.Lock()

    def arrived(_: Future[Labels]) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        failures = [error for _, piece in parts if (error := piece.answer.exception()) is not None]
        if failures:
            whole.set_exception(failures[0])
            return
        answers = [piece.answer.result() for _, piece in parts]
        if len(parts) == 1:
            whole.set_result(answers[0])
            return
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        try:
            labels = {name: np.concatenate([answer[name] for answer in answers])[order] for name in answers[0]}
        except (KeyError, ValueError) as error:
            whole.set_exception(
                TeacherError(f"the replicas of the teacher gave answers that do not fit together: {error}")
            )
        else:
            whole.set_result(labels)

    for _, piece in parts:
        piece.answer.add_done_callback(arrived)


def _check_arguments(urls: Sequence[str], timeout: float, retries: int, max_pending: int) -> None:
    for url in urls:
        if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
            raise ValueError(f"teacher {url!r} is no URL; expected e.g. http://127.0.0.1:8000")
    if len(set(urls)) != len(urls):
        raise ValueError(f"teacher {','.join(urls)!r} names the same replica twice")
    if timeout <= 0 or retries < 0 or max_pending < 1:
        raise ValueError(
            f"timeout={timeout} must be positive, retries={retries} at least 0 and max_pending={max_pending} at least 1"
        )
