"""Small real parts for tests: an environment whose observation tells what happened, teachers that echo it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec

ACTION_SPACE = spaces.Box(-1.0, 1.0, (2,), np.float32)


class CountingEnv(gym.Env):
    """Observation: (environment number, episode, step). Episodes end after ``length`` steps; reward is ``reward(action)``."""

    def __init__(
        self,
        number: int = 0,
        length: int = 3,
        teacher_view: bool = False,
        reward: Callable[[np.ndarray], float] = lambda action: 0.0,
    ) -> None:
        self.number, self.length, self.reward = number, length, reward
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.teacher_view = teacher_view
        self.observation_space = spaces.Dict({"state": box, "teacher/state": box}) if teacher_view else box
        self.action_space = ACTION_SPACE
        self.episode, self.t = -1, 0

    def _obs(self) -> Any:
        obs = np.array([self.number, self.episode, self.t], np.float32)
        return {"state": obs, "teacher/state": obs * 1} if self.teacher_view else obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self._obs(), self.reward(action), self.t >= self.length, False, {"here": self._obs()}


class EchoTeacher(LocalTeacher):
    """Its action is a function of the observation: by default its last two values."""

    def __init__(self, answer: Callable[[Query], Any] | None = None, space: spaces.Space = ACTION_SPACE) -> None:
        super().__init__()
        self.spec = TeacherSpec("echo", frozenset({"action"}), ("state",), space)
        self.queries: list[Query] = []
        self._answer = answer or (lambda query: query.inputs["state"][:, 1:3])

    def label(self, query: Query) -> Labels:
        self.queries.append(query)
        return {"action": self._answer(query)}


class SilentTeacher(EchoTeacher):
    """Never answers."""

    def submit(self, query: Query) -> Future[Labels]:
        return Future()
