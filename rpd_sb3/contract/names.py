"""The names of teachers on a command line, and a hint at the known name that an unknown one resembles."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

TEACHERS = (
    "scripted",
    "sb3:FILE",
    "openvla:PATH",
    "octo:PATH",
    "http://HOST:PORT[,http://HOST:PORT...]",
    "openpi:HOST:PORT",
    "MODULE:CLASS",
)
"""How a teacher is written on a command line."""
TEACHER_HELP = ", ".join(TEACHERS[:-1]) + f" or {TEACHERS[-1]}"
"""For the help of a command's ``--teacher``."""


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing: the only name that begins like this, or else the most similar one."""
    names = list(known)
    longer = [other for other in names if name and other.startswith(name)]
    hint = longer if len(longer) == 1 else get_close_matches(name, names, n=1)
    return f"; did you mean {hint[0]!r}?" if hint else ""
