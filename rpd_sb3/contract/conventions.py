"""From a teacher's actions to the environment's: the one place where conventions are converted.

Training, evaluation, teacher rollouts and recordings all read labels through :class:`ActionAdapter`, and action tokens get
their bounds from :func:`convert_token_bounds`. The teacher's spec has the conventions to convert from. Actions come
unnormalized: only the teacher has the statistics of its dataset.

Shape letters: N queries, A action dimensions (the last one is the gripper; 3 to 5 turn the hand).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.bins import Bounds, token_bins
from rpd_sb3.contract.teacher import GRIPPERS, Labels, TeacherSpec

UNIT = Bounds(np.array(-1.0), np.array(1.0))


class ActionAdapter:
    """Converts gripper and rotation of labels, and clips the actions that an environment is given.

    Labels to learn from are not clipped: the mean of a noisy teacher's answers is its action, that of clipped answers is not.

    :param spec: the teacher's
    :param space: the environment's actions; a gripper whose least value is 0 is ``0..1``, any other ``-1..1``
    :raises ValueError: for an unknown gripper or rotation sign
    """

    def __init__(self, spec: TeacherSpec, space: spaces.Space) -> None:
        if spec.gripper is not None and spec.gripper not in GRIPPERS:
            raise ValueError(f"teacher {spec.name!r} has gripper={spec.gripper!r}; choose one of {', '.join(GRIPPERS)}")
        if spec.rotation_sign not in (-1, 1):
            raise ValueError(f"teacher {spec.name!r} has rotation_sign={spec.rotation_sign}; choose 1 or -1")
        taught = spec.action_space
        size = taught.shape[0] if taught.shape and len(taught.shape) == 1 else 0
        if spec.rotation_sign == -1 and size < 6:
            raise ValueError(f"teacher {spec.name!r} has rotation_sign=-1, but its actions {taught} have no rotation")
        n = size if isinstance(taught, spaces.Box) else 0  # a teacher's tokens stay
        unit = spaces.Box(-1.0, 1.0, (n,), np.float32)  # what tokens stand for
        self._box = None if not n else space if isinstance(space, spaces.Box) else unit
        self._factor = np.ones(n)
        self._offset = np.zeros(n)
        if n >= 6:
            self._factor[3:6] = spec.rotation_sign
        if n and spec.gripper is not None:
            closed, opened = GRIPPERS[spec.gripper]
            zero = isinstance(space, spaces.Box) and float(space.low[-1]) == 0.0
            wanted_closed, wanted_open = GRIPPERS["0..1" if zero else "-1..1"]
            self._factor[-1] = (wanted_open - wanted_closed) / (opened - closed)
            self._offset[-1] = wanted_closed - closed * self._factor[-1]
        self._same = bool((self._factor == 1.0).all() and (self._offset == 0.0).all())

    def convert(self, actions: np.ndarray) -> np.ndarray:
        """Actions ``(..., A)`` in the environment's conventions, not clipped."""
        return (actions * self._factor + self._offset).astype(actions.dtype)

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """Converted actions ``(..., A)`` within the environment's action space; a NaN stays a NaN."""
        return actions if self._box is None else np.clip(actions, self._box.low, self._box.high)

    def __call__(self, labels: Labels) -> Labels:
        """The labels with ``action`` and ``std`` (N, A) in the environment's conventions, the others unchanged.

        ``logits`` need no conversion: :func:`convert_token_bounds` converts what the tokens stand for.
        """
        if self._same:
            return labels
        labels = dict(labels)
        if "action" in labels:
            labels["action"] = self.convert(labels["action"])
        if "std" in labels:
            labels["std"] = (labels["std"] * np.abs(self._factor)).astype(labels["std"].dtype)
        return labels


def convert_token_bounds(spec: TeacherSpec) -> Bounds | None:
    """The bounds of the teacher's tokens in the conventions of an environment with actions in [-1, 1].

    :param spec: the teacher's
    :return: None: -1 and 1, or the teacher has no tokens
    :raises ValueError: if the teacher's bounds do not fit its actions
    """
    same = spec.gripper in (None, "-1..1") and spec.rotation_sign == 1
    if spec.n_bins is None or (spec.token_bounds is None and same):
        return None
    shape = spec.action_space.shape or ()
    unit = spaces.Box(-1.0, 1.0, shape, np.float32)
    ends = [np.asarray(end, np.float64) for end in spec.token_bounds or (unit.low, unit.high)]
    if len(shape) != 1 or any(end.shape != shape or not np.isfinite(end).all() for end in ends):
        raise ValueError(
            f"teacher {spec.name!r} has token_bounds={spec.token_bounds}: expected two rows of finite numbers, one for "
            f"each dimension of its actions {spec.action_space}"
        )
    adapter = ActionAdapter(replace(spec, action_space=unit), unit)  # also of a teacher whose actions are tokens
    return Bounds(*map(adapter.convert, ends))


def check_tokens(spec: TeacherSpec, space: spaces.Space, bounds: Bounds | None) -> None:
    """Checks that the environment's tokens stand for the same actions as the teacher's.

    :param spec: the teacher's
    :param space: the environment's actions
    :param bounds: of the environment's tokens; None: -1 and 1
    :raises ValueError: if they do not
    """
    if spec.n_bins is None or token_bins(space) is None:
        return
    theirs = convert_token_bounds(spec) or UNIT
    ours = bounds or UNIT
    if not all(np.allclose(a, b) for a, b in zip(theirs, ours)):
        raise ValueError(
            f"a token of teacher {spec.name!r} stands for another action than one of the environment: make the "
            "environment with make_env(..., tokens=True, teacher=teacher.spec), or "
            "ActionTokens(env, bounds=convert_token_bounds(spec))"
        )
