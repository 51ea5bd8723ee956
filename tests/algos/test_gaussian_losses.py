"""PPD's divergence of Gaussians and its weight, and the sides of PPO's clip."""

from __future__ import annotations

import math

import pytest
import torch as th
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from rpd_sb3.algos.losses import clipped_surrogate, gaussian_kl, ratio_weighted


def random_gaussians() -> tuple[th.Tensor, th.Tensor, th.Tensor, th.Tensor]:
    """Mean and std of p, mean and std of q, each ``(16, 7)``."""
    mean_p, log_std_p, mean_q, log_std_q = th.randn(4, 16, 7, dtype=th.float64)
    return mean_p, log_std_p.exp(), mean_q, log_std_q.exp()


def test_gaussian_kl_sums_over_action_dimensions() -> None:
    # Per dimension: ln(2) + (1 + 4)/8 - 1/2, and 1/2 of the squared distance.
    result = gaussian_kl(
        th.tensor([[2.0, 3.0]]), th.tensor([[1.0, 1.0]]), th.tensor([[0.0, 0.0]]), th.tensor([[2.0, 1.0]])
    )
    assert result.tolist() == pytest.approx([math.log(2) + 1 / 8 + 9 / 2])


def test_gaussian_kl_equals_that_of_torch() -> None:
    mean_p, std_p, mean_q, std_q = random_gaussians()
    expected = kl_divergence(Independent(Normal(mean_p, std_p), 1), Independent(Normal(mean_q, std_q), 1))
    th.testing.assert_close(gaussian_kl(mean_p, std_p, mean_q, std_q), expected, rtol=1e-6, atol=1e-6)


def test_std_is_not_a_variance() -> None:
    """The RPD authors' code gives its stds to MultivariateNormal, which takes a covariance: another number."""
    mean_p, std_p, mean_q, std_q = random_gaussians()
    result = gaussian_kl(mean_p, std_p, mean_q, std_q)

    def multivariate(power: int) -> th.Tensor:
        p = MultivariateNormal(mean_p, (std_p**power).diag_embed())
        return kl_divergence(p, MultivariateNormal(mean_q, (std_q**power).diag_embed()))

    th.testing.assert_close(result, multivariate(2))
    assert ((result - multivariate(1)).abs() > 0.05 * result).all()


@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 2.4), (1.0, 3.0), (4.0, 12.0)])
def test_weight_of_the_kl_is_bounded_below_only(ratio: float, expected: float) -> None:
    assert ratio_weighted(th.tensor([3.0]), th.tensor([ratio]), 0.2).tolist() == pytest.approx([expected])


def test_weighted_kl_has_a_gradient_to_the_ratio_above_the_bound() -> None:
    kl, ratio = th.tensor([3.0, 3.0], requires_grad=True), th.tensor([0.5, 1.5], requires_grad=True)
    ratio_weighted(kl, ratio, 0.2).sum().backward()
    assert ratio.grad.tolist() == [0.0, 3.0]
    assert kl.grad.tolist() == pytest.approx([0.8, 1.5])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.25, 2.0, -2.5),  # not clipped any more
        (1.5, 2.0, -2.56),  # clipped: 1.28 * 2
        (0.5, 2.0, -1.0),
        (1.5, -2.0, 3.0),
        (0.75, -2.0, 1.6),  # clipped: 0.8 * -2, as without
    ],
)
def test_clip_higher_moves_the_upper_side_only(ratio: float, advantage: float, expected: float) -> None:
    log_prob = th.tensor([math.log(ratio)])
    loss, _ = clipped_surrogate(log_prob, th.zeros(1), th.tensor([advantage]), 0.2, clip_range_high=0.28)
    assert loss.item() == pytest.approx(expected)


def test_without_clip_higher_both_sides_are_the_same() -> None:
    log_prob, old_log_prob, advantages = th.randn(3, 1000)
    same = clipped_surrogate(log_prob, old_log_prob, advantages, 0.2)
    assert th.equal(same[0], clipped_surrogate(log_prob, old_log_prob, advantages, 0.2, 0.2)[0])
    ratio = th.exp(log_prob - old_log_prob)
    assert th.equal(same[0], -th.min(advantages * ratio, advantages * ratio.clamp(1 - 0.2, 1 + 0.2)).mean())
