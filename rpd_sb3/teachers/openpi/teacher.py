"""Policies behind openpi's WebSocket server as teachers: pi0, pi0.5, and others that speak its protocol.

Shape letters: N queries, A action dimensions, T actions of a chunk.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.names import check_counts
from rpd_sb3.contract.teacher import TIMEOUT, Labels, Query, TeacherError, TeacherSpec, TeacherUnavailable
from rpd_sb3.teachers.openpi.chunks import ChunkMemory, Step, gather
from rpd_sb3.teachers.openpi.connection import Connection
from rpd_sb3.teachers.openpi.messages import pack, resize_with_pad
from rpd_sb3.wire.urls import OPENPI_API_KEY, openpi_url

logger = logging.getLogger(__name__)
INPUTS = {"observation/image": "images.human", "prompt": "instruction"}
"""openpi's key to our input, for policies that see one camera. More: ``observation/wrist_image``, ``observation/state``."""
CLOSING = 2.0
"""Seconds that close() waits for its threads."""
PAUSE = 0.5
"""Seconds between looks at a server that does not listen yet."""


class _Job(NamedTuple):
    observation: dict[str, np.ndarray]
    answer: Future[np.ndarray]
    """(T, A)"""


class OpenPITeacher:
    """Asks a policy server of openpi what it would do.

    A server answers one observation at a time on a connection, so a query is spread over several connections. There is one
    attempt for each observation; a TeacherUnavailable (no connection, no answer in time) means that the same query may be
    answered later. Actions come as the server gives them, in the first ``action_dim`` dimensions; openpi's models pad
    theirs to 32.

    :param url: ``HOST:PORT``, or with ws://, wss://, http:// or https:// before it
    :param inputs: openpi's key to our input (``images.<camera>``, ``state``, ``instruction``); None: one image,
        ``observation/image: images.human``, and ``prompt: instruction``
    :param image_size: pixels, images are sent as squares of this size, black where they were none; None: as they are
    :param action_dim: A
    :param exec_horizon: T, actions of a chunk that are executed before the server is asked again, counted for each
        environment from the start of its episode
    :param control_mode: controller that the actions are meant for; None: not tied to one
    :param gripper: as in :class:`TeacherSpec`
    :param rotation: as in :class:`TeacherSpec`
    :param rotation_sign: as in :class:`TeacherSpec`
    :param n_connections: observations that are on their way at a time
    :param max_pending: queries at a time; :meth:`submit` waits for room beyond that
    :param timeout: seconds that the server has for the answer to one observation, connecting included
    :param ready_timeout: seconds to wait for a server that does not listen yet
    :param api_key: that the server wants; None: environment variable ``RPD_SB3_OPENPI_API_KEY``
    :raises ValueError: for an impossible argument
    :raises TeacherError: if there is no openpi server, or it wants another key
    """

    def __init__(
        self,
        url: str,
        *,
        inputs: Mapping[str, str] | None = None,
        image_size: int | None = 224,
        action_dim: int = 7,
        exec_horizon: int = 1,
        control_mode: str | None = None,
        gripper: str | None = None,
        rotation: str | None = None,
        rotation_sign: int = 1,
        n_connections: int = 4,
        max_pending: int = 4,
        timeout: float = TIMEOUT,
        ready_timeout: float = 60.0,
        api_key: str | None = None,
    ) -> None:
        self.url = openpi_url(url)
        self._inputs = _check_inputs(INPUTS if inputs is None else inputs)
        sizes = {} if image_size is None else {"image_size": image_size}
        check_counts(
            action_dim=action_dim,
            exec_horizon=exec_horizon,
            n_connections=n_connections,
            max_pending=max_pending,
            **sizes,
        )
        if not isinstance(timeout, (int, float)) or timeout <= 0:
            raise ValueError(f"timeout={timeout!r} must be a positive number of seconds")
        api_key = api_key or os.environ.get(OPENPI_API_KEY)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError(f"api_key, or {OPENPI_API_KEY}, must consist of printable ASCII characters")
        self._image_size = image_size
        self._action_dim = action_dim
        self._horizon = exec_horizon
        self._timeout = timeout
        self._max_pending = max_pending
        self._closed = False
        self._failing = False
        self._memory = ChunkMemory(exec_horizon)
        self._lock = threading.Lock()
        self._room = threading.Semaphore(max_pending)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._connections = [Connection(self.url, api_key) for _ in range(n_connections)]
        self.metadata = self._wait_for_server(ready_timeout)
        """What the server says about itself."""
        self.spec = TeacherSpec(
            f"openpi at {self.url}",
            frozenset({"action"}),
            tuple(dict.fromkeys(self._inputs.values())),
            spaces.Box(-1.0, 1.0, (action_dim,), np.float32),
            control_mode=control_mode,
            stateful=exec_horizon > 1,
            gripper=gripper,
            rotation=rotation,
            rotation_sign=rotation_sign,
        )
        # Daemons: a machine that does not answer at all cannot keep the process from ending.
        self._threads = [threading.Thread(target=self._work, args=(c,), daemon=True) for c in self._connections]
        for thread in self._threads:
            thread.start()

    def submit(self, query: Query) -> Future[Labels]:
        """Ask; returns when the query is in line, its arrays may be overwritten then.

        :param query: N questions
        :return: ``action`` (N, A) float32, or the TeacherError that prevents it
        """
        whole: Future[Labels] = Future()
        whole.set_running_or_notify_cancel()
        try:
            self._check_images(query)
            if not self._room.acquire(timeout=0.0 if self._failing else self._timeout):
                raise TeacherUnavailable(f"{self._who}: {self._max_pending} queries are not answered yet")
        except TeacherError as error:
            whole.set_exception(error)
            return whole
        whole.add_done_callback(lambda _: self._room.release())
        with self._lock:
            if self._closed:
                whole.set_exception(TeacherError("the teacher is closed"))
                return whole
            if self.spec.stateful:
                steps = self._memory.plan(query, lambda row: self._ask(query, row), whole)
            else:
                steps = [Step(self._ask(query, row), 0) for row in range(len(query.env_ids))]
        gather(whole, steps)
        return whole

    def close(self) -> None:
        """Close the connections and end the threads; what is still on its way fails."""
        with self._lock:
            self._closed = True
        for connection in self._connections:
            connection.end()
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + CLOSING
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0.0))

    @property
    def _who(self) -> str:
        return f"openpi server at {self.url}"

    def _wait_for_server(self, patience: float) -> Mapping[str, Any]:
        """Its metadata. It listens once its policy is loaded, which may take minutes."""
        end, waiting = time.monotonic() + patience, False
        while True:
            try:
                return self._connections[0].ask(None, max(min(self._timeout, end - time.monotonic()), 0.01))
            except TeacherUnavailable as error:
                if time.monotonic() + PAUSE > end:
                    hint = "start one with openpi's scripts/serve_policy.py"
                    raise TeacherUnavailable(f"{error}; waited {patience:g} s for it, {hint}") from error
                if not waiting:
                    logger.warning("waiting up to %g s: %s", patience, error)
                waiting = True
                time.sleep(PAUSE)

    def _check_images(self, query: Query) -> None:
        for name in self.spec.inputs:
            images = np.asarray(query.inputs[name])
            if name.startswith("images.") and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3):
                raise TeacherError(
                    f"{self._who}: {name!r} must be uint8 of shape (N, H, W, 3), got {images.dtype} {images.shape}"
                )

    def _ask(self, query: Query, row: int) -> Future[np.ndarray]:
        """The chunk for one row, in line."""
        job = _Job({key: np.array(query.inputs[name][row]) for key, name in self._inputs.items()}, Future())
        self._jobs.put(job)
        return job.answer

    def _work(self, connection: Connection) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.answer.set_running_or_notify_cancel():
                continue
            try:
                message = pack({key: self._as_sent(key, value) for key, value in job.observation.items()})
                chunk = self._check(connection.ask(message, self._timeout))
            except TeacherError as error:
                self._failing = isinstance(error, TeacherUnavailable)
                job.answer.set_exception(type(error)(str(error)))  # its traceback would keep the observation
            except Exception as error:  # this thread answers others too
                job.answer.set_exception(TeacherError(f"{self._who} cannot be asked: {error!r}"))
            else:
                self._failing = False
                job.answer.set_result(chunk)
        connection.close()

    def _as_sent(self, key: str, value: np.ndarray) -> np.ndarray | str:
        if self._inputs[key] == "instruction":
            return str(value)
        if self._image_size is not None and self._inputs[key].startswith("images."):
            return resize_with_pad(value, self._image_size)
        return value

    def _check(self, response: Mapping[str, Any]) -> np.ndarray:
        """The actions to execute, (T, A) float32.

        :raises TeacherError: if they cannot be used
        """
        actions = response.get("actions")
        if not isinstance(actions, np.ndarray):
            raise TeacherError(
                f"{self._who} sent no array 'actions', only {', '.join(map(repr, response)) or 'nothing'}"
            )
        if actions.ndim != 2 or actions.shape[1] < self._action_dim or actions.dtype.kind not in "fiu":
            raise TeacherError(
                f"{self._who} gave actions of shape {actions.shape} and {actions.dtype}, expected a chunk "
                f"(horizon, at least action_dim={self._action_dim}) of numbers"
            )
        if len(actions) < self._horizon:
            raise TeacherError(
                f"{self._who} plans {len(actions)} actions, fewer than exec_horizon={self._horizon}; choose fewer"
            )
        with np.errstate(over="ignore"):  # too large for a float32: not finite, which the asker checks
            return np.array(actions[: self._horizon, : self._action_dim], np.float32)


def _check_inputs(inputs: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(inputs, Mapping) or not inputs:
        raise ValueError(f"inputs={inputs!r} must map openpi's keys to our inputs, e.g. {INPUTS}")
    for key, name in inputs.items():
        known = isinstance(name, str) and (name in ("state", "privileged", "instruction") or name[:7] == "images.")
        if not isinstance(key, str) or not known:
            raise ValueError(
                f"inputs: {key!r}: {name!r} is unknown; choose images.<camera>, state, privileged or instruction"
            )
    return dict(inputs)
