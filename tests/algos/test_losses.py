"""Every loss against a number worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch as th

from rpd_sb3.algos.losses import action_l1, action_mse, clipped_surrogate, masked_mean, normalize_advantage

STUDENT = th.tensor([[0.0, 1.0], [2.0, -1.0]])
TEACHER = th.tensor([[1.0, 1.0], [0.0, 1.0]])


def test_mse_averages_over_action_dimensions() -> None:
    assert action_mse(STUDENT, TEACHER).tolist() == [0.5, 4.0]


def test_l1_averages_over_action_dimensions() -> None:
    assert action_l1(STUDENT, TEACHER).tolist() == [0.5, 2.0]


def test_gradient_of_mse_is_two_over_a_times_the_difference() -> None:
    student = STUDENT.clone().requires_grad_()
    action_mse(student, TEACHER).sum().backward()
    assert th.equal(student.grad, (STUDENT - TEACHER) * 2 / 2)


def test_masked_samples_count_neither_in_sum_nor_in_number() -> None:
    values = th.tensor([1.0, 100.0, 3.0], requires_grad=True)
    loss = masked_mean(values, th.tensor([True, False, True]))
    loss.backward()
    assert loss.item() == 2.0
    assert values.grad.tolist() == [0.5, 0.0, 0.5]


def test_without_labels_loss_and_gradient_are_zero() -> None:
    values = th.tensor([1.0, 2.0], requires_grad=True)
    loss = masked_mean(values, th.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # clipped: 1.2 * 2
        (0.5, 2.0, -1.0),  # the smaller one
        (1.5, -2.0, 3.0),  # the smaller one: no clip where things got worse
        (0.5, -2.0, 1.6),  # clipped: 0.8 * -2
    ],
)
def test_clipped_surrogate(ratio: float, advantage: float, expected: float) -> None:
    loss, ratios = clipped_surrogate(th.tensor([math.log(ratio)]), th.zeros(1), th.tensor([advantage]), 0.2)
    assert loss.item() == pytest.approx(expected)
    assert ratios.item() == pytest.approx(ratio)


def test_normalize_advantage_advantages_have_a_floor_under_the_divisor() -> None:
    advantages = th.tensor([1.0, 2.0, 3.0])
    assert normalize_advantage(advantages, 0.0).tolist() == pytest.approx([-1, 0, 1])
    assert normalize_advantage(advantages, 4.0).tolist() == pytest.approx([-0.25, 0, 0.25])
