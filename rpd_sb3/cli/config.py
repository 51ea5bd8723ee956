"""Where hyper-parameters are written down: sections of YAML files and ``key:value`` words. Nothing is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rpd_sb3.contract.names import closest


def find_config(algo: str) -> Path:
    """The file that comes with the library: package data, or ``zoo_configs/`` next to the package.

    :raises ValueError: if there is none for this algorithm
    """
    package = Path(str(resources.files("rpd_sb3")))
    for folder in (package / "zoo_configs", package.parent / "zoo_configs"):
        if (folder / f"{algo}.yml").is_file():
            return folder / f"{algo}.yml"
    raise ValueError(f"there is no zoo_configs/{algo}.yml; name a file with --conf-file")


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    :raises ValueError: if it is missing, unreadable, or no mapping
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config file {path}{line}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {path}: expected a mapping at the top, got {type(content).__name__}")
    return content


def load_section(path: Path, env_id: str, *, asked: Sequence[str] = (), section: str | None = None) -> dict[str, Any]:
    """The section for an environment: ``section`` if it is named, else the first there is for what is asked.

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
    raise ValueError(
        f"config file {path} has no section {' or '.join(map(repr, names))}, only {', '.join(sections)}"
        + closest(names[0], sections)
    )


def parse_pairs(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """``["gamma:0.8", "policy_kwargs.log_std_init:-1"]`` as a nested mapping; values are YAML.

    :param pairs: words of the form key:value
    :param flag: shown in messages
    :raises ValueError: for a word without a colon, or a value that is no YAML
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, colon, text = pair.partition(":")
        if not (key and colon):
            raise ValueError(f"{flag}: {pair!r} is not of the form key:value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}: the value of {pair!r} is not YAML") from error
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
