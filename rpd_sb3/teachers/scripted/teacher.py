"""A teacher without a network: scripted experts that read the simulator's state.

Shape letters: N queries in a batch, A = 7 action dimensions, S privileged values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.bins import to_tokens
from rpd_sb3.contract.names import closest
from rpd_sb3.contract.privileged import SIZE
from rpd_sb3.contract.teacher import Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.teachers.scripted.experts import EXPERTS
from rpd_sb3.teachers.scripted.mixture import bin_log_probs, conditional_logits, fit_gaussian
from rpd_sb3.teachers.scripted.motion import State, flat, length, ramp, unpack

ACTION_SIZE = 7  # xyz, rotation, gripper


class ScriptedTeacher(LocalTeacher):
    """A stand-in for a vision-language-action model (VLA) that runs offline.

    It gives ``action`` (N, A) float32 in [-1, 1] for ``pd_ee_delta_pose``, a function of the current state alone (plus noise).
    Noise, bias and dropout make it as imperfect as a real VLA.

    :param env_id: one of the eight ManiSkill tasks in :data:`~rpd_sb3.teachers.scripted.experts.EXPERTS`
    :param noise: std of the Gaussian noise on every action dimension, in units of the action
    :param bias: added to the three translations (a number) or to all A dimensions (a sequence), in units of the action
    :param dropout: probability that an answer holds still: no translation, no rotation, gripper kept
    :param seed: of noise and dropout; answers follow from the seed and the sequence of batches asked
    :param n_bins: also give ``logits`` (N, A, n_bins), a discretised Gaussian around the action for each token; None: do not
    :param std: of that Gaussian, and of the samples of ``n_samples``, in units of the action
    :param detour: 0: one mode. Else two: far from the object it goes this much to the one side or to the other (in x and
        in y), both of which reach it. ``logits`` are those of the mixture, given the student's tokens; the ``action`` for an
        environment keeps to one side
    :param autoregressive: False: the logits of each token alone, as of a teacher that decodes in parallel
    :param n_samples: give the mean and ``std`` (N, A) of a Gaussian fitted to this many samples; 0: do not
    :param std_floor: least fitted std
    :raises ValueError: for an unknown task, or a number out of range
    """

    def __init__(
        self,
        env_id: str,
        *,
        noise: float = 0.0,
        bias: float | Sequence[float] = 0.0,
        dropout: float = 0.0,
        seed: int = 0,
        n_bins: int | None = None,
        std: float = 0.1,
        detour: float = 0.0,
        autoregressive: bool = True,
        n_samples: int = 0,
        std_floor: float = 0.02,
    ) -> None:
        super().__init__()
        if env_id not in EXPERTS:
            known = ", ".join(sorted(EXPERTS))
            raise ValueError(f"no scripted expert for env {env_id!r}, only for {known}{closest(env_id, EXPERTS)}")
        if not (np.isfinite(noise) and noise >= 0):
            raise ValueError(f"noise={noise} must be a finite std >= 0")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must be a probability in [0, 1]")
        if n_bins is not None and n_bins < 2:
            raise ValueError(f"n_bins={n_bins} must be at least 2")
        if not (0 < std < np.inf and 0 < std_floor < np.inf and np.isfinite(detour)):
            raise ValueError(f"std={std} and std_floor={std_floor} must be positive, detour={detour} a finite number")
        if n_samples == 1 or n_samples < 0:
            raise ValueError(f"n_samples={n_samples} must be 0, or at least 2: one sample has no std")
        self._n_bins = n_bins
        self._std = std
        self._detour = detour
        self._autoregressive = autoregressive
        self._n_samples = n_samples
        self._std_floor = std_floor
        self._expert = EXPERTS[env_id]
        self._bias = _as_bias(bias)
        self._noise = noise
        self._dropout = dropout
        self._rng = np.random.default_rng(seed)
        self.spec = TeacherSpec(
            name="scripted",
            labels=frozenset({"action"} | ({"logits"} if n_bins else set()) | ({"std"} if n_samples else set())),
            n_bins=n_bins,
            inputs=("privileged",),
            action_space=spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32),
            control_mode="pd_ee_delta_pose",
            env_id=env_id,
            input_shapes={"privileged": (SIZE,)},
            gripper="-1..1",
            rotation="axis_angle",
            stochastic=bool(noise or dropout or n_samples),
        )

    def label(self, query: Query) -> Labels:
        """The expert's action after bias, noise, dropout and clipping.

        :param query: ``inputs["privileged"]`` (N, S)
        :return: ``action`` (N, A) float32 in [-1, 1]; ``logits`` (N, A, n_bins) and ``std`` (N, A) if asked for
        """
        state = unpack(query.inputs["privileged"])
        action = self._expert(state) + self._bias
        if self._noise:
            action += self._rng.normal(0.0, self._noise, action.shape)
        if self._dropout:
            action[self._rng.random(len(action)) < self._dropout, :-1] = 0.0
        modes = self._modes(state, action)
        n = len(action)
        labels: Labels = {"action": modes[np.arange(n), query.env_ids % modes.shape[1]].astype(np.float32)}
        if self._n_bins is not None:
            prefix = query.actions if self._autoregressive else None
            if prefix is None and self._autoregressive:  # without a student, on the teacher's own tokens
                prefix = labels["action"]
            if prefix is not None and np.asarray(prefix).dtype.kind == "f":  # the actions are not tokens
                prefix = to_tokens(prefix, self._n_bins)
            labels["logits"] = conditional_logits(bin_log_probs(modes, self._std, self._n_bins), prefix)
        if self._n_samples:
            drawn = self._rng.integers(modes.shape[1], size=(self._n_samples, n))
            samples = modes[np.arange(n), drawn] + self._rng.normal(0.0, self._std, (self._n_samples, n, ACTION_SIZE))
            labels["action"], labels["std"] = fit_gaussian(np.clip(samples, -1.0, 1.0), self._std_floor)
        return labels

    def _modes(self, state: State, action: np.ndarray) -> np.ndarray:
        """The actions (N, M, A) in [-1, 1] that are the modes of the answer."""
        if not self._detour:
            return np.clip(action, -1.0, 1.0)[:, None]
        far = ramp(length(flat(state.object - state.tcp)), 0.04, 0.1)
        aside = self._detour * far[:, None] * np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        return np.clip(np.stack([action + aside, action - aside], axis=1), -1.0, 1.0)


def _as_bias(bias: float | Sequence[float]) -> np.ndarray:
    values = np.asarray(bias, np.float64)
    if values.shape == ():
        values = np.where(np.arange(ACTION_SIZE) < 3, values, 0.0)
    if values.shape != (ACTION_SIZE,) or not np.isfinite(values).all():
        raise ValueError(f"bias={bias} must be one finite number for the translations or {ACTION_SIZE} of them")
    return values
