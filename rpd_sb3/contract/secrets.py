"""Secrets: the names that announce one, and copies of data and commands in which their values are masked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

MASK = "REDACTED"
"""Stands where a secret was. YAML, shells and URLs take it without quotes."""
NOT_SECRET = frozenset(
    {*("unnorm", "dataset", "instruction", "image", "rgb", "depth", "camera", "state", "proprio", "obs", "observation")}
    | {*("action", "goal", "reward", "info", "label", "sort")}
)
"""Words before ``key`` that make it a key of data: ``unnorm_key`` names the statistics of a data set."""

_ANNOUNCES = re.compile(
    r"_(secret|passw(or)?d|passphrase|credential|bearer|authorization)|_(auth|pass|pwd)$|(api|access|auth|private)_?keys?$|token$"
)
_KEY = re.compile(r"_(?:([a-z]+)_)?key$")
_USER_INFO = re.compile(r"(?<=://)[^\s/?#\"']*@")
_PARAMETER = re.compile(r"([?&;#])([\w.%+-]+)=((?:[^\s&;#,\"']|,(?!\w+://))*)")
_NAMED = re.compile(
    r"(?<![\w.@/-])(?:(?P<flag>--?[\w.-]+)[\s=]+|(?i:bearer|api-key)\s+|(?P<name>[\w.-]+)[\"']?\s*[:=]\s*)"
)
_OPEN = re.compile(r"(--?[\w.-]+=?|[\w.-]+[:=])\s*")


def is_secret(name: str) -> bool:
    """True if a value of that name is nobody else's business: ``token``, ``api_key``, ``login.password``.

    :param name: of an option, dotted if it lies in another
    """
    return any(map(_announces_secret, name.split(".")))


def redact(value: Any) -> Any:
    """A copy without secrets: :data:`MASK` replaces values by their names, at any depth, and user info in URLs.

    In a string, what follows such a name is masked up to the string's end; in a list of words, up to the next flag. None
    and booleans stay: they are no secrets, whatever their name.

    :param value: anything that YAML or JSON can hold
    """
    if isinstance(value, Mapping):
        return {key: _mask(inner) if is_secret(str(key)) else redact(inner) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(_redact_words(list(value)))
    if isinstance(value, list):
        return _redact_words(value)
    return _redact_text(value) if isinstance(value, str) else value


def redact_command(command: str) -> str:
    """A command line without secrets.

    :param command: as typed in a shell
    """
    try:
        words = shlex.split(command)
    except ValueError:  # a quote is not closed
        return _redact_text(command)
    return shlex.join(_redact_words(words))


def redact_urls(text: str) -> str:
    """A text whose URLs hold no user info and no secret parameters; else it stays as it is."""
    text = _USER_INFO.sub(f"{MASK}@", text)
    return _PARAMETER.sub(lambda p: f"{p[1]}{p[2]}={MASK}" if is_secret(unquote(p[2])) else p[0], text)


def masked(value: Any, name: str = "") -> list[str]:
    """Dotted names of all that :func:`redact` has masked, wholly or in part.

    :param value: of :func:`redact`
    :param name: of the value itself
    """
    if isinstance(value, Mapping):
        return [path for key, inner in value.items() for path in masked(inner, f"{name}.{key}" if name else str(key))]
    if isinstance(value, (list, tuple)):
        return [path for inner in value for path in masked(inner, name)][:1]
    return [name] if isinstance(value, str) and MASK in value else []


def _announces_secret(name: str) -> bool:
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    snake = "_" + "_".join(words).lower()
    key = _KEY.search(snake)
    return bool(_ANNOUNCES.search(snake)) or (key is not None and key[1] not in NOT_SECRET)


def _mask(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else MASK


def _redact_words(words: list[Any]) -> list[Any]:
    """A list, which may be a command line: ``["--token", "abc"]``, ``["token:", "abc"]``."""
    redacted: list[Any] = []
    is_open = False
    for word in words:
        if is_open and not (isinstance(word, str) and word.startswith("-")):
            if redacted[-1] != MASK:
                redacted.append(MASK)
            continue
        is_open = isinstance(word, str) and _OPEN.fullmatch(word) is not None and is_secret(word)
        redacted.append(redact(word))
    return redacted


def _redact_text(text: str) -> str:
    text = redact_urls(text)
    for match in _NAMED.finditer(text):
        name, rest = match["flag"] or match["name"], text[match.end() :]
        if rest and not rest.startswith(MASK) and (name is None or is_secret(name)):
            return text[: match.end()] + MASK
    return text
