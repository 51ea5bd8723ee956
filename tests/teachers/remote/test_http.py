"""Connections to a teacher service, against a server of the standard library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rpd_sb3.contract.teacher import TeacherUnavailable
from rpd_sb3.teachers.remote.http import Connection, Response, refusal

n_connections = 0


class Doubler(BaseHTTPRequestHandler):
    """Answers with what was sent, twice."""

    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        global n_connections
        n_connections += 1
        super().setup()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])) * 2
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Got", self.headers.get("X-Give", "nothing"))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def connection() -> Iterator[Connection]:
    global n_connections
    n_connections = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Doubler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    connection = Connection(f"http://127.0.0.1:{server.server_address[1]}", None)
    yield connection
    connection.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_requests_share_a_socket_and_nothing_else(connection: Connection, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    first = connection.post("/double", body, {"X-Give": "first"}, 10)
    second = connection.post("/double", b"ab", {}, 10)
    assert (first.status, first.body, first.headers["X-Got"]) == (200, body * 2, "first")
    assert (second.body, second.headers["X-Got"]) == (b"abab", "nothing")
    assert n_connections == 1


def test_nobody_there_is_one_sentence() -> None:
    connection = Connection("http://127.0.0.1:1", None)
    with pytest.raises(TeacherUnavailable, match=r"^teacher at http://127.0.0.1:1: .*refused"):
        connection.post("/", b"", {}, 1)


@pytest.mark.parametrize(
    ("status", "body", "passes", "wait"),
    [
        (503, b'{"error": "the queue is full", "type": "Busy"}', True, 3.0),
        (502, b"Bad Gateway", True, 3.0),
        (500, b'{"error": "the teacher failed", "type": "TeacherError"}', False, 0.0),
        (400, b'{"error": "no JSON"}', False, 0.0),
    ],
)
def test_refusal_says_whether_it_may_pass(status: int, body: bytes, passes: bool, wait: float) -> None:
    error = refusal("http://box", Response(status, {"Retry-After": "3"}, body))
    assert isinstance(error, TeacherUnavailable) == passes
    assert getattr(error, "retry_after", 0.0) == wait
    assert str(error).startswith(f"teacher at http://box answered {status}: ")
