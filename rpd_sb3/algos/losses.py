"""One pure tensor function per equation.

Shape letters: B minibatch, A action dimensions, K tokens of an action, V bins of a token, T steps, E environments, G
rollouts of a group. Logits are unnormalised; log-probabilities, KLs and entropies are in nats, in float32 or better.
"""

from __future__ import annotations

import math

import torch as th
import torch.nn.functional as F

from rpd_sb3.contract.names import closest

DIVERGENCES = ("reverse_kl", "forward_kl", "hard_ce", "jsd")


def masked_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Mean over the samples that have a label; zero (with zero gradient) if none has.

    :param values: ``(B,)``, finite also where there is no label
    :param mask: ``(B,)`` bool, True where there is a label
    :return: scalar
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)


def normalize_advantage(advantages: th.Tensor, std_floor: float) -> th.Tensor:
    """Advantages of mean 0 and, where they vary by more than the floor, std 1.

    :param advantages: ``(B,)``, B > 1
    :param std_floor: lower bound of the divisor; 0 is SB3's normalisation
    :return: ``(B,)``
    """
    return (advantages - advantages.mean()) / (advantages.std().clamp(min=std_floor) + 1e-8)


def clipped_surrogate(
    log_prob: th.Tensor,
    old_log_prob: th.Tensor,
    advantages: th.Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
) -> tuple[th.Tensor, th.Tensor]:
    """PPO's loss to minimise, -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] (RPD paper, eq. 4).

    :param log_prob: ``(B,)`` of the taken actions under the current policy
    :param old_log_prob: ``(B,)`` under the policy that took them
    :param advantages: ``(B,)``
    :param clip_range: eps
    :param clip_range_high: eps of the upper side (DAPO's clip-higher); None: the same
    :return: scalar loss, and the probability ratio r ``(B,)``
    """
    ratio = th.exp(log_prob - old_log_prob)
    unclipped = advantages * ratio
    upper = clip_range if clip_range_high is None else clip_range_high
    clipped = advantages * th.clamp(ratio, 1 - clip_range, 1 + upper)
    return -th.min(unclipped, clipped).mean(), ratio


def action_mse(student_action: th.Tensor, teacher_action: th.Tensor) -> th.Tensor:
    """Squared distance of the student's mean action to the teacher's action (RPD paper, eq. 5).

    Averaged over action dimensions, as in the authors' code: 1/A of the squared norm.

    :param student_action: ``(B, A)``
    :param teacher_action: ``(B, A)``
    :return: ``(B,)``
    """
    return (student_action - teacher_action).pow(2).mean(dim=1)


def action_l1(student_action: th.Tensor, teacher_action: th.Tensor) -> th.Tensor:
    """Absolute distance of the student's mean action to the teacher's action (RPD paper, RPD-L1).

    :param student_action: ``(B, A)``
    :param teacher_action: ``(B, A)``
    :return: ``(B,)``, averaged over action dimensions
    """
    return (student_action - teacher_action).abs().mean(dim=1)


def _log_probs(logits: th.Tensor) -> th.Tensor:
    """Normalised over the bins; half precision, as it comes over the network, would lose the tails."""
    return F.log_softmax(logits, dim=-1, dtype=th.promote_types(logits.dtype, th.float32))


def _expected(log_probs: th.Tensor, values: th.Tensor) -> th.Tensor:
    """Mean of ``(..., V)`` values; bins of probability 0 add 0, also where the value is infinite (0 log 0)."""
    probs = log_probs.exp()
    return (probs * th.where(probs > 0, values, 0.0)).sum(dim=-1)


def token_divergence(student_logits: th.Tensor, teacher_logits: th.Tensor, kind: str) -> th.Tensor:
    """Divergence of student S and teacher T per token, over the full vocabulary.

    reverse_kl is KL(S||T) (VLA-OPD), forward_kl KL(T||S) (ROAD-VLA, eq. 12), hard_ce -log S(argmax T), and jsd
    KL(S||M)/2 + KL(T||M)/2 with M = (S+T)/2 (ROAD-VLA, eq. 6). With both evaluated on the student's own earlier tokens,
    the sum over K of reverse_kl estimates the KL of whole actions without bias (chain rule); that of forward_kl is a
    surrogate, whose exact form needs the teacher's earlier tokens.

    :param student_logits: ``(B, K, V)``, finite
    :param teacher_logits: ``(B, K, V)``, or log-probabilities, as of :func:`floored`; -inf is probability 0
    :param kind: one of DIVERGENCES
    :return: ``(B, K)``; reverse_kl is infinite where T is 0 and S is not
    :raises ValueError: if the kind is unknown
    """
    student, teacher = _log_probs(student_logits), _log_probs(teacher_logits)
    if kind == "reverse_kl":
        return _expected(student, student - teacher)
    if kind == "forward_kl":
        return _expected(teacher, teacher - student)
    if kind == "hard_ce":
        return -student.gather(-1, teacher.argmax(dim=-1, keepdim=True)).squeeze(-1)
    if kind == "jsd":
        middle = th.logaddexp(student, teacher) - math.log(2)
        return (_expected(student, student - middle) + _expected(teacher, teacher - middle)) / 2
    raise ValueError(
        f"divergence {kind!r} is unknown; choose one of {', '.join(DIVERGENCES)}{closest(kind, DIVERGENCES)}"
    )


