"""Rollouts in groups of environments that start alike, and the episodes that lie in a rollout as a whole."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.algos.losses import group_advantage
from rpd_sb3.envs.groups import begin_groups, check_groups


class EpisodeSpan(NamedTuple):
    """An episode that lies in the rollout as a whole."""

    steps: slice
    episode_return: float | None
    """Sum of the environment's rewards: undiscounted, without SB3's bootstrap at the time limit. None: no Monitor."""


class GroupedRollouts(OnPolicyDistillation):
    """Each rollout begins with a reset: ``group_size`` neighbouring environments are a group, and the i-th episode of each
    member begins alike.

    :param group_size: G; 1: no groups, and no reset
    :param filter_groups: leave out groups whose returns are all equal (all failed, or all succeeded alike), as DAPO (Yu et
        al., 2025) does: the mean of the surrogate is over the other transitions alone
    :param kwargs: arguments of :class:`OnPolicyDistillation` and PPO; ``vf_coef`` is 0, advantages are not normalized again
    :raises ValueError: if the groups do not fit the environments
    """

    def __init__(
        self, policy: Any, env: GymEnv | str | None, *, group_size: int = 8, filter_groups: bool = True, **kwargs: Any
    ) -> None:
        if group_size < 1:
            raise ValueError(f"{type(self).__name__}: group_size={group_size} must be at least 1")
        self.group_size = group_size
        self.filter_groups = filter_groups
        self._episodes: list[list[EpisodeSpan]] = []
        super().__init__(policy, env, **({"vf_coef": 0.0, "normalize_advantage": False} | kwargs))

    def _setup_model(self) -> None:
        if self.env is not None:
            check_groups(self.env, self.group_size)
        super()._setup_model()

    def set_random_seed(self, seed: int | None = None) -> None:
        super().set_random_seed(seed)
        self._group_rng = np.random.default_rng(seed)

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        self._episodes = [[] for _ in range(env.num_envs)]
        self._starts = [0] * env.num_envs
        if self.group_size > 1:
            begin_groups(env, self.group_size, self._group_rng)
            # SB3 goes on from these observations.
            self._last_obs = env.reset()  # type: ignore[assignment]
            self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        end = self.rollout_buffer.pos + 1
        for env in np.flatnonzero(() if dones is None else dones):
            episode_return = infos[env].get("episode", {}).get("r")
            self._episodes[env].append(EpisodeSpan(slice(self._starts[env], end), episode_return))
            self._starts[env] = end

    def group_advantages(self) -> np.ndarray:
        """(R - mean(R)) / std(R) over the episodes that began alike, for all steps of an episode.

        Episodes that the rollout cuts off, and those of their group that they were to be compared with, count for nothing.

        :return: ``(n_steps, n_envs)``, scaled so that the mean over the rollout is one over the transitions that count
        :raises ValueError: if the environments do not report the returns of episodes
        """
        advantages = np.zeros_like(self.rollout_buffer.advantages)
        kept = np.zeros(advantages.shape, dtype=bool)
        n_groups = n_used = 0
        for first in range(0, len(self._episodes), self.group_size):
            members = range(first, first + self.group_size)
            for episodes in zip(*(self._episodes[env] for env in members)):
                returns = [episode.episode_return for episode in episodes]
                if None in returns:
                    raise ValueError(f"{type(self).__name__} needs episodes' returns: wrap each env in SB3's Monitor")
                group = group_advantage(th.tensor([returns]))[0].tolist()
                used = any(group)
                n_groups += 1
                n_used += used
                for env, episode, advantage in zip(members, episodes, group):
                    advantages[episode.steps, env] = advantage
                    kept[episode.steps, env] = used or not self.filter_groups
        self.logger.record("rollout/groups", n_groups)
        self.logger.record("rollout/mixed_groups", n_used)
        self.logger.record("rollout/kept_transitions", float(kept.mean()))
        return advantages * (kept.size / max(kept.sum(), 1))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_episodes", "_starts", "_group_rng"]
