"""ROAD-VLA: robust on-policy advantage-guided distillation. Shape letters: T steps, E environments, K tokens, V bins."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.type_aliases import GymEnv, Schedule
from stable_baselines3.common.utils import obs_as_tensor

from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.algos.losses import (
    advantage_weight,
    calibrated,
    gated_mix,
    perturbed_logits,
    token_divergence,
    token_entropy,
)
from rpd_sb3.contract.bins import require_token_bins
from rpd_sb3.contract.names import check_choice
from rpd_sb3.demos.files import each
from rpd_sb3.students.tokens import token_logits

CHUNK = 2048
"""Observations of one forward pass over the rollout."""


class ROAD(OnPolicyDistillation):
    """Distils the student's own distribution, tilted by the advantage: q = softmax(z + eta w onehot(a)) (eq. 10).

    The weight w is the clipped, standardised mix of the critic's advantage and a reference critic's, where both have the same
    sign (eqs. 7 to 9). L = ppo_coef * PPO + distill_coef * E[KL(q || p)] (eq. 12).

    Where the paper leaves a choice: Algorithm 1 updates with the distillation term alone (``ppo_coef=0``), its settings (a
    coefficient of 0.5, PPO's entropy bonus, "regularizer") speak of a sum, which is the default. Statistics are those of the
    rollout; a weight is one number for a step and its K tokens; the gate compares the sign of the raw advantage with the
    calibrated reference's. With ``teacher_anchor="current"`` the gradient is exactly a per-token policy gradient of weight
    p(a) (e^w - 1) / Z; anchored at the rollout it also restores what earlier minibatches have moved.

    :param reference: ``.zip`` of a PPO run of the same architecture (any checkpoint), whose critic gives the reference
        advantage: GAE on the same rewards. Needed unless ``alpha`` is 0
    :param alpha: share of the reference where both agree; 0: this run's critic alone
    :param gate: False: mix also where the signs differ
    :param positive_only: weights below 0 become 0
    :param eta: strength of the tilt
    :param weight_clip: c, bound of the weight
    :param divergence: ``forward_kl``, KL(q || p), or ``jsd`` (eq. 6), whose gradient is about a quarter
    :param teacher_anchor: ``current`` or ``rollout``: whose logits are tilted
    :param token_reduction: ``mean`` or ``sum`` over the tokens
    :param kwargs: arguments of :class:`OnPolicyDistillation` and PPO
    :raises ValueError: for an unknown choice, a missing reference, or actions that are no tokens
    """

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *,
        reference: str | None = None,
        alpha: float = 0.5,
        gate: bool = True,
        positive_only: bool = False,
        eta: float = 1.0,
        weight_clip: float = 2.0,
        divergence: str = "forward_kl",
        teacher_anchor: str = "current",
        token_reduction: str = "mean",
        distill_coef: float | Schedule = 0.5,
        **kwargs: Any,
    ) -> None:
        check_choice("ROAD", "divergence", divergence, ("forward_kl", "jsd"))
        check_choice("ROAD", "teacher_anchor", teacher_anchor, ("current", "rollout"))
        check_choice("ROAD", "token_reduction", token_reduction, ("mean", "sum"))
        if not 0 <= alpha <= 1:
            raise ValueError(f"ROAD: alpha={alpha} must lie in [0, 1]")
        if eta <= 0 or weight_clip <= 0:
            raise ValueError(f"ROAD: eta={eta} and weight_clip={weight_clip} must be positive")
        self.reference = reference
        self.alpha = alpha
        self.gate = gate
        self.positive_only = positive_only
        self.eta = eta
        self.weight_clip = weight_clip
        self.divergence = divergence
        self.teacher_anchor = teacher_anchor
        self.token_reduction = token_reduction
        super().__init__(policy, env, distill_coef=distill_coef, **kwargs)

    def _setup_model(self) -> None:
        require_token_bins("ROAD", self.action_space)
        if self.alpha > 0 and self.reference is None:  # not in the constructor: SB3 calls that with defaults to load
            raise ValueError(
                f"ROAD: alpha={self.alpha} needs the critic of a PPO run: give reference=FILE.zip, or alpha=0"
            )
        super()._setup_model()
        self._critic: Any = None if self.alpha == 0 else self._load_critic()

    def _load_critic(self) -> Any:
        """The frozen policy whose values are the reference."""
        assert self.reference is not None
        model = PPO.load(self.reference, device=self.device)
        if model.observation_space != self.observation_space:
            raise ValueError(
                f"ROAD: reference={self.reference!r} saw {model.observation_space}, but the environment shows "
                f"{self.observation_space}"
            )
        model.policy.set_training_mode(False)
        return model.policy

    @th.no_grad()
    def prepare_rollout(self) -> None:
        """Weights (T, E) of all steps, and the logits to tilt (T, E, K, V) where they are those of the rollout."""
        buffer: Any = self.rollout_buffer
        internal = th.as_tensor(buffer.advantages)
        mixed = internal
        if self._critic is not None:
            reference = calibrated(th.as_tensor(self._reference_advantages()), internal)
            mixed = gated_mix(internal, reference, self.alpha, self.gate)
            self.logger.record("train/critic_agreement", (internal.sign() == reference.sign()).float().mean().item())
        weight = advantage_weight(mixed, self.weight_clip)
        self.logger.record("train/clipped_weights", (weight.abs() >= self.weight_clip).float().mean().item())
        if self.positive_only:
            weight = weight.clamp(min=0.0)
        self.logger.record("train/mean_weight", weight.mean().item())
        self.logger.record("train/mean_abs_weight", weight.abs().mean().item())
        buffer.labels = {"weight": weight.numpy()}
        if self.teacher_anchor == "rollout":
            buffer.labels["logits"] = self._rollout_logits()
        buffer.labelled[:] = True

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, Mapping[str, float]]:
        logits = token_logits(student.distribution)
        anchor = batch.labels.get("logits", logits)
        teacher_logits = perturbed_logits(anchor, batch.actions, batch.labels["weight"], self.eta)
        divergence = token_divergence(logits, teacher_logits, self.divergence)
        loss = divergence.mean(dim=1) if self.token_reduction == "mean" else divergence.sum(dim=1)
        return loss.mean(), {"distill_kl": divergence.mean().item(), "entropy": token_entropy(logits).mean().item()}

    def _reference_advantages(self) -> np.ndarray:
        """GAE (T, E) with the reference critic on the rewards of the rollout, SB3's bootstrap at the time limit included."""
        buffer: Any = self.rollout_buffer
        twin = copy(buffer)
        twin.values = self._over_rollout(lambda obs, _: self._critic.predict_values(obs)[:, 0])
        twin.advantages = np.zeros_like(buffer.advantages)
        last_values = self._critic.predict_values(obs_as_tensor(self._last_obs, self.device))  # type: ignore[arg-type]
        twin.compute_returns_and_advantage(last_values, self._last_episode_starts)
        return twin.advantages

    def _rollout_logits(self) -> np.ndarray:
        policy: Any = self.policy

        def logits(obs: Any, actions: th.Tensor) -> th.Tensor:
            policy.evaluate_actions(obs, actions)
            return token_logits(policy.action_dist)

        return self._over_rollout(logits)

    def _over_rollout(self, function: Any) -> np.ndarray:
        """A function of observations and actions, for all steps: (T, E, ...)."""
        buffer: Any = self.rollout_buffer
        shape = (buffer.buffer_size, buffer.n_envs)
        actions = buffer.actions.reshape(-1, *buffer.actions.shape[2:])
        parts = []
        for at in range(0, len(actions), CHUNK):
            rows = slice(at, at + CHUNK)
            steps, envs = np.divmod(np.arange(len(actions))[rows], buffer.n_envs)
            seen = each(lambda values, steps=steps, envs=envs: values[steps, envs], buffer.observations)
            obs = obs_as_tensor(seen, self.device)
            parts.append(function(obs, th.as_tensor(actions[rows], device=self.device)).cpu().numpy())
        result = np.concatenate(parts)
        return result.reshape(*shape, *result.shape[1:])

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_critic"]
