"""Options from YAML files and ``key:value`` words, checked against type annotations. Nothing is evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml

from rpd_sb3.contract.names import closest

MAX_CHARACTERS, MAX_VALUES, MAX_DEPTH = 2**20, 100_000, 32
"""Limits of a YAML document: its text, its values with each alias counted as what it stands for, and their nesting."""
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_WANTED = {
    dict: "a mapping",
    list: "a list",
    bool: "true or false",
    Callable: "a number or a schedule",
    int: "a whole number",
    float: "a number",
    str: "a string",
}
"""Types that are checked, and what is said of a value that is of none of them: the first that the annotation has."""


def find_config(algo: str) -> Path:
    """The config of an algorithm that comes with the library.

    :raises ValueError: if there is none
    """
    path = Path(str(resources.files("rpd_sb3"))) / "zoo_configs" / f"{algo}.yml"
    if not path.is_file():
        raise ValueError(f"there is no zoo_configs/{algo}.yml; name a file with --conf-file")
    return path


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    :raises ValueError: if it is missing, unreadable, not a mapping, or beyond the limits of :func:`read_yaml`
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = read_yaml(file.read(MAX_CHARACTERS + 1))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config file {path}{line}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {path}: expected a mapping at the top, got {type(content).__name__}")
    return content


def read_yaml(text: str) -> Any:
    """The value of a YAML text: mappings, lists and plain values, small enough to be copied and printed.

    :raises yaml.YAMLError: if it is not YAML, too large, nested too deeply, or contains itself
    """
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"the text is longer than {MAX_CHARACTERS} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError(f"the values are nested more than {MAX_DEPTH} deep") from None
    finally:
        loader.dispose()


def _check_size(root: yaml.Node) -> None:
    """Check a document before values are made of it: an alias is the same node again, so a few lines may stand for 2**100 values."""
    measured: dict[int, tuple[int, int]] = {}  # values and depth; while a node is being measured, zeros

    def measure(node: yaml.Node) -> tuple[int, int]:
        if id(node) not in measured:
            measured[id(node)] = (0, 0)
            inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            parts = [measure(part) for part in inner] if isinstance(node, yaml.CollectionNode) else []
            size, depth = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
            if size > MAX_VALUES or depth > MAX_DEPTH:
                limit = f"are nested more than {MAX_DEPTH}" if depth > MAX_DEPTH else f"are more than {MAX_VALUES}"
                raise yaml.MarkedYAMLError(problem=f"the values {limit}", problem_mark=node.start_mark)
            measured[id(node)] = size, depth
        elif measured[id(node)] == (0, 0):
            raise yaml.MarkedYAMLError(problem="a value contains itself", problem_mark=node.start_mark)
        return measured[id(node)]

    measure(root)


def load_section(path: Path, env_id: str, *, asked: Sequence[str] = (), section: str | None = None) -> dict[str, Any]:
    """The section for an environment: ``section`` if it is given, else the first that there is of several.

    With a view and a reward on the command line these are ``<env_id>-<obs>-<reward>``, ``<env_id>-<obs>``,
    ``<env_id>-<reward>``, ``<env_id>`` and ``default``.

    :param path: file whose keys are section names
    :param env_id: environment
    :param asked: view and reward, as far as they were given on the command line
    :param section: name of the section, whatever the environment
    :raises ValueError: naming the sections of the file, if none fits
    """
    sections = load_yaml(path)
    words = ["-".join(asked), *asked] if len(asked) > 1 else asked
    names = [section] if section else [*(f"{env_id}-{word}" for word in words), env_id, "default"]
    for name in names:
        if name in sections:
            content = sections[name]
            if not isinstance(content, dict):
                raise ValueError(f"config file {path}, section {name!r}: expected a mapping, got {content!r}")
            return content
    known = [str(name) for name in sections]
    raise ValueError(
        f"config file {path} has no section {' or '.join(map(repr, names))}, only {', '.join(known)}"
        + closest(names[0], known)
    )


def parse_pairs(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """``["gamma:0.8", "policy_kwargs.log_std_init:-1"]`` as a nested mapping; values are YAML.

    :param pairs: words of the form key:value
    :param flag: shown in messages
    :raises ValueError: for a word without a colon, or a value that :func:`read_yaml` refuses
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, colon, text = pair.partition(":")
        if not (key and colon):
            raise ValueError(f"{flag}: {pair!r} is not of the form key:value")
        try:
            value = read_yaml(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"{flag}: the value of {pair!r} cannot be read as YAML: {problem}") from error
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{flag}: {pair!r} contradicts the value given for {part!r} before it")
        inner[last] = value
    return result


def merge(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``section`` with ``changes``; mappings are merged key by key, everything else is replaced."""
    result = dict(section)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def with_numbers(value: Any) -> Any:
    """The value with numbers, at any depth, for strings like 3e-4, which YAML 1.1 does not read as numbers."""
    if isinstance(value, dict):
        return {k: with_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def typed(key: str, value: Any, annotation: Any) -> Any:
    """The value, if the annotation allows it; a whole float where an int is due becomes one.

    Annotations with other types than those of YAML and schedules (functions, as strings like ``lin_3e-4``) allow anything.

    :param key: for the message
    :param value: of :func:`with_numbers`
    :param annotation: a type or a union of types
    :raises ValueError: if it does not
    """
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    types = {get_origin(option) or option for option in options}
    if not types <= _WANTED.keys() | {NoneType}:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf:
        if int in types and value == int(value):
            return int(value)
        if float in types:
            return value
    if isinstance(value, tuple(types - {int, float, Callable})) or (isinstance(value, str) and Callable in types):
        return value
    wanted = next(text for kind, text in _WANTED.items() if kind in types)
    note = ""
    if isinstance(value, str) and dict in types:
        note = f", e.g. {key}: {{name: value}}; strings are not evaluated"
    elif isinstance(value, str) and value.startswith(("lin_", "cos_")):
        note = ", it takes no schedule"
    raise ValueError(f"{key}={value!r} must be {wanted}{note}")
