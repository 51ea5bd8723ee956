"""The house: which room may import which, read from the source; nothing is executed."""

from __future__ import annotations

import ast
import graphlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "rpd_sb3"
SOURCE = Path(__file__).parent.parent / PACKAGE
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = [
    "enjoy",
    "collect",
    "evaluate",
    "report",
    "export",
    "train",
    "algos",
    "demos",
    "episodes",
    "labelling",
    "serve",
    "doctor",
    "teachers",
    "envs",
    "cli",
    "wire",
    "students",
    "contract",
]
"""Top to bottom: a room imports what stands after it."""
ALIASES = {"buffers", "hyperparams", "runtime"}
"""Modules at the top level; they forward to a room, and nobody here imports them."""
LONG = 450
"""Lines of a file from which on it should be looked at."""


def module_name(path: Path) -> str:
    """``envs/factory.py`` -> ``envs.factory``; a folder's ``__init__`` is the folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
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


def violation(importer: str, imported: str) -> str | None:
    """Why one module may not import another; None if it may."""
    room, other = importer.partition(".")[0], imported.partition(".")[0]
    if imported.endswith("__main__"):
        return f"{importer} imports the door {imported}"
    if importer in ("", *ALIASES):
        return None  # the top level forwards
    if importer == "export.runtime":
        return f"{importer} is copied into exports, so it may not import {imported}"
    if room == other:
        return None
    if other not in ROOMS:
        return f"{importer} imports {imported}, which is no room"
    if room not in ROOMS or ROOMS.index(room) > ROOMS.index(other):
        return f"{importer} imports {imported}, which stands above it"
    return None


def arrows() -> dict[str, set[str]]:
    """Room to the rooms that it imports."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        room = module_name(path).partition(".")[0]
        if room in ROOMS:
            package = ".".join((PACKAGE, *path.relative_to(SOURCE).parts[:-1]))
            found[room] |= {name.partition(".")[0] for name in imports(path.read_text(), package)} - {room, PACKAGE}
    return found


def longest_chain() -> list[str]:
    """Rooms of which each imports the next, as many as there are."""
    graph, chains = arrows(), dict[str, list[str]]()
    for room in graphlib.TopologicalSorter(graph).static_order():
        below = [chains[other] for other in graph.get(room, ()) if other in chains]
        chains[room] = [room, *max(below, key=len, default=[])]
    return max(chains.values(), key=len)


def test_imports_point_down() -> None:
    offenders = []
    for path in FILES:
        package = ".".join((PACKAGE, *path.relative_to(SOURCE).parts[:-1]))
        found = imports(path.read_text(), package)
        offenders += [reason for imported in found if (reason := violation(module_name(path), imported))]
    assert offenders == []


def test_the_top_level_holds_few_modules() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} - {"__init__"} == ALIASES


def test_there_is_no_circle_of_rooms(capsys: pytest.CaptureFixture[str]) -> None:
    graph = arrows()
    assert set(graph) == set(ROOMS)
    chain = longest_chain()
    with capsys.disabled():
        n = sum(map(len, graph.values()))
        print(f"\n{len(graph)} rooms, {n} arrows, longest chain of {len(chain)}: {' -> '.join(chain)}")


def test_modules_of_a_room_do_not_import_each_other_in_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        package = ".".join((PACKAGE, *path.relative_to(SOURCE).parts[:-1]))
        tree = ast.parse(path.read_text())
        top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
        graph[module_name(path)] = set(imports(ast.unparse(top), package)) - {module_name(path)}
    graphlib.TopologicalSorter(graph).prepare()


def test_long_files_are_named() -> None:
    for path in FILES:
        if (lines := len(path.read_text().splitlines())) > LONG:
            warnings.warn(f"{path.relative_to(SOURCE)} has {lines} lines; is it one idea?")


@pytest.mark.parametrize(
    ("source", "package", "expected"),
    [
        ("import rpd_sb3.doctor", "rpd_sb3", ["doctor"]),
        ("from rpd_sb3 import doctor", "rpd_sb3", ["doctor"]),
        ("from rpd_sb3.envs.tasks import TASKS", "rpd_sb3", ["envs.tasks"]),
        ("from rpd_sb3.envs import tasks", "rpd_sb3", ["envs.tasks"]),
        ("def f():\n    from ..contract.teacher import Query", "rpd_sb3.envs", ["contract.teacher"]),
        ("from . import tasks", "rpd_sb3.envs", ["envs.tasks"]),
        ("import numpy\nfrom stable_baselines3 import PPO", "rpd_sb3", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, package: str, expected: list[str]) -> None:
    assert list(imports(source, package)) == expected


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("labelling.vec_teacher", "contract.teacher", True),
        ("labelling.vec_teacher", "algos.loop", False),
        ("contract.teacher", "contract.names", True),
        ("contract.teacher", "envs.tasks", False),
        ("evaluate.__main__", "train.__main__", False),
        ("evaluate.__main__", "train.folder", True),
        ("export.runtime", "contract.names", False),
        ("algos.loop", "buffers", False),
        ("buffers", "algos.buffers", True),
    ],
)
def test_rule(importer: str, imported: str, allowed: bool) -> None:
    assert (violation(importer, imported) is None) == allowed
