"""Replicas of a teacher behind Ray Serve: ``python -m rpd_sb3.serve --engine ray --replicas 2``."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

from rpd_sb3.contract.teacher import Teacher, TeacherError
from rpd_sb3.serve.address import free_port, url_of

APP = "rpd_sb3"
"""Name of the application in the cluster."""
CLUSTER_PATIENCE = 10.0
"""Seconds for the cluster to take a connection."""
POLL = 1.0
"""Seconds between two looks at the cluster."""
LOCAL_SETTINGS = {
    # Ray's own ports listen at 127.0.0.1 only, on Linux too.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Replicas get their share of a CPU that students use as well: Ray's default is 15.
    "RAY_worker_niceness": "0",
    # An HTTP proxy that died is back after 10 s instead of 30 s, as measured.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # One that is slow to start is not killed for it after 5 s.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
"""Environment variables for a Ray that is started here."""


class RayServer:
    """The service in processes of a Ray cluster: the one that RAY_ADDRESS names, or a new one on this machine.

    :param args: command line
    :param load: makes the teacher, in each replica
    :param options: of each replica's engine
    :raises ValueError: if a package is missing, the cluster is too small or busy, or the teacher cannot be loaded
    :raises OSError: if the port is taken
    """

    def __init__(self, args: argparse.Namespace, load: Callable[[], Teacher], options: Mapping[str, Any]) -> None:
        self.args = args
        self._ours = False
        cluster = os.environ.get("RAY_ADDRESS")
        if cluster and not args.port:
            raise ValueError(f"--port 0 is for one machine; choose a number for the cluster RAY_ADDRESS={cluster}")
        self.port = args.port if cluster else free_port(args.host, args.port)
        try:
            join_cluster(cluster)
            self._start_serve()
            self._deploy(load, options)
        except BaseException:
            self.close()
            raise

    def run(self, interrupt: Any) -> int:
        """Serve until a signal comes; Ray replaces replicas that die."""
        print(f"teacher {self.args.teacher} at {url_of(self.args.host, self.port)}", flush=True)
        was = "RUNNING"
        while True:
            time.sleep(POLL)
            status, message = application_status()
            if status in ("GONE", "DELETING"):
                raise TeacherError("the application has been removed from the Ray cluster")
            if status != was:
                print(f"the replicas are {status}: {last_reason(message)}", file=sys.stderr, flush=True)
            was = status

    def close(self) -> None:
        """Answer what was accepted, end the replicas, and Ray if it was started here."""
        ray = sys.modules.get("ray")
        if ray is None or not ray.is_initialized():
            return
        with redirect_stdout(None):  # Ray prints that its controller, which it has killed itself, failed
            if self._ours:
                ending = threading.Thread(target=end_serve, daemon=True)
                ending.start()
                # A signal to the whole process group ends Ray too, and asking a cluster that is gone takes a minute.
                while ending.is_alive() and cluster_is_up():
                    ending.join(POLL / 2)
            ray.shutdown()

    def _start_serve(self) -> None:
        import ray
        from ray import serve

        busy = serve.status()
        if busy.proxies or busy.applications:
            raise ValueError(
                f"Ray Serve runs on this cluster already, with {', '.join(busy.applications) or 'no application'}: "
                "end it with `serve shutdown`, or start another cluster"
            )
        check_room(self.args.replicas)
        self._ours = True
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": self.args.host, "port": self.port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
        except ray.exceptions.RayError as error:  # it has waited until the proxy listens
            place = f"{self.args.host}:{self.port}, on the cluster's head node"
            raise OSError(f"Ray's HTTP proxy cannot start at {place}: {last_reason(str(error))}") from error

    def _deploy(self, load: Callable[[], Teacher], options: Mapping[str, Any]) -> None:
        from ray import serve

        from rpd_sb3.serve.ray_replica import TeacherReplica

        args = self.args
        deployment = serve.deployment(
            name=args.name,
            num_replicas=args.replicas,
            ray_actor_options={"num_cpus": 1, "num_gpus": gpu_share(args.replicas)},
            max_ongoing_requests=args.queue_size,
            max_queued_requests=args.queue_size,
            backpressure_config={"retry_after_s": 1.0},
            health_check_period_s=2.0,
            graceful_shutdown_wait_loop_s=0.1,
            max_constructor_retry_count=1,
            request_router_config={"request_router_class": "rpd_sb3.serve.ray_replica.StickyRouter"},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        teacher = deployment(TeacherReplica).bind(load, args.name, args.token, args.max_body_mb * 2**20, options)
        serve.run_many([serve.RunTarget(teacher, name=APP)], wait_for_applications_running=False)
        said = ""
        while (state := application_status())[0] != "RUNNING":
            status, message = state
            if status not in ("NOT_STARTED", "DEPLOYING"):
                raise ValueError(last_reason(message))
            if message and message != said:
                print(f"waiting: {last_reason(message)}", file=sys.stderr, flush=True)
            said = message
            time.sleep(POLL / 2)


def join_cluster(cluster: str | None) -> None:
    """Connect to a Ray cluster.

    :param cluster: its address; None: start one on this machine, closed to others
    :raises ValueError: if Ray is missing
    :raises OSError: if there is no such cluster, or Ray does not start
    """
    settings = LOCAL_SETTINGS if cluster is None else {}
    for key, value in {"RAY_USAGE_STATS_ENABLED": "0", **settings}.items():
        os.environ.setdefault(key, value)  # Ray reads them when it is imported
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray Serve ({error}): pip install 'rpd_sb3[ray]'") from error
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        host, _, port = (cluster or "").rpartition("//")[2].rpartition(":")
        if host and port.isdigit():
            socket.create_connection((host, int(port)), CLUSTER_PATIENCE).close()  # Ray itself would try for minutes
        with signals_kept():
            ray.init(cluster or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # a bare one if Ray's processes are not there within 30 s
        if cluster is None:
            raise OSError(f"Ray does not start: {error}") from error
        raise OSError(
            f"cannot join the Ray cluster RAY_ADDRESS={cluster}: {error}; if it wants a token, set RAY_AUTH_MODE=token"
        ) from error


@contextmanager
def signals_kept() -> Iterator[None]:
    """Undo what ray.init does to SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def end_serve() -> None:
    """Answer what was accepted, and end Ray Serve."""
    from ray import serve

    serve.delete(APP)  # waits for the answers, which shutdown does not
    serve.shutdown()