def floored(teacher_logits: th.Tensor, floor: float) -> th.Tensor:
    """The teacher mixed with the uniform distribution, log((1 - floor) p + floor / V).

    The reverse KL is unbounded where the teacher's p is about 0: one token that it rules out can outweigh a minibatch.
    With a floor, no token costs more than log(V / floor).

    :param teacher_logits: ``(B, K, V)``, -inf is probability 0
    :param floor: weight of the uniform distribution, in [0, 1); 0 leaves the teacher as it is
    :return: log-probabilities ``(B, K, V)``
    """
    log_probs = _log_probs(teacher_logits)
    if floor == 0:
        return log_probs
    uniform = log_probs.new_tensor(math.log(floor / log_probs.shape[-1]))
    return th.logaddexp(log_probs + math.log1p(-floor), uniform)


def token_log_prob(logits: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Log-probability of each token of the actions.

    :param logits: ``(B, K, V)``
    :param actions: ``(B, K)`` tokens in [0, V - 1], integers of any dtype (SB3's buffers hold floats)
    :return: ``(B, K)``
    """
    return _log_probs(logits).gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)


def sampled_advantage(student_log_prob: th.Tensor, teacher_log_prob: th.Tensor) -> th.Tensor:
    """Advantage of the sampled action, log p_T(a) - log p_S(a), the sampled estimate of -KL(S||T) (VLA-OPD).

    In expectation over the student's actions, its policy gradient is the one of the full reverse KL of whole actions.

    :param student_log_prob: ``(B, K)`` under the policy that took the actions
    :param teacher_log_prob: ``(B, K)`` of the same tokens, after the same earlier tokens
    :return: ``(B,)``, summed over tokens, without gradient
    """
    # Must not be normalized: its std vanishes with the KL, so the closer the policies, the more noise would be amplified.
    return (teacher_log_prob - student_log_prob).sum(dim=1).detach()


def k3(student_log_prob: th.Tensor, teacher_log_prob: th.Tensor) -> th.Tensor:
    """Estimate of KL(S||T) from the student's samples, e^d - 1 - d with d = log p_T - log p_S (Schulman, 2020).

    For logging only: never negative, and unbiased. As a loss on the student's samples it has the gradient of the
    *forward* KL.

    :param student_log_prob: ``(B, K)`` of the sampled tokens
    :param teacher_log_prob: ``(B, K)``
    :return: ``(B, K)``
    """
    difference = teacher_log_prob - student_log_prob
    return th.expm1(difference) - difference


def group_advantage(returns: th.Tensor) -> th.Tensor:
    """Returns relative to their group, (R - mean) / (std + 1e-6) (GRPO; DeepSeekMath, 4.1.2).

    :param returns: ``(n_groups, G)``, a row per group of rollouts from the same initial state
    :return: ``(n_groups, G)``; exactly 0 in groups whose returns are all equal
    """
    mean = returns.mean(dim=1, keepdim=True)
    # The paper does not say which std, and has no 1e-6: we take the population's.
    std = returns.std(dim=1, keepdim=True, unbiased=False)
    # The mean of equal numbers can be off by rounding, and 1e-6 in the divisor would amplify that.
    equal = (returns == returns[:, :1]).all(dim=1, keepdim=True)
    return ((returns - mean) / (std + 1e-6)).masked_fill(equal, 0.0)


def calibrated(reference: th.Tensor, internal: th.Tensor) -> th.Tensor:
    """Reference advantages at the mean and std of the internal ones (ROAD-VLA, eq. 7).

    mu_int + sigma_int / (sigma_ref + eps) (A_ref - mu_ref), with population stds over all entries and eps 1e-8.

    :param reference: ``(T, E)``, from the frozen critic
    :param internal: ``(T, E)``, from the critic in training
    :return: ``(T, E)``
    """
    scale = internal.std(correction=0) / (reference.std(correction=0) + 1e-8)
    return internal.mean() + scale * (reference - reference.mean())


def gated_mix(internal: th.Tensor, calibrated: th.Tensor, alpha: float, gate: bool) -> th.Tensor:
    """Both advantages where they agree in sign, elsewhere the internal one (ROAD-VLA, eq. 8).

    A_int + alpha g (A_ref - A_int), with g = 1[sign(A_int) = sign(A_ref)].

    :param internal: ``(T, E)``
    :param calibrated: ``(T, E)`` reference advantages, as of :func:`calibrated`
    :param alpha: weight of the reference
    :param gate: False mixes everywhere (g = 1)
    :return: ``(T, E)``
    """
    mixed = internal + alpha * (calibrated - internal)
    return th.where(internal.sign() == calibrated.sign(), mixed, internal) if gate else mixed


def advantage_weight(mixed: th.Tensor, clip: float) -> th.Tensor:
    """Standardised advantages in [-c, c] (ROAD-VLA, eq. 9), with the population std over all entries and eps 1e-8.

    :param mixed: ``(T, E)``
    :param clip: c
    :return: ``(T, E)``
    """
    return ((mixed - mixed.mean()) / (mixed.std(correction=0) + 1e-8)).clamp(-clip, clip)


def perturbed_logits(logits: th.Tensor, actions: th.Tensor, weight: th.Tensor, eta: float) -> th.Tensor:
    """Logits of ROAD-VLA's teacher, z + eta w onehot(a) (eq. 10).

    :param logits: ``(B, K, V)`` of the student
    :param actions: ``(B, K)`` sampled tokens, integers of any dtype
    :param weight: ``(B,)``, shared by the tokens of an action
    :param eta: strength
    :return: ``(B, K, V)``, without gradient
    """
    sampled = F.one_hot(actions.long(), logits.shape[-1])
    return (logits + eta * weight[:, None, None] * sampled).detach()


def gaussian_kl(mean_p: th.Tensor, std_p: th.Tensor, mean_q: th.Tensor, std_q: th.Tensor) -> th.Tensor:
    """KL(p||q) of diagonal Gaussians, sum of log(std_q/std_p) + (std_p^2 + (mean_p - mean_q)^2) / (2 std_q^2) - 1/2.

    :param mean_p: ``(B, A)``
    :param std_p: ``(B, A)``, > 0; a std, never a variance
    :param mean_q: ``(B, A)``
    :param std_q: ``(B, A)``, > 0
    :return: ``(B,)``, summed over action dimensions
    """
    per_dimension = th.log(std_q / std_p) + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5
    return per_dimension.sum(dim=1)


def ratio_weighted(kl: th.Tensor, ratio: th.Tensor, clip_range: float) -> th.Tensor:
    """The KL at the current policy's rate of the actions, max(r, 1 - eps) KL (PPD; Spigler, 2024).

    :param kl: ``(B,)``
    :param ratio: ``(B,)`` r of :func:`clipped_surrogate`
    :param clip_range: eps
    :return: ``(B,)``
    """
    # r is not detached, as in the paper's code (sb3_distill): actions where the KL is large also become less likely.
    return ratio.clamp(min=1 - clip_range) * kl


def top1_agreement(student_logits: th.Tensor, teacher_logits: th.Tensor) -> th.Tensor:
    """Whether student and teacher find the same token likeliest; for logging.

    :param student_logits: ``(B, K, V)``
    :param teacher_logits: ``(B, K, V)``
    :return: ``(B, K)`` bool
    """
    return student_logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)


def token_entropy(logits: th.Tensor) -> th.Tensor:
    """Entropy of each token.

    :param logits: ``(B, K, V)``
    :return: ``(B, K)``
    """
    log_probs = _log_probs(logits)
    return -_expected(log_probs, log_probs)


def token_statistics(student_logits: th.Tensor, teacher_logits: th.Tensor, labelled: th.Tensor) -> dict[str, float]:
    """Divergences both ways, agreement and entropies, for all tokens together and for each (``/0`` to ``/K-1``); for logging.

    :param student_logits: ``(B, K, V)``
    :param teacher_logits: ``(B, K, V)``
    :param labelled: ``(B,)`` bool, the samples that count
    :return: name to mean
    """
    per_token = {
        "reverse_kl": token_divergence(student_logits, teacher_logits, "reverse_kl"),
        "forward_kl": token_divergence(student_logits, teacher_logits, "forward_kl"),
        "top1_agreement": top1_agreement(student_logits, teacher_logits).float(),
        "student_entropy": token_entropy(student_logits),
        "teacher_entropy": token_entropy(teacher_logits),
    }
    statistics = {}
    for name, values in per_token.items():
        means = [masked_mean(token, labelled).item() for token in values.unbind(dim=1)]
        statistics[name] = sum(means) / len(means)
        statistics |= {f"{name}/{token}": mean for token, mean in enumerate(means)}
    return statistics
