"""Continuous actions as tokens, exactly OpenVLA's convention: uniform bins over [-1, 1] per dimension.

``n_bins`` edges enclose ``n_bins - 1`` bins, so the last two tokens stand for the same action; OpenVLA's token id is its
vocabulary's size - 1 - token. Source: Kim et al., 2024, and the public code of its ActionTokenizer.
"""

from __future__ import annotations

import numpy as np

N_BINS = 256


def edges(n_bins: int) -> np.ndarray:
    """Edges of the bins, ``(n_bins,)`` from -1 to 1."""
    return np.linspace(-1.0, 1.0, n_bins)


def centres(n_bins: int) -> np.ndarray:
    """The action in [-1, 1] that each token stands for, ``(n_bins,)``; the last two are equal."""
    borders = edges(n_bins)
    inner = (borders[:-1] + borders[1:]) / 2
    return np.append(inner, inner[-1])


def to_tokens(actions: np.ndarray, n_bins: int) -> np.ndarray:
    """Tokens of actions; what lies outside [-1, 1] is clipped.

    :param actions: ``(..., A)`` in [-1, 1]
    :param n_bins: tokens per dimension
    :return: int64 of the same shape, in [0, n_bins - 1]; the last token is that of exactly 1.0
    """
    return np.digitize(np.clip(actions, -1.0, 1.0), edges(n_bins)) - 1


def to_actions(tokens: np.ndarray, n_bins: int) -> np.ndarray:
    """Actions in [-1, 1] that tokens stand for.

    :param tokens: ``(..., A)`` int in [0, n_bins - 1]
    :param n_bins: tokens per dimension
    :return: float32 of the same shape
    """
    return centres(n_bins)[tokens].astype(np.float32)
