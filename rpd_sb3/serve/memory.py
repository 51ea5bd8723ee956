"""What a teacher with a memory needs: a slot for each (client, environment), and answers to repeated questions."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import numpy as np

IDLE = 3600.0
"""Seconds after which a silent client is forgotten."""


class OutOfStep(ValueError):
    """A query that does not continue what the service knows of its client."""


class ClientMemory:
    """Which slot of the teacher's memory belongs to whom. Not thread safe: the engine holds a lock.

    The teacher sees slots as environment ids, so no two clients ever share a memory. A slot that is given away again
    begins with the start of an episode, and so does one whose memory missed a query.

    :param max_slots: of all clients together
    :param idle: seconds after which a silent client is forgotten
    """

    def __init__(self, max_slots: int = 4096, idle: float = IDLE) -> None:
        self.max_slots = max_slots
        self.idle = idle
        self._clients: dict[str, _Client] = {}
        self._free = list(reversed(range(max_slots)))
        self._gaps: dict[int, int | None] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def repeated(self, client: str, sequence: int) -> Future[Any] | None:
        """The answer, maybe still to come, to a query that was asked before; None for a new one.

        :raises OutOfStep: for an older query than the last one
        """
        known = self._clients.get(client)
        if known is None or sequence > known.sequence:
            return None
        if sequence < known.sequence or known.answer is None:
            raise OutOfStep(f"query {sequence} of client {client!r} comes after its query {known.sequence}")
        return known.answer

    def slots(self, client: str, env_ids: np.ndarray, episode_starts: np.ndarray) -> np.ndarray:
        """Slots (N,) of these environments.

        :raises OutOfStep: for an environment that is asked about in the middle of an episode and not known
        """
        if len(np.unique(env_ids)) != len(env_ids):
            raise OutOfStep("the teacher has a memory: a query may name an environment only once")
        self._forget()
        known = self._clients.get(client)
        have = {} if known is None else known.slots
        new = [int(env) for env, start in zip(env_ids, episode_starts) if int(env) not in have and not start]
        if new:
            raise OutOfStep(
                f"the teacher has a memory, but knows nothing of environments {new[:5]} of client {client!r}: it was "
                "restarted, or their first query does not say episode_start"
            )
        missing = [env for env in map(int, env_ids) if env not in have]
        if len(missing) > len(self._free):
            raise OutOfStep(f"the teacher's memory is full: {self.max_slots} environments of {len(self)} clients")
        if known is None:
            known = self._clients[client] = _Client()
        for env in missing:
            known.slots[env] = self._free.pop()
        known.seen = time.monotonic()
        return np.array([known.slots[int(env)] for env in env_ids], dtype=np.int64)

    def asked(self, client: str, sequence: int, answer: Future[Any]) -> None:
        """Keep the answer to a client's latest query, in case it is repeated."""
        known = self._clients[client]
        known.sequence, known.answer = sequence, answer

    def missed(self, slots: np.ndarray, sequence: int | None) -> None:
        """The teacher's memory of these slots lacks a query.

        :param sequence: of the query, if it may still be asked again; None: it is lost
        """
        for slot in slots.tolist():
            self._gaps[slot] = sequence if self._gaps.get(slot, sequence) == sequence else None

    def close_gaps(self, slots: np.ndarray, episode_starts: np.ndarray, sequence: int | None) -> None:
        """Check that the teacher's memory is what this query continues, and note that it is complete again.

        :raises OutOfStep: if it missed a query since the episode's start, and this is not that one
        """
        for slot, start in zip(slots.tolist(), episode_starts):
            if slot in self._gaps and not start and (sequence is None or sequence != self._gaps[slot]):
                raise OutOfStep(
                    "the teacher's memory missed a query of this episode, which failed or was put off; it continues at "
                    "the next episode_start"
                )
        for slot in slots.tolist():
            self._gaps.pop(slot, None)

    def _forget(self) -> None:
        now = time.monotonic()
        for name in [name for name, client in self._clients.items() if now - client.seen > self.idle]:
            self._free.extend(self._clients.pop(name).slots.values())


class _Client:
    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.sequence = -1
        self.answer: Future[Any] | None = None
        self.seen = time.monotonic()
