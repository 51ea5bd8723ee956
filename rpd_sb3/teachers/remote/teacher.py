"""A teacher in another process or on another machine."""

from __future__ import annotations

import heapq
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import numpy as np

from rpd_sb3.contract.names import check_counts
from rpd_sb3.contract.teacher import TIMEOUT, Labels, Query, TeacherError
from rpd_sb3.teachers.remote.http import check_expected, handshake
from rpd_sb3.teachers.remote.replica import Piece, Replica
from rpd_sb3.wire.urls import TOKEN


class RemoteTeacher:
    """Asks one teacher service, or several replicas of one.

    A teacher with a memory always sees an environment at the same replica. The queries of any other teacher are split so
    that all replicas finish at about the same time, by the rows that are waiting there and the speed of their last answers.

    There is one attempt for each query; rows that a replica does not answer (no connection, no answer in time, 503) go on
    to another one that does. A TeacherUnavailable means that the same query may be answered later. The query of a teacher
    with a memory carries a number, so that the server answers a repeated one from its cache.

    :param urls: of the replicas, e.g. ``http://127.0.0.1:8000``
    :param name: of the model
    :param token: that the service wants; None: environment variable ``RPD_SB3_TOKEN``
    :param timeout: seconds that a replica has for an answer
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
        timeout: float = TIMEOUT,
        ready_timeout: float = 300.0,
        max_pending: int = 4,
        shared_memory: bool | None = None,
        expect: Mapping[str, Any] | None = None,
    ) -> None:
        _check_arguments(urls, timeout, max_pending)
        self._timeout = timeout
        self._client_id = uuid.uuid4().hex
        self._numbers = count()
        self._closed = False
        token = token or os.environ.get(TOKEN)
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
                elsewhere=self._elsewhere,
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
        _gather(whole, [(rows, piece) for _, rows, piece in pieces])
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
        up = [replica for replica in up if replica.has_room] or [min(up, key=lambda replica: replica.outstanding)]
        counts = share(
            n,
            [replica.outstanding for replica in up],
            [replica.rate for replica in up],
            [replica.is_stale(now) for replica in up],
        )
        ends = np.cumsum(counts)
        return [(replica, np.arange(end - k, end)) for replica, k, end in zip(up, counts, ends) if k]

    def _elsewhere(self, piece: Piece) -> Replica | None:
        """The replica that answers a piece after others have failed; None if there is none."""
        if self._closed or self.spec.stateful:
            return None
        now = time.monotonic()
        others = [replica for replica in self.replicas if replica not in piece.tried and replica.down_until < now]
        return min(others, key=lambda replica: replica.outstanding, default=None)


def share(n: int, waiting: Sequence[int], rates: Sequence[float | None], stale: Sequence[bool]) -> list[int]:
    """How many of n rows each replica gets, so that all finish at about the same time.

    :param n: rows
    :param waiting: rows that each replica has still to answer
    :param rates: rows per second; None: not measured, so as fast as the others
    :param stale: True where the rate was measured long ago: such a replica gets one row, to measure it anew
    """
    known = [rate for rate in rates if rate is not None]
    mean = sum(known) / len(known) if known else 1.0
    speeds = [mean if rate is None else rate for rate in rates]
    counts = [0] * len(waiting)
    for i in [i for i, old in enumerate(stale) if old and rates[i] is not None][:n]:
        counts[i] = 1
    # Each row goes where it is answered first.
    ends = [((waiting[i] + counts[i] + 1) / speeds[i], i) for i in range(len(waiting))]
    heapq.heapify(ends)
    for _ in range(n - sum(counts)):
        _, i = ends[0]
        counts[i] += 1
        heapq.heapreplace(ends, ((waiting[i] + counts[i] + 1) / speeds[i], i))
    return counts


def _arrays(query: Query) -> dict[str, np.ndarray]:
    """A query as the protocol's inputs."""
    arrays = {name: np.asarray(array) for name, array in query.inputs.items()}
    arrays["env_id"] = np.asarray(query.env_ids, np.int64)
    arrays["episode_start"] = np.asarray(query.episode_starts, np.bool_)
    if query.actions is not None:
        tokens = np.asarray(query.actions).dtype.kind in "iu"
        arrays["action_tokens" if tokens else "action"] = np.asarray(query.actions, np.int64 if tokens else np.float32)
    return {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}


def _gather(whole: Future[Labels], parts: Sequence[tuple[np.ndarray, Piece]]) -> None:
    """Resolve ``whole`` when all parts are answered, rows in the order of the query."""
    left = len(parts)
    lock = threading.Lock()

    def arrived(_: Future[Labels]) -> None:
        nonlocal left
        with lock:
            left -= 1
            if left:
                return
        failures = [error for _, piece in parts if (error := piece.answer.exception()) is not None]
        if failures:
            whole.set_exception(failures[0])
            return
        answers = [piece.answer.result() for _, piece in parts]
        if len(parts) == 1:
            whole.set_result(answers[0])
            return
        places = [rows for rows, _ in parts]
        order = np.argsort(np.concatenate(places))
        try:
            for rows, answer in zip(places, answers):
                if any(len(value) != len(rows) for value in answer.values()):
                    raise ValueError(f"not {len(rows)} rows for {len(rows)} queries")
            labels = {name: np.concatenate([answer[name] for answer in answers])[order] for name in answers[0]}
        except (KeyError, TypeError, ValueError) as error:
            reason = f"the replicas of the teacher gave answers that do not fit together: {error}"
            whole.set_exception(TeacherError(reason))
        else:
            whole.set_result(labels)

    for _, piece in parts:
        piece.answer.add_done_callback(arrived)


def _check_arguments(urls: Sequence[str], timeout: float, max_pending: int) -> None:
    for url in urls:
        if not url.startswith(("http://", "https://")) or not url.partition("://")[2]:
            raise ValueError(f"teacher {url!r} is not a URL; expected e.g. http://127.0.0.1:8000")
    if len(set(urls)) != len(urls):
        raise ValueError(f"teacher {','.join(urls)!r} names the same replica twice")
    if not isinstance(timeout, (int, float)) or timeout <= 0:
        raise ValueError(f"timeout={timeout!r} must be a positive number of seconds")
    check_counts(max_pending=max_pending)
