"""What a client says to a teacher service over HTTP: the questions at the start, and requests with a deadline."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import requests
from urllib3.exceptions import HTTPError

from rpd_sb3.contract.names import closest
from rpd_sb3.contract.teacher import TeacherError, TeacherSpec, TeacherUnavailable
from rpd_sb3.wire import PROTOCOL_VERSION
from rpd_sb3.wire.spec import spec_from_json, spec_to_json
from rpd_sb3.wire.tensors import ProtocolError

PATIENCE = 5.0
"""Seconds for a connection, and for one question at the start: a service answers those whatever its teacher is doing."""


def new_session(token: str | None) -> requests.Session:
    """Connections to a service that show the token."""
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc: looking for them costs more than the request
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def reason(error: Exception) -> str:
    """The innermost reason of a failed request, without the objects that the outer ones print."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return f"no answer in time ({cause})" if isinstance(error, requests.Timeout) else str(cause) or type(cause).__name__


# ---- requests


class Response(NamedTuple):
    """What a server has answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connection:
    """Keeps its socket open from one request to the next; several threads get a socket each.

    :param url: of the server, without a path
    :param token: to show to the server
    """

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        self._session = new_session(token)
        self._adapter = self._session.get_adapter(url)
        self._prepared: dict[str, requests.PreparedRequest] = {}

    def post(self, path: str, body: bytes, headers: Mapping[str, str], timeout: float) -> Response:
        """Ask, and wait for the answer.

        :param timeout: seconds for all of it
        :raises TeacherUnavailable: if there is no whole answer in time
        """
        deadline = time.monotonic() + timeout
        if path not in self._prepared:
            # Preparing a request takes as long as answering it: what all requests for a path share is prepared once.
            self._prepared[path] = requests.Request("POST", self.url + path, self._session.headers).prepare()
        request = self._prepared[path].copy()
        request.headers.update(headers)
        request.prepare_body(body, None)
        limits = (min(PATIENCE, timeout), timeout)
        try:
            # By the adapter: the session itself would look for cookies, redirects and hooks, which no service has.
            with self._adapter.send(request, stream=True, timeout=limits) as response:
                announced = response.headers.get("Content-Length")
                chunks, size = [], 0
                while chunk := response.raw.read1(2**20):  # what has come, without waiting for more; since urllib3 2.2
                    chunks.append(chunk)
                    size += len(chunk)
                    if str(size) == announced:
                        break  # a whole answer needs no look at its end
                    if time.monotonic() > deadline:
                        raise TeacherUnavailable(f"teacher at {self.url} was still answering after {timeout:g} s")
        except (requests.RequestException, HTTPError) as error:
            raise TeacherUnavailable(f"teacher at {self.url}: {reason(error)}") from error
        return Response(response.status_code, response.headers, b"".join(chunks))

    def close(self) -> None:
        """Close the socket."""
        self._session.close()


def refusal(url: str, response: Response) -> TeacherError:
    """The error for an answer that is not 200; a TeacherUnavailable if asking again may help."""
    text, kind = error_of(response.body)
    sentence = f"teacher at {url} answered {response.status}: {text}"
    # A 5xx without a kind comes from something in between: a proxy whose server is gone.
    if response.status == 503 or (response.status >= 500 and kind is None):
        after = response.headers.get("Retry-After", "")
        return TeacherUnavailable(sentence, float(after) if after.isdigit() else 0.0)
    return TeacherError(sentence)


def error_of(body: bytes) -> tuple[str, str | None]:
    """Text and kind of the error that a server has sent."""
    try:
        content = json.loads(body)
        return str(content["error"]), content.get("type")
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:200].decode(errors="replace") or "nothing", None


# ---- the start


def handshake(urls: Sequence[str], name: str, token: str | None, patience: float) -> tuple[TeacherSpec, bool]:
    """What the replicas serve; waits until all of them are ready.

    :param urls: of the replicas
    :param name: of the model
    :param token: to show to them
    :param patience: seconds to wait for services that are loading
    :return: the spec, and whether the services take shared memory
    :raises TeacherError: if one does not answer, cannot load its teacher, or serves something else than the first
    """
    deadline = time.monotonic() + patience
    specs: list[TeacherSpec] = []
    shares = True
    for url in urls:
        page = f"{url.rstrip('/')}/v2/models/{name}"
        with new_session(token) as session:
            _wait_until_ready(session, url, f"{page}/ready", deadline)
            response, content = _get(session, url, page)
        if response.status_code != 200:
            text = content.get("error", response.text[:200])
            raise TeacherError(f"teacher at {url} answered {response.status_code}: {text}")
        try:
            parameters = content["parameters"]
            version, spec = parameters["protocol_version"], parameters["spec"]
        except (KeyError, TypeError) as error:
            raise TeacherError(f"{url} is not a teacher service of rpd_sb3: its metadata has no {error}") from error
        if version != PROTOCOL_VERSION:
            raise TeacherError(
                f"teacher at {url} speaks version {version} of the protocol, this library version {PROTOCOL_VERSION}: "
                "install the same rpd_sb3 on both sides"
            )
        try:
            specs.append(spec_from_json(spec))
        except ProtocolError as error:
            raise TeacherError(f"teacher at {url}: {error}") from error
        if specs[-1] != specs[0]:
            raise TeacherError(f"the replicas differ: {urls[0]} serves {specs[0]}, but {url} serves {specs[-1]}")
        shares = shares and bool(parameters.get("shared_memory", False))
    return specs[0], shares


def check_expected(spec: TeacherSpec, expected: Mapping[str, Any], url: str) -> None:
    """Check that fields of the spec have the values that they should have.

    :raises ValueError: for a field that does not exist
    :raises TeacherError: for a field of another value
    """
    fields = spec_to_json(spec)
    for key, value in expected.items():
        if key not in fields:
            raise ValueError(f"expect: a teacher's spec has no field {key!r}{closest(key, fields)}")
        if fields[key] != value:
            raise TeacherError(f"teacher at {url} has {key}={fields[key]!r}, but {value!r} is expected")


def _wait_until_ready(session: requests.Session, url: str, page: str, deadline: float) -> None:
    """Return when the service answers queries.

    :raises TeacherError: if it does not answer, has failed, or is still loading at the deadline
    """
    while True:
        response, content = _get(session, url, page)
        if response.status_code == 200:
            return
        if response.status_code != 503 or content.get("failed") or time.monotonic() > deadline:
            why = content.get("error") or content.get("state") or f"{response.status_code} {response.text[:200]}"
            raise TeacherError(f"teacher at {url} is not ready: {why}")
        time.sleep(0.2)


def _get(session: requests.Session, url: str, page: str) -> tuple[requests.Response, dict[str, Any]]:
    """The response for a page, whatever its status, and its JSON object; an empty one if it has none.

    :raises TeacherUnavailable: if there is no response
    """
    try:
        response = session.get(page, timeout=PATIENCE)
    except requests.RequestException as error:
        raise TeacherUnavailable(
            f"no teacher service at {url}: {reason(error)}; start one with python -m rpd_sb3.serve"
        ) from error
    try:
        content = response.json()
    except ValueError:
        content = {}
    return response, content if isinstance(content, dict) else {}
