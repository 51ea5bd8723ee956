"""Continuous actions as tokens, exactly OpenVLA's convention: uniform bins over [-1, 1] per dimension.

``n_bins`` edges enclose ``n_bins - 1`` bins, so the last two tokens stand for the same action; OpenVLA's token id is its
vocabulary's size - 1 - token. Source: Kim et al., 2024, and the public code of its ActionTokenizer.

Shape letter: A action dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gymnasium import spaces

N_BINS = 256


class Bounds(NamedTuple):
    """The actions that the ends of the bins, -1 and 1, stand for."""

    low: np.ndarray
    """``(A,)``; may be the greater of the two."""
    high: np.ndarray

    def unnormalize(self, x: np.ndarray) -> np.ndarray:
        """Actions of normalized actions x: ``low + (x + 1) / 2 (high - low)``.

        :param x: ``(..., A)``
        :return: the same shape, float64
        """
        return 0.5 * (np.asarray(x, np.float64) + 1.0) * (self.high - self.low) + self.low

    def normalize(self, actions: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`unnormalize`; 0 where both ends are the same."""
        width = np.where(self.high == self.low, np.inf, self.high - self.low)
        return np.where(np.isinf(width), 0.0, 2.0 * (np.asarray(actions, np.float64) - self.low) / width - 1.0)


def edges(n_bins: int) -> np.ndarray:
    """Edges of the bins, ``(n_bins,)`` from -1 to 1."""
    return np.linspace(-1.0, 1.0, n_bins)


def centres(n_bins: int) -> np.ndarray:
    """The action in [-1, 1] that each token stands for, ``(n_bins,)``; the last two are equal."""
    borders = edges(n_bins)
    inner = (borders[:-1] + borders[1:]) / 2
    return np.append(inner, inner[-1])


def to_tokens(actions: np.ndarray, n_bins: int, bounds: Bounds | None = None) -> np.ndarray:
    """Tokens of actions; actions outside the bins are clipped.

    :param actions: ``(..., A)``
    :param n_bins: tokens per dimension
    :param bounds: ends of the bins; None: -1 and 1
    :return: int64 of the same shape, in [0, n_bins - 1]; the last token is that of exactly 1.0
    """
    actions = actions if bounds is None else bounds.normalize(actions)
    return np.digitize(np.clip(actions, -1.0, 1.0), edges(n_bins)) - 1


def to_actions(tokens: np.ndarray, n_bins: int, bounds: Bounds | None = None) -> np.ndarray:
    """The actions that tokens stand for.

    :param tokens: ``(..., A)`` int in [0, n_bins - 1]
    :param n_bins: tokens per dimension
    :param bounds: ends of the bins; None: -1 and 1
    :return: float32 of the same shape
    """
    actions = centres(n_bins)[tokens]
    return (actions if bounds is None else bounds.unnormalize(actions)).astype(np.float32)


def to_clipped_actions(tokens: np.ndarray, n_bins: int, bounds: Bounds | None = None) -> np.ndarray:
    """Actions that ``ActionTokens`` executes for tokens: those of :func:`to_actions`, clipped to [-1, 1]."""
    return to_actions(tokens, n_bins, bounds).clip(-1.0, 1.0)


def token_bins(space: spaces.Space) -> int | None:
    """Bins of each dimension if actions are tokens (:class:`~rpd_sb3.envs.ActionTokens`); None if they are not."""
    if not isinstance(space, spaces.MultiDiscrete) or space.nvec.ndim != 1 or space.start.any():
        return None
    sizes = set(space.nvec.tolist())
    return sizes.pop() if len(sizes) == 1 else None


def require_token_bins(owner: str, space: spaces.Space) -> int:
    """Bins of each dimension of an action space of tokens.

    :param owner: who needs tokens, for the message
    :param space: the action space
    :raises ValueError: if actions are not tokens
    """
    n_bins = token_bins(space)
    if n_bins is None:
        raise ValueError(
            f"{owner} needs action tokens, a MultiDiscrete space of equal sizes that starts at 0, got {space}; "
            "wrap the env in ActionTokens (--env-kwargs tokens:true)"
        )
    return n_bins
