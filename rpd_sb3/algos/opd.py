"""On-policy distillation of token policies (VLA-OPD, Zhong et al., 2026, arXiv 2603.26666)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.algos.buffers import LabelledSamples
from rpd_sb3.algos.grpo import GRPO
from rpd_sb3.algos.loop import Student
from rpd_sb3.algos.losses import (
    DIVERGENCES,
    floored,
    k3,
    masked_mean,
    sampled_advantage,
    token_divergence,
    token_entropy,
    token_log_prob,
    top1_agreement,
)
from rpd_sb3.algos.sft import clone
from rpd_sb3.demos.record import record
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.students.tokens import token_logits

ESTIMATORS = ("full", "sampled")
NEXT = ("grpo", "ppo")
TRIGGERS = ("step", "success", "plateau")
PLATEAU = 0.02
"""Gain in success rate below which a plateau counts as one."""


class OPD(GRPO):
    """The student acts; the teacher's token distributions on the student's own tokens are the target.

    ``full``: D(student, teacher) over the whole vocabulary, differentiated, with D =

    ============== =====================================================================================
    ``reverse_kl`` KL(S || T), mode-seeking: the paper's choice
    ``forward_kl`` KL(T || S), mode-covering. On the student's tokens a surrogate of the joint divergence
    ``hard_ce``    -log S(argmax T)
    ``jsd``        Jensen-Shannon
    ============== =====================================================================================

    ``sampled`` (``reverse_kl`` only): the policy gradient on A = log T(a) - log S(a), never normalised and without
    reward-to-go, as the paper has it: an estimate of the same gradient from the tokens that were drawn, with PPO's clip.

    The paper's hyper-parameters are not public; where its text is open (one reward per step or per token, reward-to-go) this
    is the reading of the published notes: one per step, immediate.

    :param divergence: D
    :param estimator: ``full`` or ``sampled``
    :param teacher_temperature: the teacher's logits are divided by it
    :param teacher_floor: share of the uniform distribution that is mixed into the teacher: the reverse KL is unbounded
        where the teacher gives a token no chance (measured: from scratch it diverges without a floor)
    :param group_size: G rollouts from each initial state, which makes the gradient smoother; 1: no groups
    :param ppo_coef: share of the environment's reward in the policy's loss while distilling
    :param n_demos: teacher's episodes to clone before the first rollout; their steps count as timesteps
    :param demo_epochs: passes over them
    :param then: what follows: ``grpo`` or ``ppo`` on the reward alone; None: nothing
    :param then_on: when: at a number of timesteps (``step``), a ``success`` rate of training episodes, or when that has not
        grown by 2 points for a number of rollouts (``plateau``)
    :param then_value: that number, or rate
    :param residual_coef: weight of the divergence after the hand-over, falling linearly to 0 at the end of training
    :param kwargs: arguments of :class:`GRPO` and PPO
    :raises ValueError: for an unknown choice, or choices that do not go together
    """

    needs = frozenset({"logits"})
    min_group_size = 1

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *,
        divergence: str = "reverse_kl",
        estimator: str = "full",
        teacher_temperature: float = 1.0,
        teacher_floor: float = 0.01,
        group_size: int = 1,
        ppo_coef: float = 0.0,
        n_demos: int = 0,
        demo_epochs: int = 20,
        then: str | None = None,
        then_on: str = "success",
        then_value: float = 0.8,
        residual_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        choices = {
            "divergence": (divergence, DIVERGENCES),
            "estimator": (estimator, ESTIMATORS),
            "then": ("grpo" if then is None else then, NEXT),
            "then_on": (then_on, TRIGGERS),
        }
        for key, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"OPD: {key}={value!r} is unknown; choose one of {', '.join(allowed)}")
        checks = {
            f"estimator='sampled' estimates reverse_kl, not divergence={divergence!r}": estimator == "full"
            or divergence == "reverse_kl",
            "estimator='sampled' must not be normalised: normalize_advantage has to be False": estimator == "full"
            or not kwargs.get("normalize_advantage", False),
            f"teacher_temperature={teacher_temperature} must be positive": teacher_temperature > 0,
            f"teacher_floor={teacher_floor} must lie in [0, 1)": 0 <= teacher_floor < 1,
            f"then='grpo' needs groups: group_size={group_size} must be at least 2": then != "grpo" or group_size > 1,
            f"then_value={then_value} must be positive": then_value > 0,
            f"then_value={then_value} is a success rate and must not be above 1": then_on != "success"
            or then_value <= 1,
            f"then_value={then_value} is a number of rollouts and must be at least 1": then_on != "plateau"
            or then_value >= 1,
            "success_cutoff is not for OPD; use then='ppo', then_on='success'": kwargs.get("success_cutoff") is None,
            f"residual_coef={residual_coef} must not be negative": residual_coef >= 0,
            f"n_demos={n_demos} must not be negative": n_demos >= 0,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(f"OPD: {message}")
        self.divergence, self.estimator = divergence, estimator
        self.teacher_temperature, self.teacher_floor = teacher_temperature, teacher_floor
        self.n_demos, self.demo_epochs = n_demos, demo_epochs
        if n_demos:
            self.needs = self.needs | {"action"}
        self.then, self.then_on, self.then_value, self.residual_coef = then, then_on, then_value, residual_coef
        self._success_rates: list[float] = []
        self._handed_over_at = 0.0
        critic = {"vf_coef": 0.5} if then == "ppo" or ppo_coef > 0 else {}
        super().__init__(policy, env, group_size=group_size, ppo_coef=ppo_coef, **(critic | kwargs))

    def _setup_model(self) -> None:
        if not isinstance(self.action_space, spaces.MultiDiscrete):
            raise ValueError(
                f"OPD needs action tokens, got {self.action_space}; wrap the env in ActionTokens (--env-kwargs tokens:true)"
            )
        super()._setup_model()

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        if self.n_demos and self.num_timesteps == 0:
            self._clone_teacher(env)
        return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)

    def schedule_distill_coef(self) -> float:
        """Weight of the divergence for the coming rollout; decides on the hand-over."""
        if self.then is None:
            return super().schedule_distill_coef()
        remaining = self._current_progress_remaining
        if not self._handed_over and self._triggered():
            self._handed_over, self._handed_over_at = True, remaining
        if not self._handed_over:
            return super().schedule_distill_coef()
        # Above 1 where training was extended after the hand-over.
        return self.residual_coef * min(max(remaining, 0.0) / max(self._handed_over_at, 1e-8), 1.0)

    def compares_episodes(self) -> bool:
        return self.then == "grpo"

    def surrogate_coef(self) -> float:
        """1 after the hand-over, and where the surrogate carries the sampled estimate."""
        return 1.0 if self._handed_over or self.estimator == "sampled" else self.ppo_coef

    def prepare_rollout(self) -> None:
        """The advantages that the surrogate works on."""
        if self._handed_over and self.then == "grpo":
            super().prepare_rollout()
        elif not self._handed_over and self.estimator == "sampled":
            buffer: Any = self.rollout_buffer
            buffer.advantages = self.ppo_coef * buffer.advantages
            if "logits" in buffer.labels:  # else the teacher was not asked: the coefficient is 0
                buffer.advantages += self._current_distill_coef * self._sampled_advantages() * buffer.labelled

    def _sampled_advantages(self) -> np.ndarray:
        """log T(a) - log S_old(a) of all steps (n_steps, n_envs)."""
        buffer: Any = self.rollout_buffer
        teacher = self._teacher_log_probs(th.as_tensor(buffer.labels["logits"]).flatten(0, 1))
        actions = th.as_tensor(buffer.actions).flatten(0, 1)
        student_log_prob = th.as_tensor(buffer.log_probs).flatten()[:, None]  # of all tokens together
        teacher_log_prob = token_log_prob(teacher, actions).sum(dim=1, keepdim=True)
        return sampled_advantage(student_log_prob, teacher_log_prob).reshape(buffer.advantages.shape).numpy()

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, Mapping[str, float]]:
        distribution, labels, labelled = self.imitation(batch, student)
        student_logits, teacher_logits = token_logits(distribution), self._teacher_log_probs(labels["logits"])
        divergence = token_divergence(student_logits, teacher_logits, self.divergence).sum(dim=1)
        loss = masked_mean(divergence, labelled)
        if self.estimator == "sampled" and not self._handed_over:
            loss = loss.detach()  # the surrogate carries it
        logs = self._diagnostics(student_logits.detach(), teacher_logits, labelled)
        if "logits" in batch.labels:  # on the student's own actions, also with a label replay
            own = token_log_prob(self._teacher_log_probs(batch.labels["logits"]), batch.actions).sum(dim=1)
            logs["k3"] = masked_mean(k3(student.log_prob.detach(), own), batch.labelled).item()
        return loss, logs

    @staticmethod
    def _diagnostics(student_logits: th.Tensor, teacher_logits: th.Tensor, labelled: th.Tensor) -> dict[str, float]:
        """Divergences both ways, agreement and entropies, for all tokens and for each (``/0`` to ``/K-1``)."""
        per_token = {
            "reverse_kl": token_divergence(student_logits, teacher_logits, "reverse_kl"),
            "forward_kl": token_divergence(student_logits, teacher_logits, "forward_kl"),
            "top1_agreement": top1_agreement(student_logits, teacher_logits).float(),
            "student_entropy": token_entropy(student_logits),
            "teacher_entropy": token_entropy(teacher_logits),
        }
        logs = {}
        for name, values in per_token.items():
            means = [masked_mean(token, labelled).item() for token in values.unbind(dim=1)]
            logs[name] = sum(means) / len(means)
            logs |= {f"{name}/{token}": mean for token, mean in enumerate(means)}
        return logs

    def _teacher_log_probs(self, logits: th.Tensor) -> th.Tensor:
        return floored(logits / self.teacher_temperature, self.teacher_floor)

    def _triggered(self) -> bool:
        if self.then_on == "step":
            return self.num_timesteps >= self.then_value
        if not self.ep_success_buffer:
            return False
        rate = float(safe_mean(self.ep_success_buffer))
        if self.then_on == "success":
            return rate >= self.then_value
        self._success_rates.append(rate)
        n = int(self.then_value)
        before, recent = self._success_rates[:-n], self._success_rates[-n:]
        return bool(before) and max(recent) < max(before) + PLATEAU

    def _clone_teacher(self, env: VecEnv) -> None:
        """Begin with behaviour cloning of the teacher's episodes."""
        demos = record(env, self.n_demos)
        rng = np.random.default_rng(self.seed)
        clone(
            self.policy,
            demos.observations,
            demos.actions,
            n_epochs=self.demo_epochs,
            batch_size=self.batch_size,
            max_grad_norm=self.max_grad_norm,
            rng=rng,
            bounds=find_token_bounds(env),
        )
        self.num_timesteps += len(demos.actions)
        self._restart(env)
