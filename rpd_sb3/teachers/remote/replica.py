"""One server of a teacher service, as its client sees it: connections, retries, shared memory."""

from __future__ import annotations

import json
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np

from rpd_sb3.contract.teacher import Labels, TeacherError, TeacherUnavailable
from rpd_sb3.teachers.remote.connection import Connection, error_of, refusal
from rpd_sb3.wire.messages import (
    HEADER_LENGTH,
    Message,
    SharedTensor,
    build,
    describe_shared,
    parse,
    read_tensors,
)
from rpd_sb3.wire.shared_memory import Ring, SharedMemoryError, Slot, query_size, region_parameters, unlink
from rpd_sb3.wire.tensors import ProtocolError

logger = logging.getLogger(__name__)
WORTH_SHARING = 2**16
"""Bytes of a query below which shared memory saves nothing."""
MAX_BACKOFF = 2.0
CLOSING = 1.0
"""Seconds that the connections have for ending by themselves."""


class Piece:
    """The part of a query that one server answers.

    :param arrays: input name to ``(n, ...)``; nobody else writes to them
    :param n: rows
    :param parameters: of the request
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], n: int, parameters: Mapping[str, Any]) -> None:
        self.arrays, self.n, self.parameters = dict(arrays), n, dict(parameters)
        self.answer: Future[Labels] = Future()
        self.failures = 0
        self.slot: Slot | None = None
        self.tensors: dict[str, SharedTensor] = {}
        self.generation = 0

    def message(self, shared: bool) -> Message:
        """The request.

        :param shared: True to refer to shared memory
        """
        parameters, entries = self.parameters, []
        if shared and self.slot is not None:
            ring = self.slot.ring
            entries = [describe_shared(name, tensor) for name, tensor in self.tensors.items()]
            parameters = parameters | {
                "shared_memory_generation": self.generation,
                "shared_memory_generation_region": ring.name,
                "shared_memory_generation_offset": self.slot.offset,
            }
        header = {"parameters": parameters | {"binary_data_output": True}}
        message = build(header, "inputs", {} if entries else self.arrays, entries=entries)
        # By this a load balancer keeps a client at one replica: a teacher's memory of it is nowhere else.
        return message._replace(headers={**message.headers, "X-Session-ID": str(self.parameters["client_id"])})


class Replica:
    """One server.

    :param url: of the server, without a path
    :param model: name under which it serves the teacher
    :param token: to show to the server
    :param timeout: seconds for one attempt
    :param n_connections: requests at a time
    :param max_pending: queries that are on their way or wait for a connection; :meth:`submit` waits beyond that
    :param shared_memory: True, False, or None: where it works
    :param failed: says after a failure that may pass whether to ask here again; if not, the piece is in other hands
    """

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None,
        *,
        timeout: float,
        n_connections: int,
        max_pending: int,
        shared_memory: bool | None,
        failed: Callable[[Piece, TeacherUnavailable], bool],
    ) -> None:
        self.url, self.model, self.timeout = url.rstrip("/"), model, timeout
        self.outstanding = 0
        """Rows that are not answered yet."""
        self.down_until = 0.0
        """Not asked before this time.monotonic() if another one can be."""
        self._token = token
        self._failed, self._want_shared = failed, shared_memory
        self._share = shared_memory is not False
        self._ring: Ring | None = None
        self._n_slots = max_pending
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # a semaphore, faster than threading's
        self._queue: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        for _ in range(max_pending):
            self._room.put(None)
        self._own = Connection(self.url, token)
        # Daemons: a server that answers by drops cannot keep the process from ending.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(n_connections)]
        for thread in self._threads:
            thread.start()

    def submit(self, piece: Piece) -> None:
        """Send a piece as soon as there is room; its arrays may be overwritten when this returns.

        :raises TeacherUnavailable: if there is no room within the timeout
        """
        try:
            self._room.get(timeout=self.timeout)
        except queue.Empty:
            raise TeacherUnavailable(f"teacher at {self.url}: {self._n_slots} queries are not answered yet") from None
        with self._lock:
            self.outstanding += piece.n
        piece.answer.add_done_callback(lambda _: self._done(piece))
        if not self._into_shared_memory(piece):
            piece.arrays = {name: np.array(array) for name, array in piece.arrays.items()}
        self._queue.put(piece)

    def resubmit(self, piece: Piece) -> None:
        """Send a piece that has been submitted before, here or to another server."""
        self._queue.put(piece)

    def close(self) -> None:
        """End the connections; what is still on its way fails."""
        self._closing.set()
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))
        if self._ring is not None:
            self._unregister(self._ring)
        self._own.close()

    def _done(self, piece: Piece) -> None:
        with self._lock:
            self.outstanding -= piece.n
        if piece.slot is not None:
            ring = piece.slot.ring
            ring.free.append(piece.slot)
            if ring is not self._ring and ring.idle:
                self._unregister(ring)
        self._room.put(None)

    def _drop(self, slot: Slot | None) -> None:
        """Use the ring of this slot no more."""
        with self._lock:
            if slot is not None and slot.ring is self._ring:
                self._ring = None

    def _unregister(self, ring: Ring) -> None:
        """Have the server forget a ring; one that is gone has forgotten it anyway."""
        with suppress(TeacherUnavailable):
            self._own.post(f"/v2/systemsharedmemory/region/{ring.name}/unregister", b"{}", {}, 1.0)

    def _work(self) -> None:
        connection = Connection(self.url, self._token)
        while (piece := self._queue.get()) is not None:
            while self._attempt(connection, piece):  # in its turn: the next query of a memory must not overtake it
                self._closing.wait(max(self.down_until - time.monotonic(), 0.0))
        connection.close()

    def _attempt(self, connection: Connection, piece: Piece) -> bool:
        """Try once; True if this server is to be asked again after a pause."""
        try:
            piece.answer.set_result(self._exchange(connection, piece))
        except TeacherUnavailable as error:
            piece.failures += 1
            pause = max(error.retry_after, min(0.1 * 2**piece.failures, MAX_BACKOFF))
            self.down_until = time.monotonic() + pause * random.uniform(0.75, 1.25)
            return self._failed(piece, error)
        except Exception as error:  # goes to whoever waits for the answer, not into a thread's traceback
            piece.answer.set_exception(error)
        return False

    def _exchange(self, connection: Connection, piece: Piece) -> Labels:
        path = f"/v2/models/{self.model}/infer"
        shared = piece.slot is not None and piece.slot.ring is self._ring
        response = connection.post(path, *piece.message(shared), self.timeout)
        if response.status == 404 and shared and error_of(response.body)[1] == "UnknownRegion":
            self._drop(piece.slot)  # the server was restarted; a new ring comes next
            response = connection.post(path, *piece.message(shared=False), self.timeout)
        if response.status != 200:
            raise refusal(self.url, response)
        try:
            header, binary = parse(response.body, response.headers.get(HEADER_LENGTH))
            labels = read_tensors(header, "outputs", binary)
        except ProtocolError as error:
            raise TeacherUnavailable(f"teacher at {self.url} sent an answer that cannot be read: {error}") from error
        found = {name: value for name, value in labels.items() if isinstance(value, np.ndarray)}
        for name, value in found.items():
            if len(value) != piece.n:
                raise TeacherError(f"teacher at {self.url} gave {len(value)} rows of {name!r} for {piece.n} queries")
        return found

    def _into_shared_memory(self, piece: Piece) -> bool:
        if not self._share or (size := query_size(piece.arrays)) < WORTH_SHARING:
            return False
        with self._lock:
            if self._ring is None or self._ring.slot_size < size:
                self._new_ring(size)
            ring = self._ring
            if ring is None or not ring.free:
                return False
            piece.slot = ring.free.pop()
        piece.generation, piece.tensors, piece.arrays = piece.slot.write(piece.arrays)
        return True

    def _new_ring(self, size: int) -> None:
        """Slots for queries of this size; the old ring goes with its last query."""
        if self._ring is not None and self._ring.idle:
            self._unregister(self._ring)
        self._ring = None
        try:
            ring = Ring(self._n_slots, size)
            try:
                path = f"/v2/systemsharedmemory/region/{ring.name}/register"
                body = json.dumps(region_parameters(ring.key, ring.region.byte_size)).encode()
                response = self._own.post(path, body, {}, self.timeout)
            finally:
                unlink(ring.key)
            if response.status != 200:
                raise SharedMemoryError(error_of(response.body)[0])
        except TeacherUnavailable:
            return  # not now; the query itself will tell why
        except SharedMemoryError as error:
            if self._want_shared:
                raise TeacherError(f"teacher at {self.url}: no shared memory: {error}") from error
            logger.info("teacher at %s: sending over HTTP, because %s", self.url, error)
            self._share = False
            return
        self._ring = ring
