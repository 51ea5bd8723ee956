"""Episodes of one environment on film or in a window."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs import make_env
from rpd_sb3.envs.factory import evaluation_options
from rpd_sb3.episodes.play import Actor, Episode, play
from rpd_sb3.labelling import VecTeacher

FORMATS = (".mp4", ".gif")


class Film:
    """Writes frames to an MP4 file (H.264 in yuv420p, which every browser plays) or a GIF file.

    :param path: ``.mp4`` or ``.gif`` file
    :raises ValueError: for another suffix, or if imageio is missing
    """

    render_mode = "rgb_array"

    def __init__(self, path: Path) -> None:
        if path.suffix not in FORMATS or path.is_dir():
            raise ValueError(f"{path} cannot be a film; name a file that ends in {' or '.join(FORMATS)}")
        try:
            import imageio.v2 as imageio
        except ImportError as error:
            raise ValueError("imageio is not installed: pip install imageio imageio-ffmpeg") from error
        self._imageio = imageio
        self._path = path
        self._writer: Any = None

    def __call__(self, env: gym.Env) -> None:
        """Add a frame of the environment.

        :raises ValueError: if it does not render an RGB image
        """
        frame = np.asarray(render(env))
        if not (frame.ndim == 3 and frame.shape[-1] == 3):
            raise ValueError(f"the environment renders an array of shape {frame.shape}, not an RGB image (H, W, 3)")
        if self._writer is None:
            fps = frame_rate(env)
            if self._path.suffix == ".gif":
                options: dict[str, Any] = {"duration": 1000 / fps, "loop": 0}
            else:
                options = {"fps": fps, "codec": "libx264", "pixelformat": "yuv420p", "macro_block_size": 2}
            self._writer = self._imageio.get_writer(self._path, **options)
        self._writer.append_data(frame)

    def __enter__(self) -> Film:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()


class Window:
    """Shows the environment in a window, at its own speed.

    :raises ValueError: if there is no display
    """

    render_mode = "human"

    def __init__(self) -> None:
        if sys.platform.startswith("linux") and not any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY"))):
            raise ValueError("there is no display to show a window on; film it instead, with --record FILE.mp4")
        self._due = 0.0

    def __call__(self, env: gym.Env) -> None:
        render(env)
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + 1 / frame_rate(env)


class RenderedEnv:
    """Plays seeded episodes, those of an :class:`~rpd_sb3.episodes.play.Evaluator`, in one environment that is rendered.

    :param env_id: as in :func:`rpd_sb3.envs.make_env`
    :param env_kwargs: its options
    :param viewer: called with the environment at the start of each episode and after each step
    :param make_actor: gives the policy that acts in these environments
    :param teacher: for a policy that asks it; None: there is none
    :raises ValueError: if the environment does not render, or does not fit the policy
    """

    def __init__(
        self,
        env_id: str,
        env_kwargs: dict[str, Any],
        viewer: Film | Window,
        make_actor: Callable[[VecEnv], Actor],
        teacher: Teacher | None = None,
    ) -> None:
        options = evaluation_options(env_id, env_kwargs)
        spec = None if teacher is None else teacher.spec
        try:
            env = make_env(env_id, teacher=spec, render_mode=viewer.render_mode, **options)
        except (gym.error.Error, TypeError, ImportError, RuntimeError) as error:
            raise ValueError(f"env {env_id!r} does not render: {error}") from error
        self.venv: VecEnv = DummyVecEnv([lambda: ViewedSteps(env, viewer)])
        try:
            if teacher is not None:
                self.venv = VecTeacher(self.venv, teacher, label_fraction=0.0)
            self._act = make_actor(self.venv)
        except ValueError:
            self.close()
            raise

    def play(self, seed: int) -> Episode:
        """Play the episode of that seed."""
        self.venv.seed(seed)
        (episode,) = play(self.venv, self._act)
        return episode

    def close(self) -> None:
        self.venv.close()

    def __enter__(self) -> RenderedEnv:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ViewedSteps(gym.Wrapper):
    """Calls a viewer after each step, and after each reset with a seed.

    A VecEnv resets an environment, without a seed, as soon as its episode ends: that reset is not shown.

    :param env: environment that renders
    :param viewer: called with the environment
    """

    def __init__(self, env: gym.Env, viewer: Callable[[gym.Env], None]) -> None:
        super().__init__(env)
        self._viewer = viewer

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        result = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self._viewer(self.env)
        return result

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._viewer(self.env)
        return result


def render(env: gym.Env) -> Any:
    """``env.render()``.

    :raises ValueError: if the environment does not implement it
    """
    try:
        return env.render()
    except NotImplementedError as error:
        raise ValueError(f"env {env.unwrapped} does not render: it does not implement render()") from error


def frame_rate(env: gym.Env) -> int:
    """Frames per second: the environment's steps in a second, 30 if it does not say."""
    return int(getattr(env.unwrapped, "control_freq", None) or env.metadata.get("render_fps") or 30)
