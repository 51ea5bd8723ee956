"""Groups of environments whose episodes have the same initial states: GRPO compares them, VLA-OPD averages over them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import VecEnv


class EpisodeSeeds(gym.Wrapper):
    """Seeds the i-th episode after :meth:`begin_group` with a number that follows from the group's seed and i alone.

    So environments with the same group seed get the same initial states in the same order, however long their episodes
    last and however many random numbers their steps draw. Before the first call, and at a reset with a seed, it does
    nothing.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._group_seed: int | None = None
        self._episode = 0

    def begin_group(self, seed: int | None) -> None:
        """The next reset begins the first episode of this group; None: episodes are no longer seeded."""
        self._group_seed = seed
        self._episode = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is None and self._group_seed is not None:
            seed = int(np.random.SeedSequence([self._group_seed, self._episode]).generate_state(1)[0] // 2)
            self._episode += 1
        return self.env.reset(seed=seed, options=options)


def begin_groups(venv: VecEnv, group_size: int, rng: np.random.Generator) -> None:
    """Give each group of neighbouring environments a new seed; the next reset begins their episodes.

    :param venv: made by :func:`rpd_sb3.envs.make_vec_env`, or of environments in :class:`EpisodeSeeds`
    :param group_size: environments of a group; must divide their number
    :param rng: draws the seeds
    :raises ValueError: as :func:`check_groups`
    """
    check_groups(venv, group_size)
    venv.unwrapped._reset_seeds()  # a seed given to VecEnv.seed before would take precedence at the next reset
    for first in range(0, venv.num_envs, group_size):
        seed = int(rng.integers(2**31))
        venv.env_method("begin_group", seed, indices=range(first, first + group_size))


def check_groups(venv: VecEnv, group_size: int) -> None:
    """Checks that the environments can be seeded in groups of this size.

    :raises ValueError: if the size does not divide their number, or they are not in :class:`EpisodeSeeds`
    """
    if group_size < 1 or venv.num_envs % group_size:
        raise ValueError(f"group_size={group_size} must divide n_envs={venv.num_envs}")
    if group_size > 1 and not venv.has_attr("begin_group"):
        raise ValueError(
            f"group_size={group_size} needs environments that can start alike: wrap each in rpd_sb3.envs.EpisodeSeeds, "
            "or make them with make_vec_env"
        )
