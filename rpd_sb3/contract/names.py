"""Choices among known names, and answers to names that are almost right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing: the only name that begins like this, or else the most similar one."""
    names = list(known)
    longer = [other for other in names if name and other.startswith(name)]
    hint = longer if len(longer) == 1 else get_close_matches(name, names, n=1)
    return f"; did you mean {hint[0]!r}?" if hint else ""


def check_choice(owner: str, key: str, value: object, choices: Iterable[object]) -> None:
    """Check that a value is one of the choices.

    :param owner: whose argument it is, for the message
    :param key: name of the argument
    :param value: what was given
    :param choices: what may be given
    :raises ValueError: with the choices and the closest of them
    """
    names = [name for name in choices if isinstance(name, str)]
    if value not in choices:
        hint = closest(value, names) if isinstance(value, str) else ""
        raise ValueError(f"{owner}: {key}={value!r} is unknown; choose one of {', '.join(names)}{hint}")