def check_room(replicas: int) -> None:
    """Check that all replicas can be placed at once.

    :raises ValueError: naming what is missing
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind, need in (("CPU", replicas), ("GPU", replicas * gpu_share(replicas))):
        if need > free.get(kind, 0):
            raise ValueError(
                f"--replicas {replicas} needs {need:g} {kind}s, but {free.get(kind, 0):g} of the Ray cluster's "
                f"{total.get(kind, 0):g} are free"
            )


def gpu_share(replicas: int) -> float:
    """GPUs of one replica: as few replicas as possible share one, and 0 where the cluster has none."""
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0))
    return 1 / math.ceil(replicas / gpus) if gpus else 0


def cluster_is_up() -> bool:
    """True if the cluster's head accepts connections."""
    import ray

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), CLUSTER_PATIENCE).close()
    except OSError:
        return False
    return True


def application_status() -> tuple[str, str]:
    """Ray Serve's status of the application, e.g. RUNNING, and what it says about it."""
    from ray import serve

    app = serve.status().applications.get(APP)
    if app is None:
        return "GONE", ""
    messages = [app.message, *(deployment.message for deployment in app.deployments.values())]
    return str(app.status.value), next((message for message in messages[::-1] if message), "")


def last_reason(message: str) -> str:
    """The innermost reason in a message of Ray Serve: its last line, without the traceback before it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return last[max(last.find("the teacher "), 0) :]
