"""Requests that are wrong in every way, to a live service: it answers each, and neither crashes nor grows."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from rpd_sb3.wire.messages import HEADER_LENGTH, build, describe_shared, parse
from rpd_sb3.wire.shared_memory import FOLDER, Ring, query_size, unlink
from tests.support.raw_client import INFER, infer, labels, raw_request
from tests.support.serving_helpers import free_port, is_ready, wait_for

if not FOLDER.is_dir():
    pytest.skip("no /dev/shm", allow_module_level=True)
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

MEMORY = "/v2/systemsharedmemory"
MODEL = "/v2/models/teacher"
MAX_GROWTH = 4.0
"""MiB that the service may grow after its first requests: buffers of Python's and the C library's allocators."""
WARM = 300
"""Requests before memory is measured for the first time."""
SERVE = "import sys; sys.modules['{without}'] = None; from rpd_sb3.serve.__main__ import main; sys.exit(main())"

ARRAYS = {
    "images.base": np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3),
    "state": np.arange(6, dtype=np.float32).reshape(2, 3),
    "instruction": np.array(["go", "schließe"]),
    "env_id": np.arange(2),
    "episode_start": np.ones(2, bool),
    "action": np.zeros((2, 2), np.float32),
}
PARAMETERS = {"client_id": "fuzz", "sequence": 1, "timeout": 10**7, "binary_data_output": True}
SLOT = query_size(ARRAYS)
PLACE = {"shared_memory_region": "ring", "shared_memory_offset": SLOT, "shared_memory_byte_size": 16}
OUTPUTS = [{"name": "action", "parameters": {"binary_data": True}}]


class Found(NamedTuple):
    """What came of many requests."""

    codes: dict[int, int]
    """HTTP status to how often it came."""
    growth: float
    """MiB, of the service."""


class Wire(NamedTuple):
    """A request, before it is bytes."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


def right_requests() -> list[tuple[dict[str, Any], bytes]]:
    """JSON object and binary part of inference requests; ``ring`` is a region that holds a query in its first slot."""
    plain = {name: array for name, array in ARRAYS.items() if name != "images.base"}
    ring = Ring(1, SLOT)
    unlink(ring.key)
    generation, tensors, _ = ring.free[0].write(ARRAYS)
    place = {"shared_memory_generation": generation, "shared_memory_generation_offset": 0}
    entries = [
        describe_shared(name, tensor._replace(place=tensor.place._replace(region="ring")))
        for name, tensor in tensors.items()
    ]
    shared = {**PARAMETERS, **place, "shared_memory_generation_region": "ring"}
    messages = [
        build({"id": "1", "parameters": PARAMETERS, "outputs": OUTPUTS}, "inputs", ARRAYS),
        build({"parameters": PARAMETERS}, "inputs", {"images.base": ARRAYS["images.base"]}, plain=plain),
        build({"parameters": shared}, "inputs", {}, entries=entries),
        build({"parameters": PARAMETERS, "outputs": [{"name": "action", "parameters": PLACE}]}, "inputs", ARRAYS),
    ]
    parts = [parse(message.body, message.headers.get(HEADER_LENGTH)) for message in messages]
    return [(header, bytes(binary)) for header, binary in parts]


RIGHT = right_requests()
WORDS = ["FP32", "UINT8", "BYTES", "BOOL", "FP16", "INT64", "FP64", "ring", "x" * 300]
WORDS += ["", "state", "images.base", "instruction", "env_id", "action", "\ud800", "\x00", "../etc"]
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 6, 8, 16, 24, 64, 4096, 4097, 2**31, 2**40, 2**63 - 1, 2**63, 2**64, 10**30, -1]),
    st.integers(),
    st.floats(allow_nan=True),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(WORDS), st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=8,
)
REGION = f"{MEMORY}/region/ring"
ROUTES = ["/", "/metrics", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/%00", "//", "/v2/%ff"]
ROUTES += [MODEL, f"{MODEL}/ready", "/v2/models/other/infer"]
ROUTES += [f"{REGION}/register", f"{REGION}/status", f"{REGION}/unregister", f"{MEMORY}/status", f"{MEMORY}/unregister"]
HEADERS = ["Content-Type", "Content-Encoding", "Authorization", "Accept", "Host", "Connection", "Expect", HEADER_LENGTH]


def places(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something in a JSON value could be replaced."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def change_json(draw: Any, header: dict[str, Any]) -> None:
    """Replace, remove, repeat or add something."""
    found = list(places(header))
    if not found:
        return
    *way, key = draw(st.sampled_from(found))
    holder: Any = header
    for step in way:
        holder = holder[step]
    how = draw(st.sampled_from(["replace", "replace", "remove", "repeat", "add"]))
    if how == "replace":
        holder[key] = draw(VALUES)
    elif how == "remove":
        del holder[key]
    elif how == "repeat" and isinstance(holder, list):
        holder.append(deepcopy(holder[key]))
    elif isinstance(holder, dict):
        holder[draw(st.sampled_from([*PLACE, *PARAMETERS, "data", "shape", "parameters"]))] = draw(VALUES)


def change_bytes(draw: Any, content: bytes) -> bytes:
    """Replace, remove or add some."""
    at = draw(st.integers(0, len(content)))
    return content[:at] + draw(st.binary(max_size=6)) + content[at + draw(st.integers(0, 8)) :]


def other_route(draw: Any) -> Wire:
    region = st.fixed_dictionaries({"key": st.sampled_from(WORDS), "offset": NUMBERS, "byte_size": NUMBERS})
    body = draw(
        st.one_of(st.binary(max_size=64), st.one_of(VALUES, region).map(lambda value: json.dumps(value).encode()))
    )
    method = draw(st.sampled_from(["GET", "POST", "PUT", "HEAD"]))
    return Wire(method, draw(st.sampled_from(ROUTES)), {"Content-Length": str(len(body))}, body)


@st.composite
def wires(draw: Any) -> Wire:
    """A request that was right before it was changed."""
    rarely = st.integers(0, 15).map(lambda number: number == 15)
    if draw(rarely):
        return other_route(draw)
    header, binary = deepcopy(draw(st.sampled_from(RIGHT)))
    header["parameters"].update(client_id=f"fuzz{draw(st.integers(0, 50))}", sequence=draw(st.integers(0, 3)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 2, 3]))):
        change_json(draw, header)
    head = json.dumps(header).encode()
    length = str(len(head))
    if draw(rarely):
        head = change_bytes(draw, head)
    if draw(rarely):
        binary = change_bytes(draw, binary)
    if draw(rarely):
        binary = binary[: draw(st.integers(0, len(binary)))]
    if draw(rarely):
        length = str(draw(st.one_of(NUMBERS, st.sampled_from(["", "x", "0x1", "\xb2", "9" * 5000, "1, 2"]))))
    headers = {HEADER_LENGTH: length} if binary or draw(st.booleans()) else {}
    if draw(rarely):
        text = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=20)
        headers[draw(st.sampled_from(HEADERS))] = draw(text)
    body = head + binary
    if draw(rarely):
        cut = draw(st.integers(1, len(body)))
        chunks = [chunk for chunk in (body[:cut], body[cut:]) if chunk]
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
        return Wire("POST", INFER, {**headers, "Transfer-Encoding": "chunked"}, body)
    return Wire("POST", INFER, {**headers, "Content-Length": str(len(body))}, body)


