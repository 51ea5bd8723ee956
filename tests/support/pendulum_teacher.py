"""A teacher for Pendulum-v1 that a command line can name: ``tests.support.pendulum_teacher:PendulumTeacher``."""

from __future__ import annotations

import numpy as np
from gymnasium import spaces

from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec


class PendulumTeacher(LocalTeacher):
    """Pushes against the velocity."""

    def __init__(self) -> None:
        super().__init__()
        torque = spaces.Box(-2.0, 2.0, (1,), np.float32)
        self.spec = TeacherSpec("pendulum", frozenset({"action"}), ("state",), torque)

    def label(self, query: Query) -> Labels:
        return {"action": np.clip(-query.inputs["state"][:, 2:], -2.0, 2.0)}
