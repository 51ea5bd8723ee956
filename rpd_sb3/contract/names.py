"""Names that are almost right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing: the only name that begins like this, or else the most similar one."""
    names = list(known)
    longer = [other for other in names if name and other.startswith(name)]
    hint = longer if len(longer) == 1 else get_close_matches(name, names, n=1)
    return f"; did you mean {hint[0]!r}?" if hint else ""
