"""Statistics of success rates."""

from __future__ import annotations

import math


def wilson_interval(k: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson, 1927): never empty, never outside [0, 1].

    :param k: successes
    :param n: trials
    :param z: quantile of the normal distribution; the default gives 95 %
    """
    if not 0 <= k <= n or n < 1:
        raise ValueError(f"k={k} successes of n={n} trials: 0 <= k <= n and n >= 1 must hold")
    p = k / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)
