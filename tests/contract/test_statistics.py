"""Confidence intervals."""

from __future__ import annotations

import pytest

from rpd_sb3.contract.statistics import wilson_interval


# Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3.
@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_has_the_published_values(k: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(n - k, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 10**6), (10**6, 10**6)])
def test_wilson_interval_stays_inside_and_holds_the_estimate(k: int, n: int) -> None:
    low, high = wilson_interval(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3), (0, 0)])
def test_wilson_interval_of_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} successes of n={n} trials"):
        wilson_interval(k, n)
