"""A proxy in front of a teacher service that does to some answers what networks and crashes do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import requests


class FaultyProxy(ThreadingHTTPServer):
    """Passes everything on to ``target``, except that the next inference requests meet ``faults``, first come first served.

    hang: no answer. trickle: a byte every 50 ms. truncate: half of the announced bytes. reset: the connection breaks off.
    garbage: bytes that are no message. overflow: 503, come back at once. bad gateway: 502 without a reason.
    """

    daemon_threads = True

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.faults: list[str] = []
        self.n_infer = 0
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def faulty(target: str) -> Iterator[FaultyProxy]:
    """The proxy, running."""
    proxy = FaultyProxy(target)
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.release.set()
        proxy.shutdown()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyProxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(requests.get(self.server.target + self.path, timeout=10))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = None
        if self.path.endswith("/infer"):
            self.server.n_infer += 1
            fault = self.server.faults.pop(0) if self.server.faults else None
        headers = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "content-length")}
        if fault is None:
            self._answer(requests.post(self.server.target + self.path, data=body, headers=headers, timeout=10))
        elif fault == "hang":
            self.server.release.wait()
            self.close_connection = True
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault in ("overflow", "bad gateway"):
            code, text = (
                (503, b'{"error": "the queue is full", "type": "Busy"}') if fault == "overflow" else (502, b"oops")
            )
            self.send_response(code)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)
        elif fault == "garbage":
            self.send_response(200)
            self.send_header("Content-Length", "7")
            self.end_headers()
            self.wfile.write(b"garbage")
        else:
            self._answer(requests.post(self.server.target + self.path, data=body, headers=headers, timeout=10), fault)

    def _answer(self, response: requests.Response, fault: str | None = None) -> None:
        self.send_response(response.status_code)
        for key, value in response.headers.items():
            if key.lower() not in ("server", "date", "connection", "transfer-encoding"):
                self.send_header(key, value)
        self.end_headers()
        content = response.content
        if fault == "truncate":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
        elif fault == "trickle":
            for i in range(len(content)):
                try:
                    self.wfile.write(content[i : i + 1])
                except OSError:  # the client has lost patience
                    break
                if self.server.release.wait(0.05):
                    break
            self.close_connection = True
        else:
            self.wfile.write(content)
