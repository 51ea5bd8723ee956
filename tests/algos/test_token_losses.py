"""Losses on tokens against numbers worked out by hand, enumerated policies and closed forms."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch as th
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from rpd_sb3.algos.losses import (
    DIVERGENCES,
    advantage_weight,
    calibrated,
    floored,
    gated_mix,
    group_advantage,
    k3,
    perturbed_logits,
    sampled_advantage,
    token_divergence,
    token_entropy,
    token_log_prob,
    top1_agreement,
)

HALVES = th.tensor([[[0.5, 0.5]]], dtype=th.float64)
QUARTER = th.tensor([[[0.25, 0.75]]], dtype=th.float64)
# All actions of 2 tokens with 3 bins: 00, 01, 02, 10, ...
SEQUENCES = th.cartesian_prod(th.arange(3), th.arange(3))


def random_logits(*shape: int) -> th.Tensor:
    return 2 * th.randn(*shape, dtype=th.float64)


class Autoregressive(NamedTuple):
    """A policy over SEQUENCES: logits of the first token ``(3,)``, and of the second given the first ``(3, 3)``."""

    first: th.Tensor
    second: th.Tensor

    def logits(self) -> th.Tensor:
        """``(9, 2, 3)``: a row for each sequence, given that sequence's first token."""
        return th.stack([self.first.expand(9, 3), self.second[SEQUENCES[:, 0]]], dim=1)

    def joint(self) -> th.Tensor:
        """Probability of each sequence ``(9,)``."""
        return (self.first.softmax(0)[:, None] * self.second.softmax(1)).flatten()


def random_policy() -> Autoregressive:
    return Autoregressive(random_logits(3).requires_grad_(), random_logits(3, 3).requires_grad_())


def kl(p: th.Tensor, q: th.Tensor) -> th.Tensor:
    return (p * (p / q).log()).sum()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("reverse_kl", math.log(4 / 3) / 2),
        ("forward_kl", math.log(1 / 2) / 4 + math.log(3 / 2) * 3 / 4),
        ("hard_ce", math.log(2)),
        # The middle is 3/8, 5/8.
        ("jsd", (math.log(4 / 3) + math.log(4 / 5)) / 4 + math.log(2 / 3) / 8 + math.log(6 / 5) * 3 / 8),
    ],
)
def test_divergence_of_a_half_and_a_quarter(kind: str, expected: float) -> None:
    result = token_divergence(HALVES.log(), QUARTER.log(), kind)
    assert result.shape == (1, 1)
    assert result.item() == pytest.approx(expected, abs=1e-12)


def test_token_kls_equal_those_of_torch() -> None:
    student, teacher = random_logits(4, 7, 256), random_logits(4, 7, 256)
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    th.testing.assert_close(token_divergence(student, teacher, "reverse_kl"), kl_divergence(s, t))
    th.testing.assert_close(token_divergence(student, teacher, "forward_kl"), kl_divergence(t, s))


def test_jsd_is_the_mean_kl_to_the_middle() -> None:
    student, teacher = random_logits(4, 7, 256), random_logits(4, 7, 256)
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    middle = Categorical(probs=(s.probs + t.probs) / 2)
    expected = (kl_divergence(s, middle) + kl_divergence(t, middle)) / 2
    th.testing.assert_close(token_divergence(student, teacher, "jsd"), expected)


def test_hard_ce_is_the_cross_entropy_with_the_teachers_likeliest_token() -> None:
    student, teacher = random_logits(4, 2, 5), random_logits(4, 2, 5)
    expected = F.cross_entropy(student.flatten(0, 1), teacher.argmax(2).flatten(), reduction="none").view(4, 2)
    th.testing.assert_close(token_divergence(student, teacher, "hard_ce"), expected)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergence_ignores_what_is_added_to_all_logits(kind: str) -> None:
    student, teacher = random_logits(4, 2, 5), random_logits(4, 2, 5)
    shifted = token_divergence(student + 3, teacher - 5, kind)
    th.testing.assert_close(shifted, token_divergence(student, teacher, kind))


@pytest.mark.parametrize("kind", ["forward_kl", "hard_ce"])
def test_gradient_is_the_difference_to_the_teachers_target(kind: str) -> None:
    student, teacher = random_logits(4, 2, 5).requires_grad_(), random_logits(4, 2, 5)
    token_divergence(student, teacher, kind).sum().backward()
    target = teacher.softmax(2) if kind == "forward_kl" else F.one_hot(teacher.argmax(2), 5)
    th.testing.assert_close(student.grad, student.detach().softmax(2) - target)


