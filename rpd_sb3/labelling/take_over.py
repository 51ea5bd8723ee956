"""In which episodes the teacher takes over from the student, and at which step. Shape letter: N environments."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

NEVER = np.iinfo(np.int64).max
OF_THE_LIMIT = 0.9
"""Share of an episode's time limit within which the teacher takes over: what is left must be enough to show something."""


class TakeOvers:
    """Draws who finishes an episode when it begins, and counts its steps.

    Each environment has random numbers of its own, so that what is drawn does not depend on the order in which
    environments are stepped, nor on the share.

    :param n_envs: N
    :param steps: a take-over comes at a step drawn uniformly from 0 to ``steps - 1``; None: to be set before the share is
    :param at_start: share of the take-overs that come at step 0 instead
    :param seed: of the draws
    :raises ValueError: if an argument is out of range
    """

    def __init__(self, n_envs: int, steps: int | None, at_start: float, seed: int) -> None:
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"VecTeacher: take_over_steps={steps!r} must be a whole number of at least 1")
        if not 0.0 <= at_start <= 1.0:
            raise ValueError(f"VecTeacher: take_over_at_start={at_start} must lie between 0 and 1")
        self.steps = steps
        self.at_start = at_start
        self.share = 0.0
        self.taken_over = np.zeros(n_envs, dtype=bool)
        """(N,) True where the teacher has acted in the current episode."""
        self._rngs = [np.random.default_rng([seed, env]) for env in range(n_envs)]
        self._draws = np.zeros((n_envs, 3))
        self._step = np.zeros(n_envs, dtype=np.int64)
        self._at = np.full(n_envs, NEVER)
        self.begin(np.arange(n_envs))

    @property
    def due(self) -> np.ndarray:
        """(N,) True where the teacher is to act on the current observation."""
        return self._step >= self._at

    @property
    def any_to_come(self) -> bool:
        """True while the teacher finishes an episode, now or later."""
        return bool((self._at < NEVER).any())

    def set_share(self, share: float) -> None:
        """Change the share of episodes that the teacher finishes, from those on that have not made a step.

        :raises ValueError: outside [0, 1]
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"teacher_share={share} must lie between 0 and 1")
        self.share = share
        self._decide(np.flatnonzero(self._step == 0))

    def begin(self, envs: np.ndarray) -> None:
        """An episode begins in each of these environments."""
        for env in envs:
            self._draws[env] = self._rngs[env].random(3)
        self._step[envs] = 0
        self.taken_over[envs] = False
        self._decide(envs)

    def advance(self, envs: np.ndarray, dones: np.ndarray) -> None:
        """One step was made in each of these environments.

        :param envs: ``(n,)``
        :param dones: ``(n,)`` bool: the step ended the episode, and the next one has begun
        """
        self._step[envs] += 1
        self.begin(envs[dones])

    def _decide(self, envs: np.ndarray) -> None:
        finishes, starts, when = self._draws[envs].T
        if self.share == 0.0:
            self._at[envs] = NEVER
            return
        assert self.steps is not None
        at = np.where(starts < self.at_start, 0, (when * self.steps).astype(np.int64))
        self._at[envs] = np.where(finishes < self.share, at, NEVER)


def steps_of_the_limit(venv: VecEnv) -> int | None:
    """Steps within which the teacher takes over: 90 % of the least time limit of the environments; None: they have none.

    The limit is that of the wrapper that ends the episode, Gymnasium's or ManiSkill's, else that of the spec.
    """
    limits: list[int | None]
    if venv.has_attr("_max_episode_steps"):
        limits = venv.get_attr("_max_episode_steps")
    else:
        limits = [None if spec is None else spec.max_episode_steps for spec in venv.get_attr("spec")]
    known = [limit for limit in limits if limit is not None]
    return max(1, round(OF_THE_LIMIT * min(known))) if len(known) == len(limits) else None
