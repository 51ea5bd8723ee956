"""Proximal Policy Distillation (Spigler, 2024, arXiv 2407.15134)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import GymEnv

from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.algos.losses import floored, gaussian_kl, masked_mean, ratio_weighted, token_divergence
from rpd_sb3.contract.names import check_choice
from rpd_sb3.contract.teacher import TeacherError
from rpd_sb3.students.tokens import token_logits


class PPD(OnPolicyDistillation):
    """PPO plus E[max(r, 1 - eps) KL], r the ratio of PPO and eps its clip range.

    =========== ==========================================================================================
    ``forward`` KL(teacher || student), as in the author's own library: covers all that the teacher may do
    ``reverse`` KL(student || teacher), as in the code that the RPD paper compares with
    =========== ==========================================================================================

    Continuous actions: closed form for Gaussians, of the teacher's labels ``action`` (its mean) and ``std``, a std and not a
    variance (RPD's code passes it as the covariance, so that its KL is another). Tokens: of ``logits``.

    :param direction: ``forward`` or ``reverse``
    :param teacher_floor: share of the uniform distribution that is mixed into a teacher's tokens
    :param kwargs: arguments of :class:`OnPolicyDistillation` and PPO; there is no label replay and no shift of images, as the
        ratio is that of the student's own actions on what it saw
    :raises ValueError: for an unknown direction, or an action space without a closed form
    """

    needs = frozenset({"action", "std"})

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *,
        direction: str = "forward",
        teacher_floor: float = 0.01,
        **kwargs: Any,
    ) -> None:
        check_choice("PPD", "direction", direction, ("forward", "reverse"))
        if not 0 <= teacher_floor < 1:
            raise ValueError(f"PPD: teacher_floor={teacher_floor} must lie in [0, 1)")
        for key, unused in {"label_replay": 0, "imitation_updates": None, "image_shift": 0}.items():
            if (value := kwargs.get(key, unused)) != unused:
                raise ValueError(f"PPD: {key}={value} has no ratio of the student's own actions; leave it at {unused}")
        self.direction = direction
        self.teacher_floor = teacher_floor
        if env is not None and isinstance(getattr(env, "action_space", None), spaces.MultiDiscrete):
            self.needs = frozenset({"logits"})
        super().__init__(policy, env, **kwargs)

    def _setup_model(self) -> None:
        if not isinstance(self.action_space, (spaces.Box, spaces.MultiDiscrete)):
            raise ValueError(f"PPD needs continuous actions or action tokens, got {self.action_space}")
        super()._setup_model()

    def prepare_rollout(self) -> None:
        """Check that the KL is finite.

        :raises TeacherError: if the teacher's std is not positive
        """
        buffer: Any = self.rollout_buffer
        if "std" in buffer.labels and (std := buffer.labels["std"][buffer.labelled]).min(initial=np.inf) <= 0:
            raise TeacherError(
                f"PPD needs a std above 0, the teacher gave {std.min()}; have it draw more samples, or at a temperature, "
                "or use RPD, which needs no std"
            )

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, Mapping[str, float]]:
        labels, distribution = batch.labels, student.distribution
        forward = self.direction == "forward"
        if "logits" in labels:
            teacher_logits = floored(labels["logits"], self.teacher_floor)
            kind = "forward_kl" if forward else "reverse_kl"
            kl = token_divergence(token_logits(distribution), teacher_logits, kind).sum(dim=1)
        else:
            # Where there is no label, any positive std will do: the mask takes it out.
            teacher = labels["action"], th.where(batch.labelled[:, None], labels["std"], 1.0)
            normal: Any = distribution.distribution
            pair = (*teacher, normal.mean, normal.stddev) if forward else (normal.mean, normal.stddev, *teacher)
            kl = gaussian_kl(*pair)
        # Where the teacher acted there is no probability of the student's to compare with: the KL counts once.
        ratio = th.exp((student.log_prob - batch.old_log_prob).masked_fill(batch.teacher_acted, 0.0))
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        return masked_mean(ratio_weighted(kl, ratio, clip_range), batch.labelled), {
            "distill_kl": masked_mean(kl, batch.labelled).item()
        }
