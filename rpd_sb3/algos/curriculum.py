"""Which loss leads, and when: decided here before each rollout, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule

from rpd_sb3.contract.names import check_choice

TRIGGERS = ("step", "success", "plateau")
PLATEAU = 0.02
"""Gain in success rate below which a plateau counts as one."""


class CosineSchedule:
    """From ``start`` to 0 along half a cosine: flat at both ends.

    :param start: value at the beginning of training
    """

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, progress_remaining: float) -> float:
        return self.start * 0.5 * (1.0 + math.cos(math.pi * (1.0 - progress_remaining)))

    def __repr__(self) -> str:
        return f"CosineSchedule(start={self.start})"


class HandOver:
    """When the reward takes the lead from imitation. Never at a known success rate of zero: there is nothing to learn from yet.

    :param on: at a number of timesteps (``step``), a ``success`` rate of training episodes, or when that has not grown by 2
        points for a number of rollouts (``plateau``)
    :param value: that number, or rate
    :param returns: hand back where the success rate falls below half of ``value``; False: for good
    :raises ValueError: for an unknown trigger, or a value that is out of its range
    """

    def __init__(self, on: str, value: float, *, returns: bool = False) -> None:
        check_choice("hand-over", "then_on", on, TRIGGERS)
        if on == "success" and not 0 < value <= 1:
            raise ValueError(f"then_value or success_cutoff is {value}: a success rate must lie in (0, 1]")
        if on == "plateau" and not value >= 1:
            raise ValueError(f"then_value={value}: a plateau is a number of rollouts and must be at least 1")
        if not value > 0:
            raise ValueError(f"then_value={value}: a number of timesteps must be positive")
        self.on = on
        self.value = value
        self.returns = returns
        self.success_rates: list[float] = []

    def is_due(self, timesteps: int, success_rate: float | None) -> bool:
        """True if the reward must take the lead. Counts the rollouts of a plateau, so it is asked once before each.

        :param timesteps: environment steps so far
        :param success_rate: of the last training episodes; None: not known
        """
        if self.on == "step":
            return timesteps >= self.value and success_rate != 0
        if success_rate is None:
            return False
        if self.on == "success":
            return success_rate >= self.value
        self.success_rates.append(success_rate)
        n = int(self.value)
        best = max(self.success_rates[:-n], default=0.0)
        return best > 0 and max(self.success_rates[-n:]) < best + PLATEAU

    def is_lost(self, success_rate: float | None) -> bool:
        """True if imitation must take the lead back."""
        return self.returns and success_rate is not None and success_rate < self.value / 2


class Curriculum:
    """The weights of the losses and the learning rate of the coming update.

    Until the hand-over imitation leads: ``distill_coef`` as scheduled. A hand-over is not a ramp: under Adam a term that is
    alone moves the policy as far with a small weight as with a large one.

    :param distill_coef: weight of the distillation term while imitation leads, a number or a schedule of the remaining progress
    :param ppo_coef: weight of the surrogate while imitation leads
    :param reward_learning_rate: learning rate while the reward leads, a number or a schedule of the remaining progress; None: the
        algorithm's own
    :param teacher_share: share of the training episodes that the teacher finishes while imitation leads, a number or a
        schedule of the remaining progress
    :param reward_from: timesteps before which the reward does not take the lead
    :raises ValueError: if a weight or a number of timesteps is negative, a learning rate not positive, or a share outside [0, 1]
    """

    reward_from = 0  # also of curricula that were saved before there was such an argument
    shares: Schedule | None = None
    """``teacher_share`` as scheduled; None: the teacher never acts."""
    teacher_share = 0.0
    """Share of the episodes that the teacher finishes, of those that begin in the coming rollout."""

    def __init__(
        self,
        distill_coef: float | Schedule,
        ppo_coef: float,
        reward_learning_rate: float | Schedule | None = None,
        teacher_share: float | Schedule = 0.0,
        reward_from: int = 0,
    ) -> None:
        if not callable(distill_coef) and not distill_coef >= 0:
            raise ValueError(f"distill_coef={distill_coef} must not be negative")
        if not ppo_coef >= 0:
            raise ValueError(f"ppo_coef={ppo_coef} must not be negative")
        if not (reward_learning_rate is None or callable(reward_learning_rate) or reward_learning_rate > 0):
            raise ValueError(f"reward_learning_rate={reward_learning_rate} must be positive")
        if not reward_from >= 0:
            raise ValueError(f"reward_from={reward_from} must not be negative")
        if callable(teacher_share) or teacher_share != 0:
            self.shares = FloatSchedule(teacher_share)
            if not all(0 <= self.shares(progress) <= 1 for progress in (1.0, 0.0)):
                raise ValueError(f"teacher_share={teacher_share} must lie between 0 and 1")
        self.schedule = FloatSchedule(distill_coef)
        self.ppo_coef = ppo_coef
        self.reward_learning_rate = reward_learning_rate
        self.reward_from = reward_from
        self.hand_over: HandOver | None = None
        self.reward_ppo_coef = ppo_coef
        """Weight of the surrogate while the reward leads."""
        self.residual_coef = 0.0
        """Weight of the distillation term at the hand-over; from there it falls linearly to 0 at the end of training."""
        self.reward_leads = False
        self.distill_coef = 0.0
        """Weight of the distillation term in the coming update."""
        self._handed_over_at = 1.0  # remaining progress

    def set_hand_over(self, hand_over: HandOver, *, ppo_coef: float | None = None, residual_coef: float = 0.0) -> None:
        """Let the reward take the lead at some time.

        :param hand_over: when
        :param ppo_coef: weight of the surrogate from then on; None: as before
        :param residual_coef: weight of the distillation term then, falling linearly to 0 at the end of training
        :raises ValueError: if there is a hand-over already, or a weight is negative
        """
        if self.hand_over is not None:
            raise ValueError("there can be one hand-over: give success_cutoff or then, not both")
        if not residual_coef >= 0:
            raise ValueError(f"residual_coef={residual_coef} must not be negative")
        if ppo_coef is not None and not ppo_coef >= 0:
            raise ValueError(f"reward_ppo_coef={ppo_coef} must not be negative")
        self.hand_over = hand_over
        self.reward_ppo_coef = self.ppo_coef if ppo_coef is None else ppo_coef
        self.residual_coef = residual_coef

    def update(self, timesteps: int, progress_remaining: float, success_rate: float | None) -> None:
        """Decide on the coming rollout and its update.

        :param timesteps: environment steps so far
        :param progress_remaining: of training, 1 to 0
        :param success_rate: of the last training episodes; None: not known
        """
        if self.hand_over is not None and not self.reward_leads:
            due = self.hand_over.is_due(timesteps, success_rate)
            self.reward_leads = due and timesteps >= self.reward_from
            self._handed_over_at = progress_remaining
        elif self.hand_over is not None and self.hand_over.is_lost(success_rate):
            self.reward_leads = False
        if self.reward_leads:
            # Above 1 where training was extended after the hand-over.
            left = max(progress_remaining, 0.0) / max(self._handed_over_at, 1e-8)
            self.distill_coef = self.residual_coef * min(left, 1.0)
        else:
            self.distill_coef = float(self.schedule(progress_remaining))
        imitates = self.shares is not None and not self.reward_leads and self.distill_coef > 0
        self.teacher_share = float(self.shares(progress_remaining)) if imitates else 0.0  # type: ignore[misc]

    @property
    def surrogate_coef(self) -> float:
        """Weight of the surrogate in the coming update."""
        return self.reward_ppo_coef if self.reward_leads else self.ppo_coef

    def learning_rate(self, progress_remaining: float) -> float | None:
        """Learning rate of the coming update; None: the algorithm's own."""
        if not self.reward_leads or self.reward_learning_rate is None:
            return None
        return float(FloatSchedule(self.reward_learning_rate)(progress_remaining))


