"""An arm that does nothing but remember how it was asked to move, and a teacher with conventions of its own.

``tests.support.arm_env:Arm-v0`` for Gymnasium, ``tests.support.arm_env:ArmTeacher`` for the command line.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.bins import N_BINS, Bounds, to_actions
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec

UNIT_BOX = spaces.Box(-1.0, 1.0, (7,), np.float32)
GRIPPER_FROM_0 = spaces.Box(np.array([-1] * 6 + [0], np.float32), np.ones(7, np.float32))
LOW = (-0.5, -2.0, 0.1, -0.3, -0.4, -0.5, -1.0)
HIGH = (0.5, 1.5, 0.7, 0.2, 0.4, 1.5, 1.0)
"""What the ends of the teacher's bins stand for: some lie outside of what the arm can do, the gripper is not normalised."""


class ArmEnv(gym.Env):
    """Observation: (episode's number, step). Seven dimensions of action, of which three turn and the last one grips.

    :param space: of the actions
    :param length: steps of an episode
    """

    def __init__(self, space: spaces.Box = UNIT_BOX, length: int = 5, render_mode: str | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        self.action_space, self.length = space, length
        self.acted: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number, self.t = self.np_random.integers(1000), 0
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.array([self.number, self.t], np.float32)

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.acted.append(np.array(action))
        self.t += 1
        return self._obs(), 0.0, self.t == self.length, False, {}


def right_tokens(states: np.ndarray) -> np.ndarray:
    """What the teacher wants in states (N, 2): tokens (N, 7)."""
    return np.stack([np.random.default_rng(row.astype(int)).integers(0, N_BINS - 1, 7) for row in states])


class ArmTeacher(LocalTeacher):
    """Gives the actions of :func:`right_tokens` as a dataset's statistics have them, and logits.

    Its gripper is 0 (closed) to 1 (open), and it turns the other way than the arm does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.spec = TeacherSpec(
            "arm",
            frozenset({"action", "logits"}),
            ("state",),
            UNIT_BOX,
            n_bins=N_BINS,
            gripper="0..1",
            rotation_sign=-1,
            token_bounds=(LOW, HIGH),
        )

    def label(self, query: Query) -> Labels:
        tokens = right_tokens(query.inputs["state"])
        action = to_actions(tokens, N_BINS, Bounds(np.array(LOW), np.array(HIGH)))
        return {"action": action, "logits": (10 * np.eye(N_BINS)[tokens]).astype(np.float32)}


gym.register("Arm-v0", ArmEnv)
ARM = "tests.support.arm_env:Arm-v0"
