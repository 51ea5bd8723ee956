"""Where a service listens."""

from __future__ import annotations

import errno
import ipaddress
import socket


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(host: str, port: int) -> str:
    """The URL of a service at this address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    :param port: 0: any that is free
    :raises OSError: in one sentence, if the address cannot be had
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # from here on callers wait instead of being refused
    except OSError as error:
        hint = "; choose another --port" if error.errno in (errno.EACCES, errno.EADDRINUSE) else ""
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}{hint}") from error
    return listener


def free_port(host: str, port: int = 0) -> int:
    """The port, if it is free; for 0 any that is.

    :raises OSError: in one sentence, if the address cannot be had
    """
    with bind(host, port) as listener:
        return int(listener.getsockname()[1])
