"""Files that are complete whenever they are there: text, YAML, JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rpd_sb3.contract.secrets import redact


def replace_text(path: Path, text: str) -> None:
    """Write a text file; one of that name is replaced only by a complete one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write a mapping as YAML, its keys in their order, without secrets."""
    replace_text(path, yaml.safe_dump(redact(content), sort_keys=False, allow_unicode=True))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON without secrets and without NaN: a number that is not finite becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    replace_text(path, json.dumps(clean(redact(content)), indent=2, allow_nan=False) + "\n")
