"""One pure tensor function per equation. Shape letters: B minibatch, A action dimensions."""

from __future__ import annotations

import torch as th


def masked_mean(values: th.Tensor, mask: th.Tensor) -> th.Tensor:
    """Mean over the samples that have a label; zero (with zero gradient) if none has.

    :param values: ``(B,)``, finite also where there is no label
    :param mask: ``(B,)`` bool, True where there is a label
    :return: scalar
    """
    return (values * mask).sum() / mask.sum().clamp(min=1)


def standardised(advantages: th.Tensor, std_floor: float) -> th.Tensor:
    """Advantages of mean 0 and, where they vary by more than the floor, std 1.

    :param advantages: ``(B,)``, B > 1
    :param std_floor: lower bound of the divisor; 0 is SB3's normalisation
    :return: ``(B,)``
    """
    return (advantages - advantages.mean()) / (advantages.std().clamp(min=std_floor) + 1e-8)


def clipped_surrogate(
    log_prob: th.Tensor, old_log_prob: th.Tensor, advantages: th.Tensor, clip_range: float
) -> tuple[th.Tensor, th.Tensor]:
    """PPO's loss to minimise, -E[min(r A, clip(r, 1 - eps, 1 + eps) A)] (RPD paper, eq. 4).

    :param log_prob: ``(B,)`` of the taken actions under the current policy
    :param old_log_prob: ``(B,)`` under the policy that took them
    :param advantages: ``(B,)``
    :param clip_range: eps
    :return: scalar loss, and the probability ratio r ``(B,)``
    """
    ratio = th.exp(log_prob - old_log_prob)
    unclipped = advantages * ratio
    clipped = advantages * th.clamp(ratio, 1 - clip_range, 1 + clip_range)
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
