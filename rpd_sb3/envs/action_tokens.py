"""ActionTokens: actions as tokens, as a vision-language-action model gives them."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rpd_sb3.bins import N_BINS, to_actions


class ActionTokens(gym.ActionWrapper):
    """The environment acts on bin centres: ``MultiDiscrete([n_bins] * A)`` instead of ``Box(-1, 1, (A,))``.

    Bins are exactly OpenVLA's (:mod:`rpd_sb3.bins`): 256 tokens, 255 centres from -0.996 to 0.996.

    :param env: environment with actions in [-1, 1]
    :param n_bins: tokens of each action dimension
    :raises ValueError: for another action space, or fewer than two tokens
    """

    def __init__(self, env: gym.Env, n_bins: int = N_BINS) -> None:
        space = env.action_space
        if not (
            isinstance(space, spaces.Box) and space.shape and len(space.shape) == 1 and _is_unit(space.low, space.high)
        ):
            raise ValueError(
                f"ActionTokens bins actions of Box(-1, 1, (A,)), but the environment takes {space}; if only the bounds "
                "differ, wrap it in gymnasium.wrappers.RescaleAction(env, -1.0, 1.0) first"
            )
        if n_bins < 2:
            raise ValueError(f"ActionTokens: n_bins={n_bins} must be at least 2")
        super().__init__(env)
        self.n_bins = n_bins
        self.action_space = spaces.MultiDiscrete(np.full(space.shape, n_bins))

    def action(self, action: np.ndarray) -> np.ndarray:
        """Bin centres (A,) float32 of tokens (A,)."""
        return to_actions(np.asarray(action), self.n_bins)


def _is_unit(low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.all(low == -1.0) and np.all(high == 1.0))
