"""Connections to a teacher service: POST with a deadline, and what its errors mean."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import NamedTuple

import requests
from urllib3.exceptions import HTTPError

from rpd_sb3.contract.teacher import TeacherError, TeacherUnavailable
from rpd_sb3.teachers.remote.handshake import new_session, reason


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
        limits = (min(5.0, timeout), timeout)
        try:
            # By the adapter: the session itself would look for cookies, redirects and hooks, which no service has.
            with self._adapter.send(request, stream=True, timeout=limits) as response:
                announced = response.headers.get("Content-Length")
                chunks, size = [], 0
                while chunk := response.raw.read1(2**20):  # what has come, without waiting for more
                    chunks.append(chunk)
                    size += len(chunk)
                    if str(size) == announced:
                        break  # a whole answer needs no look at its end
                    if time.monotonic() > deadline:
                        raise TeacherUnavailable(f"teacher at {self.url} was still answering after {timeout} s")
        except (requests.RequestException, HTTPError) as error:
            raise TeacherUnavailable(f"teacher at {self.url}: {reason(error)}") from error
        if announced not in (None, str(size)):
            raise TeacherUnavailable(f"teacher at {self.url} broke off after {size} of {announced} bytes")
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