def curriculum_of_version_0_1(saved: dict[str, Any]) -> Curriculum:
    """The curriculum of a model that version 0.1 saved with its parts as attributes of the algorithm.

    :param saved: attributes of the loaded model; those that are now the curriculum's are taken out
    """
    taken: tuple[str, ...] = (
        "distill_coef",
        "success_cutoff",
        "reward_learning_rate",
        "_current_distill_coef",
        "_handed_over",
    )
    taken += ("then_on", "then_value", "residual_coef", "_handed_over_at", "_success_rates")  # OPD's
    old = {name: saved.pop(name, None) for name in taken}
    sampled = saved.get("estimator") == "sampled"
    curriculum = Curriculum(old["distill_coef"], 1.0 if sampled else saved["ppo_coef"], old["reward_learning_rate"])
    if old["success_cutoff"] is not None:
        curriculum.set_hand_over(HandOver("success", old["success_cutoff"], returns=True))
    elif saved.get("then") is not None:
        hand_over = HandOver(old["then_on"], old["then_value"])
        hand_over.success_rates = old["_success_rates"]
        curriculum.set_hand_over(hand_over, ppo_coef=1.0, residual_coef=old["residual_coef"])
        curriculum._handed_over_at = old["_handed_over_at"]
    curriculum.reward_leads = old["_handed_over"]
    return curriculum
