"""Meeting a teacher service: is it ready, and is it what is expected?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests

from rpd_sb3.contract.names import closest
from rpd_sb3.contract.teacher import TeacherError, TeacherSpec, TeacherUnavailable
from rpd_sb3.wire import PROTOCOL_VERSION
from rpd_sb3.wire.spec import spec_from_json, spec_to_json
from rpd_sb3.wire.tensors import ProtocolError

PATIENCE = 5.0
"""Seconds for one question; a service answers these whatever its teacher is doing."""


def new_session(token: str | None) -> requests.Session:
    """Connections to a service that show the token."""
    session = requests.Session()
    session.trust_env = False  # no proxies, no .netrc: looking for them costs more than the request
    if token:
        session.headers["Authorization"] = f"Bearer {token}"
    return session


def handshake(urls: Sequence[str], name: str, token: str | None, patience: float) -> tuple[TeacherSpec, bool]:
    """Wait until all replicas are ready, and read what they serve.

    :param patience: seconds to wait for services that are loading
    :return: the spec, and whether the services take shared memory
    :raises TeacherError: if one does not answer, cannot load its teacher, or serves something else than the first
    """
    deadline = time.monotonic() + patience
    specs: list[TeacherSpec] = []
    shares = True
    for url in urls:
        with new_session(token) as session:
            base = f"{url.rstrip('/')}/v2/models/{name}"
            wait_until_ready(session, url, f"{base}/ready", deadline)
            content = ask(session, url, base)
        try:
            parameters = content["parameters"]
            version, spec = parameters["protocol_version"], parameters["spec"]
        except (KeyError, TypeError) as error:
            raise TeacherError(f"{url} is no teacher service of rpd_sb3: its metadata has no {error}") from error
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
    """Make sure that fields of the spec have the values that they should have.

    :raises ValueError: for a field that does not exist
    :raises TeacherError: for a field of another value
    """
    fields = spec_to_json(spec)
    for key, value in expected.items():
        if key not in fields:
            raise ValueError(f"expect: a teacher's spec has no field {key!r}{closest(key, fields)}")
        if fields[key] != value:
            raise TeacherError(f"teacher at {url} has {key}={fields[key]!r}, but {value!r} is expected")


def wait_until_ready(session: requests.Session, url: str, page: str, deadline: float) -> None:
    """Return when the service answers queries.

    :raises TeacherError: if it does not answer, has failed, or is still loading at the deadline
    """
    while True:
        response = get(session, url, page)
        if response.status_code == 200:
            return
        content = _json(response)
        if response.status_code != 503 or content.get("failed") or time.monotonic() > deadline:
            reason = content.get("error") or content.get("state") or f"{response.status_code} {response.text[:200]}"
            raise TeacherError(f"teacher at {url} is not ready: {reason}")
        time.sleep(0.2)


def ask(session: requests.Session, url: str, page: str) -> dict[str, Any]:
    """A page of a service, which must be a JSON object.

    :raises TeacherError: if it is something else
    """
    response = get(session, url, page)
    content = _json(response)
    if response.status_code != 200:
        raise TeacherError(
            f"teacher at {url} answered {response.status_code}: {content.get('error', response.text[:200])}"
        )
    return content


def get(session: requests.Session, url: str, page: str) -> requests.Response:
    """The response for a page, whatever its status.

    :raises TeacherUnavailable: if there is none
    """
    try:
        return session.get(page, timeout=PATIENCE)
    except requests.RequestException as error:
        raise TeacherUnavailable(
            f"no teacher service at {url}: {reason(error)}; start one with python -m rpd_sb3.serve"
        ) from error


def reason(error: Exception) -> str:
    """The innermost reason of a failed request, without the objects that the outer ones print."""
    cause: BaseException = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return f"no answer in time ({cause})" if isinstance(error, requests.Timeout) else str(cause) or type(cause).__name__


def _json(response: requests.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
