"""Serve a teacher: ``python -m rpd_sb3.serve --teacher scripted --env PickCube-v1 --port 8000``."""

from __future__ import annotations

import argparse
import importlib.metadata
import ipaddress
import os
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any

from rpd_sb3.cli.common import RUN_ERROR, USER_ERROR, Interrupt, Job, Parser, run_command, whole_number

ENGINES = ("local", "ray")
LINGER = 2.0
"""Seconds for which the health pages still tell why the teacher could not be loaded."""


def make_parser() -> Parser:
    """Every flag."""
    parser = Parser(prog="python -m rpd_sb3.serve", description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help="scripted, sb3:FILE, openvla:PATH, octo:PATH, or MODULE:CLASS for your own")
    add("--teacher-kwargs", nargs="+", default=[], metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("--env", metavar="ID", help="environment that the teacher is for; scripted needs it")
    add("--name", default="teacher", help="of the model, under which clients ask for it")
    add("--host", default="127.0.0.1", help="address to listen at; others than loopback need a token")
    add("--port", type=whole_number, default=8000, help="0: any that is free")
    add("--token", help="that clients must send [environment variable RPD_SB3_TOKEN]")
    add("--max-batch", type=whole_number, default=64, metavar="N", help="rows of one call of the teacher")
    wait = "that a query waits for others to make a batch [a quarter of the last batch's time, at least 5]"
    add("--max-wait-ms", type=float, metavar="MS", help=wait)
    add("--queue-size", type=whole_number, default=256, metavar="N", help="queries that may wait; more are refused")
    add("--max-body-mb", type=whole_number, default=256, metavar="MB", help="size of one request")
    add("--engine", choices=ENGINES, default="local", help="ray: replicas in processes of a Ray cluster")
    add("--replicas", type=whole_number, default=1, metavar="N", help="of the teacher, for --engine ray")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit code: 2 for a mistake of the user's, 1 if the teacher failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: set_up(argv))


def set_up(argv: Sequence[str]) -> Job:
    """A service, ready to start.

    :raises ValueError: with what is wrong
    """
    args = make_parser().parse_args(argv)
    args.token = args.token or os.environ.get("RPD_SB3_TOKEN")
    check(args)
    if args.engine == "ray":
        from rpd_sb3.serve.ray_engine import RayJob

        return RayJob(args, teacher_loader(args))
    return LocalJob(args)


def check(args: argparse.Namespace) -> None:
    """Find mistakes that need no teacher.

    :raises ValueError: naming the first one
    """
    for key in ("max_batch", "queue_size", "max_body_mb", "replicas"):
        if getattr(args, key) < 1:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(args, key)} must be at least 1")
    if args.max_wait_ms is not None and not 0 <= args.max_wait_ms < 60_000:
        raise ValueError(f"--max-wait-ms {args.max_wait_ms} must lie between 0 and 60000")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port} must lie between 0 and 65535")
    if not args.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"--name {args.name!r} must consist of letters, digits, '-', '_' and '.'")
    if args.teacher == "scripted" and args.env is None:
        raise ValueError("--env is missing: a scripted teacher knows one task, e.g. --env PickCube-v1")
    if args.teacher.startswith(("http:", "https:", "openpi:")):
        raise ValueError(f"--teacher {args.teacher} is a service already; train with it")
    if args.engine == "local" and args.replicas != 1:
        raise ValueError(
            f"--replicas {args.replicas} needs --engine ray; or start several services on ports of their own"
        )
    if not is_loopback(args.host) and not args.token:
        raise ValueError(f"--host {args.host} lets other machines in: give a --token, or set RPD_SB3_TOKEN")


def is_loopback(host: str) -> bool:
    """True if only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def teacher_loader(args: argparse.Namespace) -> Any:
    """A function that makes the teacher of the command line.

    :raises ValueError: for words that are not key:value
    """
    from rpd_sb3.cli.config import parse_pairs
    from rpd_sb3.teachers.registry import make_teacher

    kwargs = parse_pairs(args.teacher_kwargs, "--teacher-kwargs")
    return lambda: make_teacher(args.teacher, args.env or "", **kwargs)


def advice() -> str:
    """How to install what the service needs, without the PyTorch that the students' side would bring."""
    try:
        lines = importlib.metadata.requires("rpd_sb3") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return "docs/serving.md says what to install"
    needed = [
        package.strip() for package, _, when in (line.partition(";") for line in lines) if "teacher-server" in when
    ]
    return f"pip install {' '.join(needed)}"


class LocalJob:
    """The service in this process.

    :param args: command line
    :raises ValueError: if a package is missing
    :raises OSError: if the port is taken
    """

    def __init__(self, args: argparse.Namespace) -> None:
        try:
            import uvicorn

            from rpd_sb3.serve.app import Service, make_app
            from rpd_sb3.serve.engine import Engine
            from rpd_sb3.serve.metrics import Metrics

            load = teacher_loader(args)
        except ImportError as error:
            raise ValueError(f"{error}; {advice()}") from error
        self.args = args
        self.engine = Engine(
            load,
            Metrics(),
            max_batch=args.max_batch,
            max_wait=None if args.max_wait_ms is None else args.max_wait_ms / 1000,
            queue_size=args.queue_size,
        )
        app = make_app(Service(self.engine, args.name, args.max_body_mb * 2**20), args.token)
        self.socket = bind(args.host, args.port)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30, lifespan="on")
        self.server = uvicorn.Server(config)

    def run(self, interrupt: Interrupt) -> int:
        """Serve until a signal comes, or the teacher fails."""
        host, port = self.socket.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        print(f"teacher {self.args.teacher} at http://{address}:{port}", flush=True)
        # In a thread of its own uvicorn leaves signals to us.
        server = threading.Thread(target=self.server.run, args=([self.socket],))
        server.start()
        try:
            self.engine.finished.wait()
            print(f"error: the teacher {self.engine.state()}", file=sys.stderr, flush=True)
            server.join(LINGER)
            return USER_ERROR if self.engine.spec is None else RUN_ERROR
        finally:
            self.server.should_exit = True  # answers what has been accepted
            server.join()

    def close(self) -> None:
        """Free the port."""
        self.socket.close()


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    :raises OSError: in one sentence, if the address cannot be had
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)  # from here on callers wait instead of being refused
    except OSError as error:
        hint = "; choose another --port" if getattr(error, "errno", None) in (13, 98) else ""
        raise OSError(f"cannot listen at {host}:{port}: {error.strerror or error}{hint}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
