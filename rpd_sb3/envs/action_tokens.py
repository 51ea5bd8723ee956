"""ActionTokens: actions as tokens, as a vision-language-action model gives them.

Shape letter: A action dimensions.
"""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.contract.bins import N_BINS, Bounds, to_clipped_actions, to_tokens, token_bins


class ActionTokens(gym.ActionWrapper):
    """The environment with the action space ``MultiDiscrete([n_bins] * A)``; it is given the centres of the bins.

    Bins are exactly OpenVLA's (:mod:`rpd_sb3.contract.bins`): 256 tokens, 255 centres from -0.996 to 0.996.

    :param env: environment with actions ``Box(-1, 1, (A,))``
    :param n_bins: tokens of each action dimension
    :param bounds: actions that the ends of the bins stand for, ``(A,)`` each, e.g. a teacher's
        (:func:`rpd_sb3.contract.conventions.convert_token_bounds`); None: -1 and 1. Actions are clipped to [-1, 1]
    :raises ValueError: for another action space, fewer than two tokens, or bounds that do not fit
    """

    def __init__(self, env: gym.Env, n_bins: int = N_BINS, bounds: Bounds | None = None) -> None:
        space = env.action_space
        if not (
            isinstance(space, spaces.Box)
            and len(space.shape) == 1
            and (space.low == -1.0).all()
            and (space.high == 1.0).all()
        ):
            raise ValueError(
                f"ActionTokens bins actions of Box(-1, 1, (A,)), but the environment takes {space}; if only the bounds "
                "differ, wrap it in gymnasium.wrappers.RescaleAction(env, -1.0, 1.0) first"
            )
        if not isinstance(n_bins, int) or n_bins < 2:
            raise ValueError(f"ActionTokens: n_bins={n_bins!r} must be at least 2")
        if bounds is not None:
            bounds = _arrays(bounds, space.shape)
        super().__init__(env)
        self.n_bins = n_bins
        self.token_bounds = bounds
        self.action_space = spaces.MultiDiscrete(np.full(space.shape, n_bins))

    def action(self, action: np.ndarray) -> np.ndarray:
        """Bin centres (A,) float32 of tokens (A,)."""
        return to_clipped_actions(np.asarray(action), self.n_bins, self.token_bounds)


def targets(actions: np.ndarray, space: spaces.Space, bounds: Bounds | None = None) -> np.ndarray:
    """Demonstrated actions as a student with this action space learns them: the actions themselves, or their tokens.

    :param actions: ``(n, A)``, continuous
    :param space: Box of shape (A,), or MultiDiscrete([n_bins] * A)
    :param bounds: of the tokens; None: -1 and 1
    :return: ``(n, A)`` float32, or int64 tokens
    :raises ValueError: if the actions do not fit the space
    """
    n_bins = token_bins(space)
    if n_bins is None and not isinstance(space, spaces.Box):
        raise ValueError(f"imitation of continuous actions needs a Box or action tokens, but the env takes {space}")
    low, high = (space.low, space.high) if isinstance(space, spaces.Box) else (-1.0, 1.0)
    if actions.shape[1:] != space.shape:
        raise ValueError(f"the demonstrations have actions of shape {actions.shape[1:]}, but the env takes {space}")
    if np.any(actions < np.asarray(low) - 1e-5) or np.any(actions > np.asarray(high) + 1e-5):
        raise ValueError(
            f"the demonstrations have actions from {actions.min():g} to {actions.max():g}, outside of what the env takes, "
            f"{space if n_bins is None else '[-1, 1] in tokens'}; rescale them"
        )
    return actions.astype(np.float32) if n_bins is None else to_tokens(actions, n_bins, bounds)


def find_token_bounds(venv: VecEnv) -> Bounds | None:
    """The bounds of the environments' :class:`ActionTokens`; None: they are -1 and 1, or the actions are not tokens."""
    return venv.get_attr("token_bounds")[0] if venv.has_attr("token_bounds") else None


def _arrays(bounds: Bounds, shape: tuple[int, ...]) -> Bounds:
    try:
        arrays = Bounds(*(np.asarray(ends, np.float64) for ends in bounds))
    except (TypeError, ValueError):
        arrays = Bounds(np.zeros(0), np.zeros(0))
    if any(ends.shape != shape or not np.isfinite(ends).all() for ends in arrays):
        raise ValueError(f"ActionTokens: bounds={bounds} must be two finite arrays of shape {shape}")
    return arrays