class Connection:
    """Sends one request after the other, on the same socket as long as the service keeps it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.socket: socket.socket | None = None

    def ask(self, wire: Wire) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        while True:
            fresh = self.socket is None
            if self.socket is None:
                self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=30)
            try:
                self.socket.sendall(raw_request(wire.body, wire.headers, wire.method, wire.path))
                response = http.client.HTTPResponse(self.socket, method=wire.method)
                response.begin()
                body = response.read()
            except (ConnectionError, http.client.RemoteDisconnected):
                self.close()
                if fresh:
                    raise
                continue  # the service closed it after the request before
            if response.will_close:
                self.close()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, body

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = None


@contextmanager
def served(stateful: bool, without: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The command with a FuzzTeacher, and its port."""
    port = free_port()
    command = [sys.executable, "-c", SERVE.format(without=without), "--port", str(port)]
    command += ["--teacher", "tests.support.raw_client:FuzzTeacher", "--teacher-kwargs", f"stateful:{stateful}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"))
        yield process, port
    finally:
        process.kill()
        process.wait()


def memory_of(process: subprocess.Popen[bytes]) -> float:
    """MiB that the process holds of its own."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def fuzz(n: int, stateful: bool, without: str) -> Found:
    """Send ``n`` requests, others for each kind of service, and count what came back.

    :param stateful: a teacher with a memory
    :param without: the module of an HTTP parser that uvicorn cannot find, so that it takes the other one
    """
    codes: Counter[int] = Counter()
    memory: list[float] = []
    ring = Ring(2, SLOT)
    place = json.dumps({"key": ring.key, "offset": 0, "byte_size": ring.region.byte_size}).encode()
    register = Wire("POST", f"{MEMORY}/region/ring/register", {"Content-Length": str(len(place))}, place)
    with served(stateful, without) as (process, port):
        connection = Connection(port)

        @seed(2 * stateful + (without == "h11"))
        @settings(max_examples=n, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(wires())
        def one(wire: Wire) -> None:
            done = codes.total()
            if done % 50 == 0:  # a request may have unregistered it, or had its answer written there
                ring.free[0].counter()[0] = 0
                ring.free[0].write(ARRAYS)
                connection.ask(register)
            if done >= WARM and done % 100 == 0:
                memory.append(memory_of(process))
            status, headers, body = connection.ask(wire)
            codes[status] += 1
            assert process.poll() is None
            assert status < 500 or status == 503, body
            if status >= 400 and headers.get("content-type") == "application/json" and wire.method != "HEAD":
                assert json.loads(body)["error"]

        try:
            one()
        finally:
            unlink(ring.key)
            connection.close()
        answer = infer(f"http://127.0.0.1:{port}", ARRAYS, client_id="last", sequence=0)
        np.testing.assert_array_equal(labels(answer)["action"], np.tanh(ARRAYS["state"][:, :2]))
    return Found(dict(codes), memory[-1] - memory[0])


@pytest.mark.parametrize("without", ["h11", "httptools"])
def test_service_answers_whatever_it_is_asked(without: str) -> None:
    found = fuzz(400, stateful=without == "h11", without=without)
    assert found.codes[200] > 20
    assert found.codes[400] > 50


@pytest.mark.slow
@pytest.mark.parametrize("without", ["h11", "httptools"])
@pytest.mark.parametrize("stateful", [False, True])
def test_service_does_not_grow(stateful: bool, without: str) -> None:
    found = fuzz(5000, stateful, without)
    print(found)
    assert found.growth < MAX_GROWTH
