"""A small Gymnasium environment that worker processes can make: ``tests.support.tiny_env:Tiny-v0``. Importing registers it."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class TinyEnv(gym.Env):
    """Go to a random goal on a line: observation (position, goal), action velocity, success within 0.2.

    :param stop: end the episode at the first success; else after ``length`` steps, so that success may be lost again
    :param noise: move a little at random, with NumPy's global generator as careless environments do
    :param image: show nothing but an image, channels last
    :param signal_at: send this process SIGINT at that step, counted over all episodes
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        length: int = 10,
        stop: bool = False,
        noise: bool = False,
        image: bool = False,
        signal_at: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.length, self.stop, self.noise, self.signal_at = length, stop, noise, signal_at
        self.image, self.render_mode = image, render_mode
        self.observation_space: spaces.Space = spaces.Box(-10.0, 10.0, (2,), np.float32)
        if image:
            self.observation_space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self.position = self.goal = 0.0
        self.t = self.steps = 0

    def _obs(self) -> np.ndarray:
        if self.image:
            return np.full((36, 40, 3), int(128 + 10 * self.position), np.uint8)
        return np.array([self.position, self.goal], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.position, self.goal = self.np_random.uniform(-1.0, 1.0, 2)
        self.t = 0
        return self._obs(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.position += 0.3 * float(action[0])
        if self.noise:
            self.position += 0.01 * np.random.normal()  # noqa: NPY002
        self.t += 1
        self.steps += 1
        if self.steps == self.signal_at:
            os.kill(os.getpid(), signal.SIGINT)
        success = abs(self.position - self.goal) < 0.2
        return self._obs(), float(success), success and self.stop, self.t >= self.length, {"is_success": success}

    def render(self) -> Any:
        image = np.zeros((16, 32, 3), np.uint8)
        image[:, int(np.clip(16 + 8 * self.position, 0, 31))] = 255
        return image


gym.register("Tiny-v0", TinyEnv)
TINY = "tests.support.tiny_env:Tiny-v0"
