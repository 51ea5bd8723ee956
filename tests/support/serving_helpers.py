"""A teacher service inside a test: the real server on loopback, in a thread or in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import requests
import uvicorn

from rpd_sb3.serve.address import bind
from rpd_sb3.serve.app import Service, make_app
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.teachers import Teacher
from tests.support.helpers import EchoTeacher


class Running(NamedTuple):
    """A service that answers."""

    url: str
    engine: Engine
    server: uvicorn.Server


@contextmanager
def serving(
    load: Callable[[], Teacher] = EchoTeacher,
    *,
    port: int = 0,
    token: str | None = None,
    max_body: int = 2**28,
    wait: bool = True,
    shared_memory: bool = True,
    **engine: Any,
) -> Iterator[Running]:
    """The service in a thread of this process.

    :param load: makes the teacher
    :param port: 0: any that is free
    :param wait: for the teacher to be loaded
    :param shared_memory: take it
    :param engine: arguments of Engine
    """
    owner = Engine(load, Metrics(), **engine)
    app = make_app(Service(owner, "teacher", max_body, shared_memory), token)
    listener = bind("127.0.0.1", port)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    running = Running(f"http://127.0.0.1:{listener.getsockname()[1]}", owner, server)
    try:
        wait_for(lambda: server.started and (not wait or owner.ready or owner.error is not None))
        yield running
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@contextmanager
def serving_process(*arguments: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """``python -m rpd_sb3.serve`` with these arguments, ready to answer; killed at the end."""
    command = [sys.executable, "-m", "rpd_sb3.serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: process.poll() is not None or is_ready(f"http://127.0.0.1:{port}"))
        yield process
    finally:
        process.kill()
        process.communicate()


def is_ready(url: str) -> bool:
    """True if a service there answers queries."""
    try:
        return requests.get(f"{url}/v2/health/ready", timeout=1).status_code == 200
    except requests.RequestException:
        return False


def free_port() -> int:
    """A port of this machine that is free."""
    with bind("127.0.0.1", 0) as listener:
        return listener.getsockname()[1]


def wait_for(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Return as soon as the condition holds; an AssertionError if it does not in time."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def states(n: int, width: int = 3) -> np.ndarray:
    """(n, width) float32, all different: what EchoTeacher echoes is columns 1 and 2."""
    return np.arange(n * width, dtype=np.float32).reshape(n, width)
