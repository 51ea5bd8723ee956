"""What one looks at after a run: the learning curve and a video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stable_baselines3.common.base_class import BaseAlgorithm

from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.episodes.film import Film, RenderedEnv
from rpd_sb3.episodes.play import EVAL_SEED, EvalResult, student_actor, teacher_actor
from rpd_sb3.episodes.rng import preserved_rng
from rpd_sb3.train.callbacks import Curve


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


def record_video(
    path: Path, env_id: str, env_kwargs: dict[str, Any], policy: BaseAlgorithm | Teacher, n_episodes: int = 3
) -> str | None:
    """Film the first evaluation episodes.

    :param path: ``.mp4`` file
    :param env_id: as in :func:`rpd_sb3.envs.make_env`
    :param env_kwargs: its options
    :param policy: the student, or the teacher
    :param n_episodes: how many
    :return: why there is no video; None if there is
    """
    teacher = None if isinstance(policy, BaseAlgorithm) else policy
    make_actor = (lambda _: student_actor(policy)) if isinstance(policy, BaseAlgorithm) else teacher_actor
    try:
        with preserved_rng(), Film(path) as film, RenderedEnv(env_id, env_kwargs, film, make_actor, teacher) as env:
            for episode in range(n_episodes):
                env.play(EVAL_SEED + episode)
    except Exception as error:  # of renderers, encoders, teachers: nothing that a finished run should be lost for
        path.unlink(missing_ok=True)
        return " ".join(str(error).split()) or type(error).__name__
    return None
