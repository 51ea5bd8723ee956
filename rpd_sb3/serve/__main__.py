"""Serve a teacher: ``python -m rpd_sb3.serve --teacher scripted --env PickCube-v1 --port 8000``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rpd_sb3.cli.common import RUN_ERROR, USER_ERROR, Interrupt, Parser, check_at_least, run_command, whole_number
from rpd_sb3.contract.names import TEACHERS
from rpd_sb3.serve.address import bind, is_loopback, url_of
from rpd_sb3.wire.urls import TOKEN

if TYPE_CHECKING:
    from rpd_sb3.contract.teacher import Teacher
    from rpd_sb3.serve.ray_engine import RayServer

SERVICES = ("http", "https", "openpi")
"""Kinds of teachers that are services themselves."""
LINGER = 2.0
"""Seconds for which the health pages still tell why the teacher could not be loaded."""


def make_parser() -> Parser:
    """Every flag."""
    parser = Parser(prog="python -m rpd_sb3.serve", description=__doc__)
    add = parser.add_argument
    add("--teacher", required=True, help=", ".join(name for name in TEACHERS if kind_of(name) not in SERVICES))
    add("--teacher-kwargs", nargs="+", default=[], metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("--env", metavar="ID", help="environment that the teacher is for; scripted needs it")
    add("--name", default="teacher", help="name under which clients ask for the teacher")
    add("--host", default="127.0.0.1", help="address to listen at; any other than loopback needs a token")
    add("--port", type=whole_number, default=8000, help="port to listen at; 0: any that is free")
    add("--token", help=f"token that clients must send [environment variable {TOKEN}]")
    add("--max-batch", type=whole_number, default=64, metavar="N", help="rows of one call of the teacher")
    wait = "how long a query waits for others to make a batch [a quarter of the last batch's time, at least 5]"
    add("--max-wait-ms", type=float, metavar="MS", help=wait)
    add("--queue-size", type=whole_number, default=256, metavar="N", help="queries that may wait; more are refused")
    add("--max-body-mb", type=whole_number, default=256, metavar="MB", help="size of one request")
    add("--engine", choices=("local", "ray"), default="local", help="ray: replicas in processes of a Ray cluster")
    add("--replicas", type=whole_number, default=1, metavar="N", help="copies of the teacher, for --engine ray")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM, and return the exit code: 2 for a mistake of the user's, 1 if the teacher failed."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: set_up(argv))


def set_up(argv: Sequence[str]) -> LocalServer | RayServer:
    """A service, ready to start.

    :raises ValueError: with what is wrong
    :raises OSError: if the port is taken
    """
    try:
        args = make_parser().parse_args(argv)
        args.token = args.token or os.environ.get(TOKEN)
        check(args)
        load = teacher_loader(args)
        max_wait = None if args.max_wait_ms is None else args.max_wait_ms / 1000
        options = {"max_batch": args.max_batch, "max_wait": max_wait, "queue_size": args.queue_size}
        if args.engine == "ray":
            from rpd_sb3.serve.ray_engine import RayServer

            return RayServer(args, load, options)
        return LocalServer(args, load, options)
    except ImportError as error:
        raise ValueError(f"{error}; {advice()}") from error


def kind_of(teacher: str) -> str:
    """``sb3:FILE`` -> ``sb3``."""
    return teacher.partition(":")[0]


def check(args: argparse.Namespace) -> None:
    """Find mistakes that need no teacher.

    :raises ValueError: naming the first one
    """
    check_at_least(vars(args), {"max_batch": 1, "queue_size": 1, "max_body_mb": 1, "replicas": 1})
    if args.max_wait_ms is not None and not 0 <= args.max_wait_ms < 60_000:
        raise ValueError(f"--max-wait-ms {args.max_wait_ms} must lie between 0 and 60000")
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port} must lie between 0 and 65535")
    if not args.name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise ValueError(f"--name {args.name!r} must consist of letters, digits, '-', '_' and '.'")
    if args.teacher == "scripted" and args.env is None:
        raise ValueError("--env is missing: a scripted teacher knows one task, e.g. --env PickCube-v1")
    if kind_of(args.teacher) in SERVICES:
        raise ValueError(f"--teacher {args.teacher} is a service already; train with it")
    if args.engine == "local" and args.replicas != 1:
        raise ValueError(f"--replicas {args.replicas} needs --engine ray; or start several services on different ports")
    if not is_loopback(args.host) and not args.token:
        raise ValueError(f"--host {args.host} lets other machines in: give a --token, or set {TOKEN}")


def teacher_loader(args: argparse.Namespace) -> Callable[[], Teacher]:
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


class LocalServer:
    """The service in this process.

    :param args: command line
    :param load: makes the teacher
    :param options: of the engine
    :raises ImportError: if a package is missing
    :raises OSError: if the port is taken
    """

    def __init__(self, args: argparse.Namespace, load: Callable[[], Teacher], options: Mapping[str, Any]) -> None:
        import uvicorn

        from rpd_sb3.serve.app import Service, make_app
        from rpd_sb3.serve.engine import Engine
        from rpd_sb3.serve.metrics import Metrics

        self.teacher = args.teacher
        self.engine = Engine(load, Metrics(), **options)
        app = make_app(Service(self.engine, args.name, args.max_body_mb * 2**20), args.token)
        self.socket = bind(args.host, args.port)
        config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=30, lifespan="on")
        self.server = uvicorn.Server(config)

    def run(self, interrupt: Interrupt) -> int:
        """Serve until a signal comes, or the teacher fails."""
        print(f"teacher {self.teacher} at {url_of(*self.socket.getsockname()[:2])}", flush=True)
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


if __name__ == "__main__":
    sys.exit(main())
