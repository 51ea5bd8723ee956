"""A policy server as openpi's, on loopback: metadata first, then one answer for each observation.

Written after openpi's ``websocket_policy_server``, with msgpack and nothing of our library.
"""

from __future__ import annotations

import asyncio
import http
import inspect
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import websockets
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

Infer = Callable[[dict[str, Any]], Any]


class Raw(bytes):
    """An answer that is sent as it is."""


def pack(content: Any) -> bytes:
    """openpi's format: arrays and NumPy's numbers as maps of binary keys."""

    def encode(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        assert isinstance(value, np.generic)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}

    return msgpack.packb(content, default=encode)


def unpack(data: bytes) -> Any:
    """Trusts what it reads, as openpi does."""

    def decode(value: dict[Any, Any]) -> Any:
        if b"__ndarray__" in value:
            return np.ndarray(buffer=value[b"data"], dtype=np.dtype(value[b"dtype"]), shape=value[b"shape"])
        return value

    return msgpack.unpackb(data, object_hook=decode)


class OpenPIServer:
    """A running server.

    :param infer: observation to response; may be a coroutine function, else it blocks the server as openpi's do
    """

    def __init__(self, infer: Infer, metadata: Any, api_key: str | None) -> None:
        self.infer, self.metadata, self.api_key = infer, metadata, api_key
        self.observations: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.connections: set[ServerConnection] = set()
        self.n_connections = 0
        self.url = ""
        self.loop: asyncio.AbstractEventLoop | None = None

    def drop(self) -> None:
        """Break all connections, as a machine that restarts does."""
        assert self.loop is not None
        for connection in list(self.connections):
            self.loop.call_soon_threadsafe(connection.transport.abort)

    def check(self, connection: ServerConnection, request: Request) -> Response | None:
        self.headers.append(request.headers)
        if request.path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if self.api_key and request.headers.get("Authorization") != f"Api-Key {self.api_key}":
            return connection.respond(http.HTTPStatus.FORBIDDEN, "who are you?\n")
        return None

    async def handle(self, connection: ServerConnection) -> None:
        self.n_connections += 1
        self.connections.add(connection)
        first = self.metadata
        await connection.send(first if isinstance(first, (Raw, str)) else pack(first))
        previous = None
        try:
            while True:
                start = time.monotonic()
                observation = unpack(await connection.recv())
                self.observations.append(observation)
                answer = self.infer(observation)
                if inspect.isawaitable(answer):
                    answer = await answer
                if not isinstance(answer, Raw):
                    timing = {"infer_ms": 1000 * (time.monotonic() - start)}
                    answer["server_timing"] = timing if previous is None else timing | {"prev_total_ms": previous}
                    answer = pack(answer)
                await connection.send(answer)
                previous = 1000 * (time.monotonic() - start)
        except websockets.ConnectionClosed:
            pass
        except Exception:
            await connection.send(traceback.format_exc())
            await connection.close(1011, "Internal server error. Traceback included in previous frame.")
        finally:
            self.connections.discard(connection)


@contextmanager
def openpi_server(
    infer: Infer, metadata: Any = None, api_key: str | None = None, port: int = 0
) -> Iterator[OpenPIServer]:
    """The server in a thread of this process.

    :param infer: observation to response
    :param metadata: what it sends first; text and Raw as they are
    :param api_key: that it wants
    :param port: 0: any that is free
    """
    server = OpenPIServer(infer, {} if metadata is None else metadata, api_key)
    started, stop = threading.Event(), asyncio.Event()

    async def run() -> None:
        server.loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"compression": None, "max_size": None, "process_request": server.check}
        listening = await serve(server.handle, "127.0.0.1", port, **options)
        server.url = address(listening)
        started.set()
        await stop.wait()
        server.drop()
        listening.server.close()  # asyncio.run() cancels what is still being answered

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(5)
    try:
        yield server
    finally:
        assert server.loop is not None
        server.loop.call_soon_threadsafe(stop.set)
        thread.join(5)
        assert not thread.is_alive(), "the server did not stop"


def address(listening: Server) -> str:
    """``HOST:PORT``"""
    host, port = next(iter(listening.sockets)).getsockname()[:2]
    return f"{host}:{port}"


def later(seconds: float, answer: Infer) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """An ``infer`` that takes its time and lets others go first meanwhile."""

    async def infer(observation: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(seconds)
        return answer(observation)

    return infer
