"""A teacher without a network: scripted experts that read the simulator's state.

Shape letters: N queries in a batch, A = 7 action dimensions, S privileged values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from rpd_sb3.names import closest
from rpd_sb3.teachers.base import Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.teachers.experts import EXPERTS
from rpd_sb3.teachers.motion import unpack
from rpd_sb3.teachers.privileged import SIZE

ACTION_SIZE = 7  # xyz, rotation, gripper


class ScriptedTeacher(LocalTeacher):
    """A stand-in for a vision-language-action model, so that everything runs offline.

    It gives ``action`` (N, A) float32 in [-1, 1] for ``pd_ee_delta_pose``, a function of the current state alone (plus noise).
    Noise, bias and dropout make it as mediocre as a real VLA.

    :param env_id: one of the eight ManiSkill tasks in :data:`~rpd_sb3.teachers.experts.EXPERTS`
    :param noise: std of the Gaussian noise on every action dimension, in units of the action
    :param bias: added to the three translations (a number) or to all A dimensions (a sequence), in units of the action
    :param dropout: probability that an answer holds still: no translation, no rotation, gripper kept
    :param seed: of noise and dropout; answers follow from the seed and the sequence of batches asked
    :raises ValueError: for an unknown task, or a negative, infinite or missing number
    """

    def __init__(
        self,
        env_id: str,
        *,
        noise: float = 0.0,
        bias: float | Sequence[float] = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if env_id not in EXPERTS:
            known = ", ".join(sorted(EXPERTS))
            raise ValueError(f"no scripted expert for env {env_id!r}, only for {known}{closest(env_id, EXPERTS)}")
        if not (np.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise={noise} must be a finite std >= 0")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must be a probability in [0, 1]")
        self._expert = EXPERTS[env_id]
        self._bias = _as_bias(bias)
        self._noise, self._dropout = noise, dropout
        self._rng = np.random.default_rng(seed)
        self.spec = TeacherSpec(
            name="scripted",
            labels=frozenset({"action"}),
            inputs=("privileged",),
            action_space=spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32),
            control_mode="pd_ee_delta_pose",
            env_id=env_id,
            input_shapes={"privileged": (SIZE,)},
            gripper="-1..1",
            rotation="axis_angle",
        )

    def label(self, query: Query) -> Labels:
        """What the expert would do, after bias, noise, dropout and clipping.

        :param query: ``inputs["privileged"]`` (N, S)
        :return: ``action`` (N, A) float32 in [-1, 1]
        """
        action = self._expert(unpack(query.inputs["privileged"])) + self._bias
        if self._noise:
            action += self._rng.normal(0.0, self._noise, action.shape)
        if self._dropout:
            action[self._rng.random(len(action)) < self._dropout, :-1] = 0.0
        return {"action": np.clip(action, -1.0, 1.0).astype(np.float32)}


def _as_bias(bias: float | Sequence[float]) -> np.ndarray:
    values = np.asarray(bias, np.float64)
    if values.shape == ():
        values = np.where(np.arange(ACTION_SIZE) < 3, values, 0.0)
    if values.shape != (ACTION_SIZE,) or not np.isfinite(values).all():
        raise ValueError(f"bias={bias} must be one finite number for the translations or {ACTION_SIZE} of them")
    return values
