"""Addresses of policy servers."""

from __future__ import annotations

from urllib.parse import urlsplit

SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}
OPENPI_PORT = 8000
"""Where openpi's server listens if it is not told otherwise."""

OPENPI_API_KEY = "RPD_SB3_OPENPI_API_KEY"
"""Environment variable with the key that an openpi server wants."""
TOKEN = "RPD_SB3_TOKEN"
"""Environment variable with the token that a teacher service wants."""


def openpi_url(address: str) -> str:
    """The WebSocket URL of an openpi server.

    :param address: ``HOST``, ``HOST:PORT``, or a URL that begins with ws://, wss://, http:// or https://
    :raises ValueError: if it is something else
    """
    has_scheme = "://" in address
    message = f"openpi server {address!r} is not an address; expected e.g. gpu-box:8000 or ws://gpu-box:8000"
    try:
        parts = urlsplit(address if has_scheme else f"ws://{address}")
        port = parts.port
    except ValueError as error:
        raise ValueError(message) from error
    odd = parts.username is not None or parts.query or parts.fragment or any(c.isspace() for c in address)
    if parts.scheme not in SCHEMES or not parts.hostname or odd:
        raise ValueError(message)
    if port is None and not has_scheme:
        port = OPENPI_PORT
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{SCHEMES[parts.scheme]}://{host}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
