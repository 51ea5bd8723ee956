"""A scripted expert's action as a distribution: Gaussians around one or two actions, as tokens or as samples.

Shape letters: N queries, M modes, K action dimensions (tokens), V bins.
"""

from __future__ import annotations

import numpy as np

from rpd_sb3.contract.bins import centres


def bin_log_probs(means: np.ndarray, std: float, n_bins: int) -> np.ndarray:
    """Discretised Gaussians: log p(v) of the bins, -(c_v - mean)^2 / (2 std^2) normalized over the V centres c_v.

    :param means: ``(..., K)`` in [-1, 1]
    :param std: in units of the action
    :param n_bins: V
    :return: ``(..., K, V)`` float64
    """
    logits = -0.5 * ((centres(n_bins) - np.clip(means, -1.0, 1.0)[..., None]) / std) ** 2
    return logits - _log_sum_exp(logits, -1)[..., None]


def conditional_logits(log_probs: np.ndarray, prefix: np.ndarray | None) -> np.ndarray:
    """Logits of each token of an equal mixture of M token distributions.

    With a prefix, ``log p(a_k | a_<k)``, as an autoregressive teacher scores a student's tokens: the tokens before tell
    the modes apart. Without, the marginals ``log p(a_k)``, as a teacher that decodes in parallel gives them.

    :param log_probs: ``(N, M, K, V)`` of each mode, whose tokens are independent
    :param prefix: tokens ``(N, K)`` int to condition on; None: the marginals
    :return: ``(N, K, V)`` float32
    """
    n_modes, n_tokens = log_probs.shape[1:3]
    weights = np.zeros((*log_probs.shape[:2], n_tokens))  # log weight of a mode before each token
    if prefix is not None:
        taken = np.take_along_axis(log_probs, prefix[:, None, :, None], axis=-1)[..., 0]
        weights[..., 1:] = np.cumsum(taken, axis=-1)[..., :-1]
        weights -= _log_sum_exp(weights, 1)[:, None]
    else:
        weights -= np.log(n_modes)
    return _log_sum_exp(weights[..., None] + log_probs, 1).astype(np.float32)


def fit_gaussian(samples: np.ndarray, std_floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of samples: the Gaussian that PPD imitates where a teacher only gives samples.

    :param samples: ``(n, N, K)``, n > 1
    :param std_floor: least std, in units of the action: samples of a confident teacher may be all equal, and the KL to
        a Gaussian with std 0 is infinite
    :return: mean and std (not variance), both ``(N, K)`` float32
    """
    std = np.maximum(samples.std(axis=0, ddof=1), std_floor)
    return samples.mean(axis=0).astype(np.float32), std.astype(np.float32)


def _log_sum_exp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis=axis, keepdims=True)
    total: np.ndarray = np.log(np.exp(values - top).sum(axis=axis)) + np.squeeze(top, axis)
    return total
