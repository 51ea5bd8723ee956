"""Queries to a teacher service without RemoteTeacher, so that they can be wrong; teachers that a test can hold."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import requests

from rpd_sb3.teachers import Labels, Query
from rpd_sb3.wire.messages import HEADER_LENGTH, SharedTensor, build, describe_shared, parse, read_tensors
from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import states

INFER = "/v2/models/teacher/infer"


def post(url: str, body: bytes, headers: Mapping[str, str] | None = None, path: str = INFER) -> requests.Response:
    """A POST request on a connection of its own."""
    return requests.post(url + path, data=body, headers=headers, timeout=30)


def infer(
    url: str,
    arrays: Mapping[str, np.ndarray] | None = None,
    outputs: Any = None,
    shared: Mapping[str, SharedTensor] | None = None,
    **parameters: Any,
) -> requests.Response:
    """An inference request as RemoteTeacher would send it; by default two rows for an EchoTeacher."""
    header: dict[str, Any] = {"parameters": {"binary_data_output": True, **parameters}}
    if outputs is not None:
        header["outputs"] = outputs
    entries = [describe_shared(name, tensor) for name, tensor in (shared or {}).items()]
    message = build(header, "inputs", {"state": states(2)} if arrays is None else arrays, entries=entries)
    return post(url, message.body, message.headers)


def ask(
    url: str, client: str, number: int | None, env_ids: list[int], start: bool, **parameters: Any
) -> requests.Response:
    """A query for a teacher with a memory."""
    n = len(env_ids)
    arrays = {"state": states(n), "env_id": np.array(env_ids), "episode_start": np.full(n, start)}
    if number is not None:
        parameters["sequence"] = number
    return infer(url, arrays, client_id=client, **parameters)


def assert_refused(response: requests.Response, code: int, reason: str) -> None:
    """The response has this status, and its error says this."""
    assert response.status_code == code, response.text
    assert reason in response.json()["error"]


def labels(response: requests.Response) -> dict[str, np.ndarray]:
    """What the response to an inference request says."""
    assert response.status_code == 200, response.text
    header, binary = parse(response.content, response.headers.get(HEADER_LENGTH))
    return {name: np.asarray(value) for name, value in read_tensors(header, "outputs", binary).items()}


def connect(url: str) -> socket.socket:
    """A bare connection."""
    host = urlsplit(url)
    return socket.create_connection((host.hostname, host.port), timeout=30)


def raw_request(body: bytes, headers: Mapping[str, str], method: str = "POST", path: str = INFER) -> bytes:
    """An HTTP request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{key}: {value}" for key, value in headers.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class HeldTeacher(EchoTeacher):
    """Answers when it may: ``entered`` counts its calls, ``go`` lets it answer them all."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = 0
        super().__init__(self._hold)

    def _hold(self, query: Query) -> np.ndarray:
        self.entered += 1
        assert self.go.wait(30), "the test did not let the teacher go"
        return query.inputs["state"][:, 1:3]

    @property
    def sizes(self) -> list[int]:
        """Rows of each call."""
        return [len(query.env_ids) for query in self.queries]


class CountingTeacher(EchoTeacher):
    """With a memory: its action is (queries so far in this episode, slot), for each environment."""

    def __init__(self, before: Callable[[Query], object] = lambda query: None) -> None:
        super().__init__(self._count)
        self.spec = replace(self.spec, name="counting", stateful=True)
        self.counts: dict[int, int] = {}
        self._before = before

    def _count(self, query: Query) -> np.ndarray:
        self._before(query)
        for slot, start in zip(query.env_ids, query.episode_starts):
            self.counts[int(slot)] = 1 if start else self.counts[int(slot)] + 1
        return np.array([[self.counts[int(slot)], slot] for slot in query.env_ids], np.float32)


class FifoTeacher(EchoTeacher):
    """For a process of its own: a query waits until a FIFO is written to.

    :param path: of the FIFO; opening it for writing waits until a query is there
    """

    def __init__(self, path: str) -> None:
        super().__init__(lambda query: (Path(path).read_bytes(), query.inputs["state"][:, 1:3])[1])


class BrokenTeacher(EchoTeacher):
    """Cannot be loaded."""

    def __init__(self) -> None:
        raise ArithmeticError("the weights do not add up")


class FuzzTeacher(EchoTeacher):
    """For a process of its own: takes every kind of input, and has a finite answer to everything.

    :param stateful: with a memory
    """

    def __init__(self, stateful: bool = False) -> None:
        super().__init__(lambda query: np.tanh(query.inputs["state"][:, :2]))
        self.spec = replace(
            self.spec,
            inputs=("images.base", "state", "instruction"),
            image_sizes={"base": (8, 8)},
            input_shapes={"state": (3,)},
            stateful=stateful,
        )

    def label(self, query: Query) -> Labels:
        return {"action": self._answer(query)}
