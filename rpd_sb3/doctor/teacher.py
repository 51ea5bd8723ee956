"""Whether a teacher can be asked from here, and what it would give."""

from __future__ import annotations

import importlib.util
import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rpd_sb3.contract.names import TEACHER_HELP, TEACHERS, closest
from rpd_sb3.doctor import FAIL, OK, Finding
from rpd_sb3.wire.urls import OPENPI_API_KEY

if TYPE_CHECKING:
    from rpd_sb3.contract.teacher import TeacherSpec

CHECKPOINTS = {"openvla": ("transformers", "tokenizers", "safetensors", "PIL"), "octo": ("octo",)}
"""Kind of teacher to the packages that it needs."""
TIMEOUT = 5.0
"""Seconds for the answer of an openpi server."""


def inspect_teacher(teacher: str) -> list[Finding]:
    """Whether the teacher can be asked.

    :param teacher: as the registry names it
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
        return [_inspect_checkpoint(name, kind, rest)]
    if kind in ("http", "https"):
        return _inspect_replicas(teacher.split(","))
    if kind == "openpi" and rest:
        return [_inspect_openpi(name, teacher)]
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return [_inspect_module(name, kind)]
    return [Finding(name, FAIL, f"unknown kind of teacher{closest(teacher, TEACHERS)}", f"--teacher {TEACHER_HELP}")]


def _lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _inspect_checkpoint(name: str, kind: str, path: str) -> Finding:
    if missing := [package for package in CHECKPOINTS[kind] if _lacks(package)]:
        install = TEACHERS[f"{kind}:PATH"].install
        return Finding(name, FAIL, f"not installed here: {', '.join(missing)}", f"{install}, or use a service's URL")
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return Finding(name, OK, "the checkpoint exists")
    if not folder.is_dir() and (path.startswith("hf://") or re.fullmatch(r"[\w-]+/[\w.-]+", path)):
        return Finding(name, OK, "on the hub, not looked at")
    return Finding(name, FAIL, "no config.json there", f"--teacher {kind}:PATH, a checkpoint's folder or its hub id")


def _inspect_module(name: str, module: str) -> Finding:
    try:
        found = importlib.util.find_spec(module)
    except Exception as error:  # it imports the packages above; whatever a broken one raises is the finding
        return Finding(name, FAIL, f"{module} does not import: {error!r}", f"python -c 'import {module}'")
    if found is None:
        return Finding(name, FAIL, f"no module {module}", "run this in its folder, or set PYTHONPATH")
    return Finding(name, OK, f"in {found.origin}")


def _inspect_openpi(name: str, teacher: str) -> Finding:
    fix = f"start openpi's scripts/serve_policy.py there; a server with a key: export {OPENPI_API_KEY}=..."
    answer = _meet(name, teacher, TIMEOUT, fix)
    if isinstance(answer, Finding):
        return answer
    return Finding(name, OK, "an openpi server answers; what it wants to see is known when it is asked")


def _inspect_replicas(urls: list[str]) -> list[Finding]:
    findings: list[Finding] = []
    first: TeacherSpec | None = None
    for url in urls:
        name = f"Teacher {url}"
        answer = _meet(name, url.rstrip("/"), 0.0, f"curl -i {url.rstrip('/')}/v2/health/ready")
        if isinstance(answer, Finding):
            findings.append(answer)
            continue
        first = first or answer
        env_id = f" for {answer.env_id}" if answer.env_id else ""
        value = f"{answer.name}{env_id} gives {', '.join(sorted(answer.labels))}"
        if answer == first:
            findings.append(Finding(name, OK, value))
        else:
            fix = "start all replicas with the same arguments"
            findings.append(Finding(name, FAIL, f"{value}; another replica serves something else", fix))
    return findings


def _meet(name: str, teacher: str, patience: float, fix: str) -> TeacherSpec | Finding:
    """The spec of a teacher in another process, or the finding that says why there is none.

    :param patience: seconds to wait for one that is loading
    :param fix: what to try if it does not answer
    """
    try:
        from rpd_sb3.teachers.registry import make_teacher

        with closing(make_teacher(teacher, "", ready_timeout=patience)) as client:
            return client.spec
    except Exception as error:  # what training would stop with is the finding
        if isinstance(error, ImportError) or isinstance(error.__cause__, ImportError):
            return Finding(name, FAIL, f"cannot be asked from here: {error}", "pip install rpd_sb3")
        return Finding(name, FAIL, str(error), fix)
