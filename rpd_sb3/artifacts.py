"""What one looks at after a run: the learning curve and a video."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from rpd_sb3.callbacks import Curve
from rpd_sb3.envs import make_env
from rpd_sb3.envs.factory import evaluation_options
from rpd_sb3.evaluation import EVAL_SEED, Actor, EvalResult


def learning_curve(path: Path, title: str, curve: Curve, teacher: EvalResult | None) -> None:
    """Draw the student's evaluations over environment steps, and the teacher's as a dashed line.

    :param path: ``.png`` file
    :param title: of the figure
    :param curve: of the student
    :param teacher: None: no line
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    (line,) = axes.plot(curve.timesteps, curve.mean, label="student")
    axes.fill_between(curve.timesteps, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
    if teacher is not None:
        level = teacher.success_once if curve.is_success else teacher.mean_return
        axes.axhline(level or 0.0, color="black", linestyle="--", label="teacher")
    if curve.is_success:
        axes.set_ylim(-0.02, 1.02)
    axes.set(
        title=title, xlabel="environment steps", ylabel="success (once, 95 % Wilson)" if curve.is_success else "return"
    )
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def record_video(path: Path, act: Actor, env_id: str, env_kwargs: Mapping[str, Any], n_episodes: int = 3) -> str | None:
    """Film the first evaluation episodes.

    :param path: ``.mp4`` file
    :param act: who plays
    :param env_id: as in :func:`rpd_sb3.envs.make_env`
    :param env_kwargs: its options
    :param n_episodes: how many
    :return: why there is no video; None if there is
    """
    try:
        import imageio.v2 as imageio
    except ImportError:
        return "imageio is not installed"
    try:
        env = make_env(env_id, render_mode="rgb_array", **evaluation_options(env_id, env_kwargs))
    except (gym.error.Error, TypeError, ImportError) as error:
        return f"env {env_id!r} does not render: {error}"
    try:
        first = _frame(env, reset_seed=EVAL_SEED)
        if not (first.ndim == 3 and first.shape[-1] == 3):
            return f"env {env_id!r} renders something of shape {first.shape}"
        with imageio.get_writer(path, fps=_frame_rate(env), macro_block_size=2) as writer:
            for episode in range(n_episodes):
                _film(env, act, writer, EVAL_SEED + episode)
    except (gym.error.Error, ImportError) as error:
        return f"env {env_id!r} does not render: {error}"
    finally:
        env.close()
    return None


def _film(env: gym.Env, act: Actor, writer: Any, seed: int) -> None:
    obs, _ = env.reset(seed=seed)
    start = np.ones(1, dtype=bool)
    done = False
    writer.append_data(_frame(env))
    while not done:
        batch = {k: v[None] for k, v in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
        obs, _, terminated, truncated, _ = env.step(act(batch, start)[0])
        start = np.zeros(1, dtype=bool)
        done = terminated or truncated
        writer.append_data(_frame(env))


def _frame(env: gym.Env, reset_seed: int | None = None) -> np.ndarray:
    if reset_seed is not None:
        env.reset(seed=reset_seed)
    return np.asarray(env.render())


def _frame_rate(env: gym.Env) -> int:
    return int(getattr(env.unwrapped, "control_freq", None) or env.metadata.get("render_fps") or 30)
