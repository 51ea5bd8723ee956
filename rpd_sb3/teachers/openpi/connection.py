"""One connection to an openpi server: a question, its answer, a deadline for both, and what its errors mean."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any
from urllib.parse import urlsplit

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidMessage, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from rpd_sb3.contract.teacher import TeacherError, TeacherUnavailable
from rpd_sb3.teachers.openpi.messages import unpack
from rpd_sb3.wire.tensors import ProtocolError

MAX_BYTES = 2**26
"""Of one message of the server: a chunk of actions, or its metadata."""
TCP_PATIENCE = 5.0
"""Seconds for a machine to accept a connection; the server behind it may take longer to say something."""
TOO_BIG = 1009
"""Close code of a message that is too big (RFC 6455, section 7.4.1)."""


class Connection:
    """Connects when it is first asked, and again after a failure. One thread at a time may ask.

    A server speaks first: its metadata. Then it answers one observation after the other. What goes wrong there comes as
    text, a traceback, before it closes the connection. Source: openpi's ``websocket_policy_server``.

    :param url: of the server, ws:// or wss://
    :param api_key: to show to it; None: no key
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else {}
        self._stack = ExitStack()
        self._socket: socket.socket | None = None
        self._websocket: ClientConnection | None = None
        self._metadata: Mapping[str, Any] = {}
        self._ended = False

    def ask(self, message: bytes | None, timeout: float) -> Mapping[str, Any]:
        """The answer to one observation.

        :param message: the observation, packed; None: what the server says about itself
        :param timeout: seconds for all of it, connecting included
        :raises TeacherUnavailable: if there is no answer in time, or no connection
        :raises TeacherError: if the server failed, wants another API key, or is not an openpi server
        """
        deadline = time.monotonic() + timeout
        try:
            if self._ended:
                raise TeacherError("the teacher is closed")
            websocket = self._open(deadline) if self._websocket is None else self._websocket
            return self._metadata if message is None else self._exchange(websocket, message, deadline)
        except (OSError, WebSocketException, ProtocolError, TeacherError) as error:
            self.close()  # a late answer would be taken for the next one
            if self._ended:
                raise TeacherError("the teacher is closed") from error
            raise self._explain(error, timeout) from error

    def end(self) -> None:
        """Close the connection, and never open it again. Another thread may be asking: it fails at once."""
        self._ended = True
        _shut(self._socket)

    def close(self) -> None:
        """Close the connection; the next question opens another one."""
        _shut(self._socket)  # without it the library would wait for the server to say goodbye
        with suppress(OSError, WebSocketException):
            self._stack.close()
        if self._socket is not None:
            self._socket.close()
        self._websocket = None
        self._socket = None

    def _open(self, deadline: float) -> ClientConnection:
        # Our own socket, so that end() can shut it while the library still waits for the server's greeting.
        self._socket = self._connect_socket(min(_left(deadline), TCP_PATIENCE))
        if self._ended:
            raise TeacherError("the teacher is closed")
        self._websocket = self._stack.enter_context(
            connect(
                self.url,
                sock=self._socket,
                additional_headers=self._headers,
                compression=None,  # as openpi's client
                max_size=MAX_BYTES,
                open_timeout=max(_left(deadline), 0.001),
                # openpi's server infers on its event loop and answers no ping meanwhile: the first answer, which waits for
                # a compiler, would be lost to a keepalive of 20 s.
                ping_interval=None,
            )
        )
        self._metadata = self._receive(self._websocket, deadline)
        return self._websocket

    def _connect_socket(self, patience: float) -> socket.socket:
        parts = urlsplit(self.url)
        address = (parts.hostname or "", parts.port or (443 if parts.scheme == "wss" else 80))
        try:
            connected = socket.create_connection(address, timeout=max(patience, 0.001))
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {patience:.3g} s") from error
        connected.settimeout(None)
        return connected

    def _exchange(self, websocket: ClientConnection, message: bytes, deadline: float) -> Mapping[str, Any]:
        # The library sends without a deadline, and a server that infers reads nothing.
        alarm = threading.Timer(_left(deadline), _shut, (self._socket,))
        alarm.daemon = True
        alarm.start()
        try:
            websocket.send(message)
        except ConnectionClosed as error:
            if _left(deadline) <= 0:
                raise TimeoutError from error
            raise
        finally:
            alarm.cancel()
        return self._receive(websocket, deadline)

    def _receive(self, websocket: ClientConnection, deadline: float) -> Mapping[str, Any]:
        data = websocket.recv(timeout=max(_left(deadline), 0.0))
        if isinstance(data, str):
            lines = data.strip().splitlines() or ["nothing"]
            raise TeacherError(f"openpi server at {self.url} failed: {lines[-1].strip()[:500]}")
        content = unpack(data)
        if not isinstance(content, dict):
            raise TeacherError(f"openpi server at {self.url} sent {type(content).__name__}, expected a map")
        return content

    def _explain(self, error: Exception, timeout: float) -> TeacherError:
        """One sentence; a TeacherUnavailable if asking again may help."""
        who = f"openpi server at {self.url}"
        if isinstance(error, TeacherError):
            return error
        if isinstance(error, ProtocolError):
            return TeacherError(f"{who} sent what cannot be read: {error}")
        if isinstance(error, TimeoutError):
            return TeacherUnavailable(f"{who} gave no answer within {timeout:g} s")
        if isinstance(error, InvalidStatus):
            status = error.response.status_code
            if status in (401, 403):
                return TeacherError(f"{who} wants another API key (HTTP {status})")
            kind = TeacherUnavailable if status >= 500 else TeacherError
            return kind(f"{who} answered HTTP {status} instead of opening a WebSocket")
        if isinstance(error, InvalidMessage) and isinstance(error.__cause__, EOFError):
            return TeacherUnavailable(f"{who} closed the connection")  # while it was opening: on its way down
        if isinstance(error, InvalidHandshake):
            return TeacherError(f"{who} is not a WebSocket server: {error}")
        if isinstance(error, ConnectionClosed):
            codes = [close.code for close in (error.rcvd, error.sent) if close is not None]
            if TOO_BIG in codes:
                return TeacherError(f"{who}: a message is too big, its own may have {MAX_BYTES} bytes")
            return TeacherUnavailable(f"{who} closed the connection: {error}")
        return TeacherUnavailable(f"{who}: {error}")


def _left(deadline: float) -> float:
    """Seconds until then."""
    return deadline - time.monotonic()


def _shut(connected: socket.socket | None) -> None:
    """End all waiting for this socket, in whatever thread."""
    if connected is not None:
        with suppress(OSError):
            connected.shutdown(socket.SHUT_RDWR)
