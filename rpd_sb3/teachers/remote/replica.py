"""One server of a teacher service, as its client sees it: connections, load, shared memory."""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import numpy as np

from rpd_sb3.contract.teacher import Labels, TeacherError, TeacherUnavailable
from rpd_sb3.teachers.remote.http import PATIENCE, Connection, error_of, refusal
from rpd_sb3.wire.messages import HEADER_LENGTH, Message, SharedTensor, build, describe_shared, parse, read_tensors
from rpd_sb3.wire.shared_memory import Ring, SharedMemoryError, Slot, query_size, unlink
from rpd_sb3.wire.tensors import ProtocolError

logger = logging.getLogger(__name__)
WORTH_SHARING = 2**16
"""Bytes of a query below which shared memory saves nothing."""
DOWN = 1.0
"""Seconds for which a replica that has failed is left alone, if there is another one."""
MEMORY = 0.9
"""Weight of the answers before in the measurement of a replica's speed, after each further answer."""
STALE = 60.0
"""Seconds without an answer after which the measurement says nothing about a replica any more."""
CLOSING = 1.0
"""Seconds that the connections have for ending by themselves."""


class Piece:
    """The part of a query that one server answers.

    :param arrays: input name to ``(n, ...)``; nobody else writes to them
    :param n: rows
    :param parameters: of the request
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], n: int, parameters: Mapping[str, Any]) -> None:
        self.arrays = dict(arrays)
        self.n = n
        self.parameters = dict(parameters)
        self.answer: Future[Labels] = Future()
        self.tried: list[Replica] = []
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
    :param timeout: seconds for an answer
    :param n_connections: requests at a time
    :param max_pending: queries that are on their way or wait for a connection; :meth:`submit` waits beyond that
    :param shared_memory: True, False, or None: where it works
    :param elsewhere: the replica that is to answer a piece that could not be answered here; None: there is none
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
        elsewhere: Callable[[Piece], Replica | None],
    ) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout
        self.outstanding = 0
        """Rows that are not answered yet."""
        self.down_until = 0.0
        """Not asked before this time.monotonic() if another one can be."""
        self._token = token
        self._elsewhere = elsewhere
        self._want_shared = shared_memory
        self._share = shared_memory is not False
        self._failing = False
        self._rows = 0.0
        self._seconds = 0.0
        self._last_answer = -math.inf
        self._ring: Ring | None = None
        self._n_slots = max_pending
        self._lock = threading.Lock()  # of what answers change; nothing waits while it is held
        self._making_ring = threading.Lock()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # a semaphore, faster than threading's
        self._queue: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        for _ in range(max_pending):
            self._room.put(None)
        self._own = Connection(self.url, token)
        # Daemons: a server that answers by drops cannot keep the process from ending.
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(n_connections)]
        for thread in self._threads:
            thread.start()

    @property
    def has_room(self) -> bool:
        """True if :meth:`submit` would not wait."""
        return not self._room.empty()

    @property
    def rate(self) -> float | None:
        """Rows per second of the last answers; None before the first one."""
        with self._lock:
            return self._rows / max(self._seconds, 1e-6) if self._rows else None

    def is_stale(self, now: float) -> bool:
        """True if nothing is known of how fast it is now, because it has not been asked for a while."""
        return self.outstanding == 0 and now - self._last_answer > STALE

    def submit(self, piece: Piece) -> None:
        """Send a piece as soon as there is room; its arrays may be overwritten when this returns.

        :raises TeacherUnavailable: if there is no room within the timeout, or none at once after a failure
        """
        try:
            self._room.get(timeout=0.0 if self._failing else self.timeout)
        except queue.Empty:
            raise TeacherUnavailable(f"teacher at {self.url}: {self._n_slots} queries are not answered yet") from None
        piece.answer.add_done_callback(lambda _: self._free(piece))
        if not self._into_shared_memory(piece):
            piece.arrays = {name: np.array(array) for name, array in piece.arrays.items()}
        self.send(piece)

    def send(self, piece: Piece) -> None:
        """Send a piece that has been submitted, here or to another replica."""
        with self._lock:
            self.outstanding += piece.n
        self._queue.put(piece)

    def close(self) -> None:
        """End the connections; what is still on its way may fail."""
        for _ in self._threads:
            self._queue.put(None)
        end = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))
        if self._ring is not None:
            self._unregister(self._ring)
        self._own.close()

    def _free(self, piece: Piece) -> None:
        """Give back what an answered piece has taken."""
        if piece.slot is not None:
            ring = piece.slot.ring
            ring.free.append(piece.slot)
            if ring is not self._ring and ring.idle:
                self._unregister(ring)
        self._room.put(None)

    def _unregister(self, ring: Ring) -> None:
        """Have the server forget a ring; one that is gone has forgotten it anyway."""
        with suppress(TeacherUnavailable):
            self._own.post(f"/v2/systemsharedmemory/region/{ring.name}/unregister", b"{}", {}, 1.0)

    def _work(self) -> None:
        connection = Connection(self.url, self._token)
        while (piece := self._queue.get()) is not None:
            self._attempt(connection, piece)
        connection.close()

    def _attempt(self, connection: Connection, piece: Piece) -> None:
        """Ask once; a piece that may be answered elsewhere goes on to another replica."""
        piece.tried.append(self)
        sent = time.monotonic()
        labels: Labels = {}
        error: Exception | None = None
        try:
            labels = self._exchange(connection, piece)
        except Exception as caught:  # it belongs to the answer, not into a thread's traceback
            error = caught
        now = time.monotonic()
        with self._lock:
            self.outstanding -= piece.n
            if error is None:
                self._failing = False
                self.down_until = 0.0
                # Pieces are answered one after the other, or together: the time since the answer before is this one's.
                self._seconds = MEMORY * self._seconds + now - max(sent, self._last_answer)
                self._rows = MEMORY * self._rows + piece.n
                self._last_answer = now
            elif isinstance(error, TeacherUnavailable):
                self._failing = True
                self.down_until = now + max(error.retry_after, DOWN)
        other = self._elsewhere(piece) if isinstance(error, TeacherUnavailable) else None
        if error is None:
            piece.answer.set_result(labels)
        elif other is None:
            piece.answer.set_exception(error)
        else:
            logger.info("asking %s instead: %s", other.url, error)
            other.send(piece)

    def _exchange(self, connection: Connection, piece: Piece) -> Labels:
        path = f"/v2/models/{self.model}/infer"
        shared = piece.slot is not None and piece.slot.ring is self._ring
        response = connection.post(path, *piece.message(shared), self.timeout)
        if response.status == 404 and shared and error_of(response.body)[1] == "UnknownRegion":
            with self._lock:  # the server was restarted; a new ring comes next
                if piece.slot is not None and piece.slot.ring is self._ring:
                    self._ring = None
            response = connection.post(path, *piece.message(shared=False), self.timeout)
        if response.status != 200:
            raise refusal(self.url, response)
        try:
            header, binary = parse(response.body, response.headers.get(HEADER_LENGTH))
            labels = read_tensors(header, "outputs", binary)
        except ProtocolError as error:
            raise TeacherUnavailable(f"teacher at {self.url} sent an answer that cannot be read: {error}") from error
        return {name: value for name, value in labels.items() if isinstance(value, np.ndarray)}

    def _into_shared_memory(self, piece: Piece) -> bool:
        if not self._share or (size := query_size(piece.arrays)) < WORTH_SHARING:
            return False
        with self._making_ring:
            if (self._ring is None or self._ring.slot_size < size) and not self._failing:
                self._replace_ring(size)
        with self._lock:
            ring = self._ring
            if ring is None or ring.slot_size < size or not ring.free:
                return False
            piece.slot = ring.free.pop()
        piece.generation, piece.tensors, piece.arrays = piece.slot.write(piece.arrays)
        return True

    def _replace_ring(self, size: int) -> None:
        """Slots for queries of this size; the old ring goes with its last query."""
        with self._lock:
            old = self._ring
            self._ring = None
        if old is not None and old.idle:
            self._unregister(old)
        try:
            ring = self._registered_ring(size)
        except TeacherUnavailable:
            self._failing = True  # no ring for now; the query itself will tell why
            return
        except SharedMemoryError as error:
            if self._want_shared:
                raise TeacherError(f"teacher at {self.url}: no shared memory: {error}") from error
            logger.info("teacher at %s: sending over HTTP, because %s", self.url, error)
            self._share = False
            return
        with self._lock:
            self._ring = ring

    def _registered_ring(self, size: int) -> Ring:
        ring = Ring(self._n_slots, size)
        try:
            path = f"/v2/systemsharedmemory/region/{ring.name}/register"
            body = json.dumps({"key": ring.key, "offset": 0, "byte_size": ring.region.byte_size}).encode()
            response = self._own.post(path, body, {}, PATIENCE)
        finally:
            unlink(ring.key)
        if response.status != 200:
            raise SharedMemoryError(error_of(response.body)[0])
        return ring