def test_gradient_of_reverse_kl_weighs_the_log_ratio_by_the_student() -> None:
    student, teacher = random_logits(4, 2, 5).requires_grad_(), random_logits(4, 2, 5)
    token_divergence(student, teacher, "reverse_kl").sum().backward()
    p = student.detach().softmax(2)
    log_ratio = (p / teacher.softmax(2)).log()
    th.testing.assert_close(student.grad, p * (log_ratio - (p * log_ratio).sum(2, keepdim=True)))


@pytest.mark.parametrize("kind", ["forward_kl", "hard_ce", "jsd"])
def test_teacher_may_rule_out_tokens(kind: str) -> None:
    student = th.zeros(1, 1, 3, requires_grad=True)
    loss = token_divergence(student, th.tensor([[[0.0, 0.0, -th.inf]]]), kind)
    loss.backward()
    middle = math.log(6 / 5)  # 5/12, 5/12, 1/6
    jsd = (2 / 3 * math.log(4 / 5) + math.log(2) / 3 + middle) / 2
    expected = {"forward_kl": math.log(3 / 2), "hard_ce": math.log(3), "jsd": jsd}
    assert loss.item() == pytest.approx(expected[kind])
    assert student.grad.isfinite().all()


def test_jsd_of_policies_without_a_common_token_is_ln_2() -> None:
    logits = th.tensor([[[1e4, 0.0]]])
    assert token_divergence(logits, -logits, "jsd").item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_half_precision_teacher_is_evaluated_in_float32(kind: str) -> None:
    student, teacher = th.randn(4, 2, 256), th.randn(4, 2, 256).half()
    result = token_divergence(student, teacher, kind)
    assert result.dtype == th.float32
    assert th.equal(result, token_divergence(student, teacher.float(), kind))


def test_unknown_divergence_is_answered_with_the_closest() -> None:
    with pytest.raises(ValueError, match="'reverse-kl' is unknown; .* did you mean 'reverse_kl'"):
        token_divergence(HALVES, QUARTER, "reverse-kl")


def test_token_kls_at_the_students_prefixes_sum_to_the_kl_of_whole_actions() -> None:
    student, teacher = random_policy(), random_policy()
    per_token = token_divergence(student.logits(), teacher.logits(), "reverse_kl")
    expected = (student.joint() * per_token.sum(1)).sum()
    th.testing.assert_close(expected, kl(student.joint(), teacher.joint()))


def test_forward_kl_of_whole_actions_needs_the_teachers_prefixes() -> None:
    student, teacher = random_policy(), random_policy()
    per_token = token_divergence(student.logits(), teacher.logits(), "forward_kl").sum(1)
    joint = kl(teacher.joint(), student.joint())
    th.testing.assert_close((teacher.joint() * per_token).sum(), joint)
    assert ((student.joint() * per_token).sum() - joint).abs() > 0.1


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_token_kls_of_independent_tokens_sum_to_the_kl_of_whole_actions(kind: str) -> None:
    student, teacher = random_logits(1, 2, 3), random_logits(1, 2, 3)
    s, t = (th.outer(*logits[0].softmax(1)) for logits in (student, teacher))
    expected = kl(s, t) if kind == "reverse_kl" else kl(t, s)
    th.testing.assert_close(token_divergence(student, teacher, kind).sum(), expected)


def test_token_log_probs_of_all_actions_are_those_of_the_joint() -> None:
    policy = random_policy()
    th.testing.assert_close(token_log_prob(policy.logits(), SEQUENCES).sum(1).exp(), policy.joint())


def test_tokens_may_be_floats() -> None:
    logits = th.tensor([[[0.0, math.log(3)], [math.log(4), 0.0]]])
    result = token_log_prob(logits, th.tensor([[1.0, 1.0]]))
    assert result.exp().tolist() == [pytest.approx([0.75, 0.2])]


def test_floor_mixes_the_teacher_with_the_uniform_distribution() -> None:
    result = floored(th.tensor([[[0.0, math.log(3), -th.inf, -th.inf]]]), 0.1)
    assert result.exp().tolist() == [[pytest.approx([0.25, 0.7, 0.025, 0.025])]]


def test_floor_zero_leaves_the_teacher_as_it_is() -> None:
    logits = random_logits(4, 2, 5)
    assert th.equal(floored(logits, 0.0), logits.log_softmax(2))


def test_floor_bounds_the_reverse_kl_of_a_teacher_that_rules_out_tokens() -> None:
    student = th.tensor([[[-1e3, 1e3]]], requires_grad=True)
    teacher = th.tensor([[[0.0, -th.inf]]])
    assert token_divergence(student, teacher, "reverse_kl").item() == math.inf
    loss = token_divergence(student, floored(teacher, 0.01), "reverse_kl")
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2 / 0.01))
    assert student.grad.isfinite().all()


