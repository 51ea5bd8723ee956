"""What works on a machine, and whether a teacher can be asked from it."""

from __future__ import annotations

from typing import NamedTuple

OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    status: str
    """``ok``, ``warn`` (works, or is not needed here) or ``fail``."""
    value: str
    fix: str = ""
    """The command that repairs it."""
