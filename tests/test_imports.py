"""The import direction of CONTRIBUTING.md, read from the source: nothing is executed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "rpd_sb3"
ROOT = Path(__file__).parent.parent / PACKAGE
FILES = sorted(ROOT.rglob("*.py"))
CLIS = {"collect", "train", "evaluate", "enjoy", "export", "serve", "report", "doctor"}
FOR_ALL = {"names", "bins"}
MAX_LINES = 300

# Module or folder -> what of ours it may import, besides its own folder; x.* is all of a folder. Those not listed are free.
ALLOWED = {
    "losses": set(),
    "buffers": set(),
    "augmentation": set(),
    "config": set(),
    "names": set(),
    "bins": set(),
    "vulkan": set(),
    "runtime": set(),
    "teachers": {"protocol.*"},
    "protocol": {"teachers.base"},
    "serving": {"protocol.*", "teachers.base"},
    "students": set(),
    "envs": {"teachers.base", "teachers.privileged"},
    "warm_start": set(),
    "reporting": {"evaluation", "runs", "config"},
    "training_log": set(),
    "on_policy": {"augmentation", "losses", "buffers", "envs.teacher_access", "teachers.base", "training_log"},
    "algos": {
        "on_policy",
        "losses",
        "buffers",
        "demonstrations",
        "recording",
        "envs.groups",
        "envs.action_tokens",
        "students.tokens",
    },
}


def module_name(path: Path) -> str:
    """``envs/vec_teacher.py`` -> ``envs.vec_teacher``; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES} - {""}


def imports(source: str, package: str) -> Iterator[str]:
    """Our modules that ``source`` imports anywhere, without the leading ``rpd_sb3.``.

    :param source: text of a module
    :param package: dotted name of the package that it lies in, for relative imports
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from package import name`: the name may be a module.
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}".removeprefix(f"{PACKAGE}.") in MODULES else base
                for alias in node.names
            ]
        else:
            continue
        for name in names:
            if name.startswith(f"{PACKAGE}."):
                yield name.removeprefix(f"{PACKAGE}.")


def violations(name: str, imported: str) -> str | None:
    """Why module ``name`` may not import ``imported``; None if it may."""
    if imported.split(".")[0] in CLIS:
        return f"{name} imports the command {imported}"
    layer = name.split(".")[0]
    if imported in FOR_ALL:
        return None
    if layer not in ALLOWED or imported.split(".")[0] == layer:
        return None
    allowed = ALLOWED[layer]
    free = imported in allowed or f"{imported.split('.')[0]}.*" in allowed
    return None if free else f"{name} imports {imported}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or PACKAGE)
def test_imports_point_in_one_direction(path: Path) -> None:
    package = ".".join((PACKAGE, *path.relative_to(ROOT).parts[:-1]))
    found = imports(path.read_text(), package)
    assert [reason for imported in found if (reason := violations(module_name(path), imported))] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or PACKAGE)
def test_file_is_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import rpd_sb3.doctor", "rpd_sb3", ["doctor"]),
        ("from rpd_sb3 import doctor", "rpd_sb3", ["doctor"]),
        ("from rpd_sb3.envs.tasks import TASKS", "rpd_sb3", ["envs.tasks"]),
        ("from rpd_sb3.envs import tasks", "rpd_sb3", ["envs.tasks"]),
        ("def f():\n    from ..teachers.base import Query", "rpd_sb3.envs", ["teachers.base"]),
        ("from . import tasks", "rpd_sb3.envs", ["envs.tasks"]),
        ("import numpy\nfrom stable_baselines3 import PPO", "rpd_sb3", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, package: str, expected: list[str]) -> None:
    assert list(imports(source, package)) == expected


@pytest.mark.parametrize(
    ("name", "imported", "allowed"),
    [
        ("envs.vec_teacher", "teachers.base", True),
        ("envs.vec_teacher", "teachers.scripted", False),
        ("teachers.scripted", "teachers.motion", True),
        ("teachers.scripted", "envs.tasks", False),
        ("teachers.client", "protocol.spec", True),
        ("teachers.client", "serving.engine", False),
        ("serving.engine", "protocol", True),
        ("serving.engine", "teachers.scripted", False),
        ("losses", "buffers", False),
        ("algos.rpd", "envs.vec_teacher", False),
        ("evaluate", "train", False),
        ("evaluate", "envs.factory", True),
    ],
)
def test_rule(name: str, imported: str, allowed: bool) -> None:
    assert (violations(name, imported) is None) == allowed