def test_sampled_advantage_sums_the_log_ratios_of_tokens() -> None:
    student = th.tensor([[0.5, 0.25]]).log().requires_grad_()
    result = sampled_advantage(student, th.tensor([[0.25, 1.0]]).log())
    assert result.tolist() == pytest.approx([math.log(2)])
    assert not result.requires_grad


def test_sampled_policy_gradient_is_that_of_the_kl_of_whole_actions_in_expectation() -> None:
    student, teacher = random_policy(), random_policy()
    log_prob = token_log_prob(student.logits(), SEQUENCES)
    advantage = sampled_advantage(log_prob, token_log_prob(teacher.logits(), SEQUENCES))
    loss = -(student.joint().detach() * advantage * log_prob.sum(1)).sum()
    expected = th.autograd.grad(kl(student.joint(), teacher.joint().detach()), student)
    th.testing.assert_close(th.autograd.grad(loss, student), expected)


def test_sampled_policy_gradient_averages_to_that_of_the_full_reverse_kl() -> None:
    student, teacher = random_logits(1, 2, 3).requires_grad_(), random_logits(1, 2, 3)
    full = {
        kind: th.autograd.grad(token_divergence(student, teacher, kind).sum(), student)[0]
        for kind in ("reverse_kl", "forward_kl")
    }

    n = 100_000
    logits = student.detach().repeat(n, 1, 1).requires_grad_()
    actions = Categorical(logits=logits.detach()).sample()
    log_prob = token_log_prob(logits, actions)
    advantage = sampled_advantage(log_prob, token_log_prob(teacher.expand(n, 2, 3), actions))
    (per_sample,) = th.autograd.grad(-(advantage * log_prob.sum(1)).sum(), logits)

    error = {kind: (per_sample.mean(0) - full[kind][0]).abs() / (per_sample.std(0) / n**0.5) for kind in full}
    assert error["reverse_kl"].max() < 4  # standard errors
    assert error["forward_kl"].max() > 40


def one_token(estimate: th.Tensor, probs: th.Tensor) -> th.Tensor:
    """Expected estimate over all tokens; the gradient does not see how the samples depend on the policy."""
    return (probs.detach().flatten() * estimate.flatten()).sum()


def test_k3_of_a_half_and_a_quarter() -> None:
    result = k3(HALVES[..., 0].log(), QUARTER[..., 0].log())
    assert result.item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k3_is_an_unbiased_estimate_of_the_reverse_kl() -> None:
    student, teacher = random_logits(1, 1, 3), random_logits(1, 1, 3)
    estimate = k3(student.log_softmax(2), teacher.log_softmax(2))
    assert (estimate > 0).all()
    expected = token_divergence(student, teacher, "reverse_kl").sum()
    th.testing.assert_close(one_token(estimate, student.softmax(2)), expected)


def test_k3_as_a_loss_has_the_gradient_of_the_forward_kl() -> None:
    student, teacher = random_logits(1, 1, 3).requires_grad_(), random_logits(1, 1, 3)
    loss = one_token(k3(student.log_softmax(2), teacher.log_softmax(2)), student.softmax(2))
    forward = token_divergence(student, teacher, "forward_kl").sum()
    th.testing.assert_close(th.autograd.grad(loss, student), th.autograd.grad(forward, student))


def test_log_ratio_as_a_loss_has_no_gradient() -> None:
    """Hence the detached advantage: differentiating the plain estimate teaches nothing."""
    actions = th.arange(3)[:, None]
    student, teacher = random_logits(1, 1, 3).requires_grad_(), random_logits(1, 1, 3)
    log_ratio = token_log_prob(student.expand(3, 1, 3), actions) - token_log_prob(teacher.expand(3, 1, 3), actions)
    (gradient,) = th.autograd.grad(one_token(log_ratio, student.softmax(2)), student)
    assert gradient.abs().max() < 1e-12


def test_group_advantage_is_the_return_in_stds_of_its_group() -> None:
    returns = th.tensor([[0.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 3.0]], dtype=th.float64)
    std = math.sqrt(3) / 4 + 1e-6  # one success of four; the mean is 1/4
    expected = [[-1 / 4 / std] * 3 + [3 / 4 / std], [x / (1 + 1e-6) for x in (1, -1, -1, 1)]]
    th.testing.assert_close(group_advantage(returns), th.tensor(expected, dtype=th.float64))


def test_groups_of_equal_returns_have_exactly_no_advantage() -> None:
    # Most of these are no binary fractions, and the mean of seven is then not the number itself.
    returns = (th.arange(10) / 10)[:, None].expand(10, 7)
    assert th.equal(group_advantage(returns), th.zeros(10, 7))


