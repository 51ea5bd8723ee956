"""On-policy distillation of token policies (VLA-OPD, Zhong et al., 2026, arXiv 2603.26666)."""

from __future__ import annotations

from typing import Any

import torch as th
from stable_baselines3.common.type_aliases import GymEnv

from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.algos.curriculum import HandOver
from rpd_sb3.algos.groups import GroupedRollouts
from rpd_sb3.algos.losses import (
    DIVERGENCES,
    floored,
    k3,
    masked_mean,
    sampled_advantage,
    token_divergence,
    token_log_prob,
    token_statistics,
)
from rpd_sb3.contract.bins import require_token_bins
from rpd_sb3.contract.names import check_choice
from rpd_sb3.students.tokens import token_logits


class OPD(GroupedRollouts):
    """The student acts; the teacher's token distributions on the student's own tokens are the target.

    ``full``: D(student, teacher) over the whole vocabulary, differentiated, with D =

    ============== =====================================================================================
    ``reverse_kl`` KL(S || T), mode-seeking: the paper's choice
    ``forward_kl`` KL(T || S), mode-covering. On the student's tokens a surrogate of the joint divergence
    ``hard_ce``    -log S(argmax T)
    ``jsd``        Jensen-Shannon
    ============== =====================================================================================

    ``sampled`` (``reverse_kl`` only): the policy gradient on A = log T(a) - log S(a), never normalized and without
    reward-to-go, as the paper has it: an estimate of the same gradient from the tokens that were drawn, with PPO's clip.
    Where the paper's text is open (one reward per step or per token) this is the reading of its notes: one per step, immediate.

    :param divergence: D
    :param estimator: ``full`` or ``sampled``
    :param teacher_temperature: the teacher's logits are divided by it
    :param teacher_floor: share of the uniform distribution mixed into the teacher; from scratch the reverse KL diverges without
    :param group_size: G rollouts from each initial state, which makes the gradient smoother; 1: no groups
    :param ppo_coef: share of the environment's reward in the policy's loss while distilling
    :param then: what follows: ``grpo`` or ``ppo`` on the reward alone; None: nothing
    :param then_on: when: ``step``, ``success`` or ``plateau``, see :class:`~rpd_sb3.algos.curriculum.HandOver`
    :param then_value: its value
    :param residual_coef: weight of the divergence after the hand-over, falling linearly to 0 at the end of training
    :param kwargs: arguments of :class:`GroupedRollouts`, :class:`OnPolicyDistillation` and PPO
    :raises ValueError: for an unknown choice, or choices that do not go together
    """

    needs = frozenset({"logits"})

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
        then: str | None = None,
        then_on: str = "success",
        then_value: float = 0.8,
        residual_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        check_choice("OPD", "divergence", divergence, DIVERGENCES)
        check_choice("OPD", "estimator", estimator, ("full", "sampled"))
        check_choice("OPD", "then", then, (None, "grpo", "ppo"))
        hand_over = HandOver(then_on, then_value)
        if estimator == "sampled" and (divergence != "reverse_kl" or kwargs.get("normalize_advantage")):
            raise ValueError("OPD: estimator='sampled' needs divergence='reverse_kl' and normalize_advantage=False")
        for key in ("label_replay", "imitation_updates", "image_shift"):
            if estimator == "sampled" and kwargs.get(key):
                raise ValueError(
                    f"OPD: {key}={kwargs[key]} needs estimator='full'; a sampled estimate is of the student's own tokens"
                )
        if teacher_temperature <= 0 or not 0 <= teacher_floor < 1:
            raise ValueError(f"OPD: {teacher_temperature=} must be positive, and {teacher_floor=} must lie in [0, 1)")
        if then == "grpo" and group_size < 2:
            raise ValueError(f"OPD: then='grpo' needs groups: group_size={group_size} must be at least 2")
        self.divergence = divergence
        self.estimator = estimator
        self.teacher_temperature = teacher_temperature
        self.teacher_floor = teacher_floor
        self.ppo_coef = ppo_coef
        self.then = then
        critic = {"vf_coef": 0.5} if then == "ppo" or ppo_coef > 0 else {}
        surrogate_coef = 1.0 if estimator == "sampled" else ppo_coef  # a sampled estimate is in its advantages
        super().__init__(policy, env, group_size=group_size, ppo_coef=surrogate_coef, **(critic | kwargs))
        if then is not None:
            self.curriculum.set_hand_over(hand_over, ppo_coef=1.0, residual_coef=residual_coef)

    def _setup_model(self) -> None:
        require_token_bins("OPD", self.action_space)
        super()._setup_model()

    def prepare_rollout(self) -> None:
        """The advantages that the surrogate works on."""
        buffer: Any = self.rollout_buffer
        if self.curriculum.reward_leads:
            buffer.advantages = self.group_advantages() if self.then == "grpo" else buffer.advantages
        elif self.estimator == "sampled":
            buffer.advantages = self.ppo_coef * buffer.advantages
            if "logits" in buffer.labels:  # else the teacher was not asked: the coefficient is 0
                teacher = self.teacher_log_probs(th.as_tensor(buffer.labels["logits"]))
                log_prob = token_log_prob(teacher, th.as_tensor(buffer.actions)).sum(dim=-1)  # of whole actions
                log_ratio = sampled_advantage(th.as_tensor(buffer.log_probs).view(-1, 1), log_prob.view(-1, 1)).numpy()
                buffer.advantages += self.curriculum.distill_coef * log_ratio.reshape(log_prob.shape) * buffer.labelled

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, dict[str, float]]:
        distribution, labels, labelled = self.imitation(batch, student)
        student_logits, teacher_logits = token_logits(distribution), self.teacher_log_probs(labels["logits"])
        loss = masked_mean(token_divergence(student_logits, teacher_logits, self.divergence).sum(dim=1), labelled)
        if self.estimator == "sampled" and not self.curriculum.reward_leads:
            loss = loss.detach()  # the surrogate carries it
        logs = token_statistics(student_logits.detach(), teacher_logits, labelled)
        if "logits" in batch.labels and not batch.replayed:  # on the student's own actions, also with a label replay
            own = token_log_prob(self.teacher_log_probs(batch.labels["logits"]), batch.actions).sum(dim=1)
            sampled = batch.labelled & ~batch.teacher_acted
            logs["k3"] = masked_mean(k3(student.log_prob.detach(), own), sampled).item()
        return loss, logs

    def teacher_log_probs(self, logits: th.Tensor) -> th.Tensor:
        """The teacher as it is distilled, ``(..., K, V)``: at its temperature, with its floor."""
        return floored(logits / self.teacher_temperature, self.teacher_floor)
