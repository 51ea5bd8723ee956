"""Whether a teacher can be asked, and what it would answer. Standard library only: the doctor must run anywhere."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import re
import urllib.error
import urllib.request
from contextlib import closing
from difflib import get_close_matches
from http.client import FORBIDDEN, SWITCHING_PROTOCOLS, UNAUTHORIZED, HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from rpd_sb3.doctor.findings import FAIL, OK, Finding
from rpd_sb3.wire import PROTOCOL_VERSION
from rpd_sb3.wire.urls import OPENPI_API_KEY, openpi_url

TEACHERS = (
    "scripted",
    "sb3:FILE",
    "openvla:PATH",
    "octo:PATH",
    "http://HOST:PORT",
    "openpi:HOST:PORT",
    "MODULE:CLASS",
)
CHECKPOINTS = {
    "openvla": (("transformers", "tokenizers", "safetensors", "PIL"), "pip install 'rpd_sb3[openvla]'"),
    "octo": (("octo",), "install requirements/octo.txt"),
}
"""Kind of teacher to the packages that it needs, and where they come from."""
TIMEOUT = 5.0
"""Seconds for one answer of a service."""
MAX_BYTES = 2**20
BINARY_FRAME = b"\x82"
"""First byte of a binary message in one frame (RFC 6455, section 5.2)."""


class Answer(NamedTuple):
    """What a service has said."""

    status: int
    content: dict[str, Any]
    """Empty if it was no JSON object."""


def check_teacher(teacher: str) -> list[Finding]:
    """Whether the teacher can be asked.

    :param teacher: ``scripted``, ``sb3:FILE``, ``openvla:PATH``, ``octo:PATH``, the URLs of a service's replicas,
        ``openpi:HOST:PORT``, or ``package.module:Class``
    :return: one line, or one for each replica
    """
    name = f"Teacher {teacher}"
    kind, _, rest = teacher.partition(":")
    if teacher == "scripted":
        return [Finding(name, OK, "part of the library")]
    if kind == "sb3":
        # SB3 itself adds the suffix.
        if Path(rest).is_file() or Path(f"{rest}.zip").is_file():
            return [Finding(name, OK, "the file exists")]
        return [Finding(name, FAIL, "no such file", "--teacher sb3:FILE, a model that SB3's save() has written")]
    if kind in CHECKPOINTS and rest:
        return [_check_checkpoint(name, kind, rest)]
    if kind in ("http", "https"):
        return _check_replicas(teacher.split(","))
    if kind == "openpi" and rest:
        return [_check_openpi(name, rest)]
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return [_check_module(name, kind)]
    closest = get_close_matches(teacher, TEACHERS, n=1, cutoff=0.3)
    return [Finding(name, FAIL, "unknown kind of teacher", f"--teacher {' or '.join(closest or TEACHERS)}")]


def _lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _check_checkpoint(name: str, kind: str, path: str) -> Finding:
    packages, install = CHECKPOINTS[kind]
    if missing := [package for package in packages if _lacks(package)]:
        return Finding(name, FAIL, f"not installed here: {', '.join(missing)}", f"{install}, or use a service's URL")
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return Finding(name, OK, "the checkpoint exists")
    if not folder.is_dir() and (path.startswith("hf://") or re.fullmatch(r"[\w-]+/[\w.-]+", path)):
        return Finding(name, OK, "on the hub, not looked at")
    return Finding(name, FAIL, "no config.json there", f"--teacher {kind}:PATH, a checkpoint's folder or its hub id")


def _check_module(name: str, module: str) -> Finding:
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # it imports the packages above; whatever a broken one raises is the finding
        return Finding(name, FAIL, f"{module} does not import: {error!r}", f"python -c 'import {module}'")
    if found is None:
        return Finding(name, FAIL, f"no module {module}", "run this in its folder, or set PYTHONPATH")
    return Finding(name, OK, f"in {found.origin}")


def _check_openpi(name: str, address: str) -> Finding:
    """Opens a WebSocket (RFC 6455) and looks at the first frame: an openpi server speaks first, with its metadata."""
    try:
        url = urlsplit(openpi_url(address))
        kind = HTTPSConnection if url.scheme == "wss" else HTTPConnection
        connection = kind(url.hostname or "", url.port, timeout=TIMEOUT)
        with closing(connection):
            connection.request("GET", url.path or "/", headers=_upgrade())
            response = connection.getresponse()
            with response:
                first = response.fp.read(1) if response.status == SWITCHING_PROTOCOLS else b""
    except (OSError, HTTPException, ValueError) as error:
        return Finding(
            name, FAIL, f"no answer: {error}", "start openpi's scripts/serve_policy.py there, and wait for it"
        )
    if response.status in (UNAUTHORIZED, FORBIDDEN):
        return Finding(name, FAIL, f"it wants another API key (HTTP {response.status})", f"export {OPENPI_API_KEY}=...")
    if first != BINARY_FRAME:
        reason = "it does not begin with metadata" if first else f"HTTP {response.status} instead of a WebSocket"
        return Finding(name, FAIL, f"no openpi server: {reason}", "start openpi's scripts/serve_policy.py there")
    if missing := [module for module in ("msgpack", "PIL", "websockets") if _lacks(module)]:
        return Finding(name, FAIL, f"answers, but here is no {', '.join(missing)}", "pip install 'rpd_sb3[openpi]'")
    return Finding(name, OK, "an openpi server answers; what it wants to see is known when it is asked")


def _upgrade() -> dict[str, str]:
    key = os.environ.get(OPENPI_API_KEY)
    return {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        **({"Authorization": f"Api-Key {key}"} if key else {}),
    }


def _check_replicas(urls: list[str]) -> list[Finding]:
    findings: list[Finding] = []
    first: tuple[str, Any] | None = None
    for url in urls:
        finding, spec = _check_server(url.rstrip("/"))
        if spec is not None and first is None:
            first = (url, spec)
        elif spec is not None and first is not None and spec != first[1]:
            reason = f"{finding.value}; but {first[0]} serves something else"
            finding = finding._replace(status=FAIL, value=reason, fix="start all replicas with the same arguments")
        findings.append(finding)
    return findings


def _check_server(url: str) -> tuple[Finding, Any]:
    """The line, and the teacher's spec if there is one."""
    name = f"Teacher {url}"
    try:
        ready = _ask(f"{url}/v2/health/ready")
        if ready.status != 200:
            return _not_ready(name, url, ready), None
        model = str(ready.content.get("name", "teacher"))
        page = f"{url}/v2/models/{model}"
        metadata, statistics = _ask(page), _ask(f"{page}/stats")
    except (OSError, HTTPException, ValueError) as error:  # refused, too slow, not HTTP, no such host or port
        reason = getattr(error, "reason", error)
        return Finding(name, FAIL, f"no answer: {reason}", f"start the server there, then: curl -i {url}"), None
    if metadata.status == 401:
        reason = "the token of RPD_SB3_TOKEN is not its token" if _token() else "it wants a token"
        return Finding(name, FAIL, reason, "export RPD_SB3_TOKEN=... as where it was started"), None
    parameters = metadata.content.get("parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("spec"), dict):
        return Finding(name, FAIL, "no teacher service of rpd_sb3", "python -m rpd_sb3.serve"), None
    spec, version = parameters["spec"], parameters.get("protocol_version")
    if version != PROTOCOL_VERSION:
        reason = f"speaks version {version} of the protocol, this library version {PROTOCOL_VERSION}"
        return Finding(name, FAIL, reason, "install the same rpd_sb3 on both sides"), spec
    fix = "" if model == "teacher" else f"train with --teacher-kwargs name:{model}"
    return Finding(name, OK, f"{_describe(spec)}; {_latency(statistics)}", fix), spec


def _not_ready(name: str, url: str, ready: Answer) -> Finding:
    state = str(ready.content.get("state", f"not ready: HTTP {ready.status}"))
    fix = f"curl -i {url}/v2/health/ready"
    if "state" in ready.content:
        fix = "start it anew" if ready.content.get("failed") else "wait; training does, too"
    return Finding(name, FAIL, state, fix)


def _describe(spec: dict[str, Any]) -> str:
    """``scripted for PickCube-v1 gives action``."""
    env_id = f" for {spec['env_id']}" if spec.get("env_id") else ""
    return f"{spec.get('name')}{env_id} gives {', '.join(map(str, spec.get('labels') or ['nothing']))}"


def _latency(statistics: Answer) -> str:
    """Mean time of the answers so far; to ask it something would be a step in the memory of some teachers."""
    try:
        total = statistics.content["model_stats"][0]["inference_stats"]["success"]
        count, seconds = int(total["count"]), int(total["ns"]) / 1e9
    except (KeyError, IndexError, TypeError, ValueError):
        return "latency unknown"
    return f"{1000 * seconds / count:.1f} ms per answer, mean of {count}" if count else "not asked anything yet"


def _token() -> str | None:
    return os.environ.get("RPD_SB3_TOKEN") or None


def _ask(page: str) -> Answer:
    """Status and content of a page.

    :raises OSError: if there is no answer in time, as well as HTTPException and ValueError
    """
    headers = {"Authorization": f"Bearer {token}"} if (token := _token()) else {}
    # No proxies: the client of teachers uses none.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(page, headers=headers), timeout=TIMEOUT) as response:
            status, body = response.status, response.read(MAX_BYTES)
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read(MAX_BYTES)
    try:
        content = json.loads(body)
    except ValueError:
        content = None
    return Answer(status, content if isinstance(content, dict) else {})