def test_calibrated_reference_has_the_mean_and_std_of_the_internal_advantages() -> None:
    reference = th.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=th.float64)
    internal = th.tensor([[20.0, 0.0], [0.0, 0.0]], dtype=th.float64)  # mean 5, population std sqrt(75)
    result = calibrated(reference, internal)
    step = math.sqrt(75 / 5)  # std of the reference: sqrt(5)
    expected = th.tensor([[5 - 3 * step, 5 - step], [5 + step, 5 + 3 * step]], dtype=th.float64)
    th.testing.assert_close(result, expected)


def test_gate_keeps_the_internal_advantage_where_signs_differ() -> None:
    internal = th.tensor([[2.0, -2.0, 2.0, -2.0]])
    reference = th.tensor([[4.0, -4.0, -4.0, 4.0]])
    assert gated_mix(internal, reference, 0.25, gate=True).tolist() == [[2.5, -2.5, 2.0, -2.0]]
    assert gated_mix(internal, reference, 0.25, gate=False).tolist() == [[2.5, -2.5, 0.5, -0.5]]


def test_weight_is_the_standardised_advantage_within_its_bounds() -> None:
    mixed = th.tensor([[9.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]], dtype=th.float64)
    # Mean 1.8, population std 2.4: 9 is 3 stds above.
    expected = th.full((2, 5), -1 / 3, dtype=th.float64)
    expected[0, 0] = 2.0
    th.testing.assert_close(advantage_weight(mixed, 2.0), expected)
    assert advantage_weight(-mixed, 2.0).min() == -2


def test_perturbed_teacher_of_two_equal_tokens() -> None:
    logits = th.zeros(1, 1, 2, requires_grad=True)
    teacher = perturbed_logits(logits, th.tensor([[0.0]]), th.tensor([2.0]), eta=1.0)
    assert not teacher.requires_grad
    assert teacher.softmax(2).tolist() == [[pytest.approx([0.8808, 0.1192], abs=5e-5)]]
    assert token_divergence(logits, teacher, "forward_kl").item() == pytest.approx(0.3278, abs=5e-5)


class Road(NamedTuple):
    """Student logits, the perturbed teacher's, and per token p(a), Z and eta w."""

    student: th.Tensor
    teacher: th.Tensor
    actions: th.Tensor
    p: th.Tensor
    z: th.Tensor
    shift: th.Tensor


@pytest.fixture
def road() -> Road:
    student = random_logits(4, 3, 5).requires_grad_()
    actions = th.randint(5, (4, 3))
    weight = th.tensor([2.0, 0.5, -0.5, -2.0], dtype=th.float64)
    shift = (0.7 * weight)[:, None].expand(4, 3)
    p = token_log_prob(student, actions).exp().detach()
    teacher = perturbed_logits(student, actions, weight, 0.7)
    return Road(student, teacher, actions, p, 1 - p + p * shift.exp(), shift)


def test_kl_to_the_perturbed_teacher_has_a_closed_form(road: Road) -> None:
    expected = road.p * road.shift.exp() / road.z * road.shift - road.z.log()
    th.testing.assert_close(token_divergence(road.student, road.teacher, "forward_kl"), expected)


def test_gradient_towards_the_perturbed_teacher_is_a_policy_gradient(road: Road) -> None:
    """With weight p(a) (e^(eta w) - 1) / Z: the loss is a policy gradient per token while q is built from z itself."""
    loss = token_divergence(road.student, road.teacher, "forward_kl").sum()
    weight = road.p * road.shift.expm1() / road.z
    policy_gradient = -(weight * token_log_prob(road.student, road.actions)).sum()
    th.testing.assert_close(th.autograd.grad(loss, road.student)[0], th.autograd.grad(policy_gradient, road.student)[0])


def test_agreement_tells_where_the_likeliest_tokens_are_equal() -> None:
    student, teacher = th.tensor([[[0.0, 1.0], [3.0, 2.0]]]), th.tensor([[[5.0, 9.0], [0.0, 1.0]]])
    assert top1_agreement(student, teacher).tolist() == [[True, False]]


def test_entropy_of_uniform_and_of_certain_tokens() -> None:
    logits = th.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, -th.inf, -th.inf, -th.inf]]])
    assert token_entropy(logits).tolist() == [pytest.approx([math.log(4), 0.0])]


def test_entropy_equals_that_of_torch() -> None:
    logits = random_logits(4, 7, 256)
    th.testing.assert_close(token_entropy(logits), Categorical(logits=logits).entropy())
