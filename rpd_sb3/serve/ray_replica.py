"""What runs in the processes of Ray Serve: a replica of the teacher, and the router that picks one for each query."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica
from starlette.applications import Starlette

from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.serve.app import Service, make_app
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.memory import IDLE
from rpd_sb3.serve.metrics import Metrics


@serve.ingress()
class TeacherReplica:
    """A teacher with its engine and its application; ready as soon as it exists.

    :param load: makes the teacher
    :param name: of the model
    :param token: that clients must know; None: no token
    :param max_body: bytes of a request
    :param options: of the engine
    :raises RuntimeError: if the teacher cannot be loaded
    """

    def __init__(
        self, load: Callable[[], Teacher], name: str, token: str | None, max_body: int, options: Mapping[str, Any]
    ) -> None:
        self.name = name
        self.token = token
        self.max_body = max_body
        self.engine = Engine(load, Metrics(), **options)
        self.engine.start()
        while not self.engine.ready and not self.engine.finished.wait(0.05):
            pass
        self.check_health()

    def __serve_build_asgi_app__(self) -> Starlette:
        """The application, for Ray Serve."""
        service = Service(self.engine, self.name, self.max_body, shared_memory=False)
        return make_app(service, self.token, lifespan=False)

    def record_replica_metadata(self) -> dict[str, Any]:
        """What the router knows of this replica."""
        assert self.engine.spec is not None
        return {"stateful": self.engine.spec.stateful}

    def check_health(self) -> None:
        """Ray Serve replaces a replica whose health check fails.

        :raises RuntimeError: if queries are not answered any more
        """
        if self.engine.finished.is_set() or not self.engine.ready:
            raise RuntimeError(f"the teacher {' '.join(self.engine.state().split())}")

    def __del__(self) -> None:
        self.engine.close()


class StickyRouter(RequestRouter):
    """A client of a teacher with a memory stays at one replica; any other query goes where fewer are waiting.

    The client is the header ``X-Session-ID``; a new one goes to the replica with the fewest clients. Ray's own
    consistent hashing would put two clients on one of two replicas half of the time, and after the death of a replica
    would take a third of their clients away from the others.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once, by Ray Serve."""
        self._clients: dict[str, tuple[ReplicaID, float]] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas that may answer a query; Ray Serve takes the one with the shortest queue.

        :param candidate_replicas: that are running
        :param pending_request: the query
        """
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        client = pending_request.metadata.session_id
        if client and any(replica.replica_metadata.get("stateful", True) for replica in candidate_replicas):
            place = self._place(client, [replica.replica_id for replica in candidate_replicas])
            return [[replica for replica in candidate_replicas if replica.replica_id == place]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def _place(self, client: str, running: Sequence[ReplicaID]) -> ReplicaID:
        now = time.monotonic()
        self._clients = {
            name: (place, seen)
            for name, (place, seen) in self._clients.items()
            if place in running and now - seen < IDLE
        }
        if client in self._clients:
            place = self._clients[client][0]
        else:
            places = [place for place, _ in self._clients.values()]
            place = min(running, key=places.count)
        self._clients[client] = (place, now)
        return place
