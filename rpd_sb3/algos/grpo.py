"""Group Relative Policy Optimization (Shao et al., 2024, arXiv 2402.03300) for episodes of an environment."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.type_aliases import GymEnv

from rpd_sb3.algos.groups import GroupedRollouts


class GRPO(GroupedRollouts):
    """PPO's clipped surrogate on A = (R - mean(R)) / std(R), the returns R of G episodes from one initial state (eq. 3).

    All steps of an episode get its advantage; there is no critic. Episodes that the rollout cuts off count for nothing, so
    ``n_steps`` should be the time limit of an episode or a multiple.

    :param group_size: G, at least 2
    :param kwargs: arguments of :class:`GroupedRollouts`, :class:`OnPolicyDistillation` and PPO
    :raises ValueError: if the groups do not fit the environments, or are too small
    """

    def __init__(self, policy: Any, env: GymEnv | str | None, *, group_size: int = 8, **kwargs: Any) -> None:
        if group_size < 2:
            raise ValueError(f"GRPO: group_size={group_size} must be at least 2")
        super().__init__(policy, env, group_size=group_size, **kwargs)

    def prepare_rollout(self) -> None:
        """Replace the advantages of SB3's critic by those of the groups."""
        self.rollout_buffer.advantages = self.group_advantages()
