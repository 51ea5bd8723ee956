"""What the teacher keeps for each environment: the last images, the rest of a chunk, how many answers were sampled.

Shape letters: N rows of a query, T images of the history, E actions that are executed of a chunk, A = 7.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Frame = dict[str, np.ndarray]
"""Images (H, W, 3) uint8 of one step, by their names in Octo."""


class Plan(NamedTuple):
    """The actions of a chunk that are left to execute."""

    instruction: str
    actions: np.ndarray
    """(up to E, A) float32, in the order of execution."""
    stds: np.ndarray
    """Their standard deviations, of the same shape."""

    def rest(self) -> Plan | None:
        """Without the first action; None if that was the last."""
        return Plan(self.instruction, self.actions[1:], self.stds[1:]) if len(self.actions) > 1 else None


class Memory:
    """Histories and chunks by environment. Not thread safe.

    :param horizon: T
    :param exec_horizon: E; with T = E = 1 only the number of answers is kept
    """

    def __init__(self, horizon: int, exec_horizon: int) -> None:
        self.horizon = horizon
        self.stateful = horizon > 1 or exec_horizon > 1
        self._past: dict[int, list[Frame]] = {}
        self._plans: dict[int, Plan | None] = {}
        self._counts: Counter[int] = Counter()

    def check(self, env_ids: Sequence[int], starts: Sequence[bool]) -> None:
        """Checks that a query continues the episodes that are kept.

        :param env_ids: N environments
        :param starts: N of them: whether this is the first query of an episode
        :raises ValueError: if an environment is named twice, or is unknown and does not start an episode
        """
        if not self.stateful:
            return
        if len(set(env_ids)) != len(env_ids):
            raise ValueError("teacher 'octo' has a memory: a query may name an environment only once")
        new = [env for env, start in zip(env_ids, starts) if not start and env not in self._past]
        if new:
            raise ValueError(
                f"teacher 'octo' has a memory, but knows nothing of environment {new[0]}: its first query must have "
                "episode_start set"
            )

    def history(self, env: int, start: bool, frame: Frame) -> list[Frame]:
        """The last 1 to T frames, the current one at the end."""
        past = [] if start else self._past.get(env, [])
        return [*past, frame]

    def plan(self, env: int, start: bool, instruction: str) -> Plan | None:
        """The rest of the chunk; None: there is none, ask the model. A new episode or instruction ends a chunk."""
        plan = None if start else self._plans.get(env)
        return plan if plan is not None and plan.instruction == instruction else None

    def counts(self, env_ids: Sequence[int]) -> list[int]:
        """How many answers were sampled for each before; an environment may be named several times."""
        seen: Counter[int] = Counter()
        numbers = []
        for env in env_ids:
            numbers.append(self._counts[env] + seen[env])
            seen[env] += 1
        return numbers

    def count(self, env_ids: Sequence[int]) -> None:
        """Count one more answer for each of these."""
        self._counts.update(env_ids)

    def keep(self, env: int, history: Sequence[Frame], plan: Plan | None) -> None:
        """Keep what the next query of an environment needs.

        :param env: the environment
        :param history: frames of this query
        :param plan: what is left of the chunk after it
        """
        if not self.stateful:
            return
        last = history[1:] if len(history) == self.horizon else history
        # Copies of the current images: the caller may overwrite the query's arrays.
        kept = [*last[:-1], {key: image.copy() for key, image in last[-1].items()}] if last else []
        self._past[env], self._plans[env] = kept, plan


def window(histories: Sequence[Sequence[Frame]], horizon: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Histories as Octo takes them: of equal length, with a mask.

    Shorter ones begin with copies of their first frame, which the mask hides.

    :param histories: M lists of 1 to T frames
    :param horizon: T
    :return: images (M, T, H, W, 3) uint8 by name, and the mask (M, T) bool
    """
    lengths = np.array([len(history) for history in histories])
    full = [[*[history[0]] * (horizon - len(history)), *history] for history in histories]
    images = {key: np.stack([np.stack([frame[key] for frame in frames]) for frames in full]) for key in full[0][0]}
    return images, np.arange(horizon) >= horizon - lengths[:, None]
