"""What one looks at after a run: the learning curve and a video."""

from __future__ import annotations

from pathlib import Path

from rpd_sb3.episodes.film import Film, Stage
from rpd_sb3.episodes.play import EVAL_SEED, EvalResult, untouched_rng
from rpd_sb3.evaluate.policy_source import Player
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


def record_video(path: Path, player: Player, n_episodes: int = 3) -> str | None:
    """Film the first evaluation episodes.

    :param path: ``.mp4`` file
    :param player: who plays, and where
    :param n_episodes: how many
    :return: why there is no video; None if there is
    """
    try:
        with untouched_rng(), Film(path) as film, Stage(player, film) as stage:
            for episode in range(n_episodes):
                stage.play(EVAL_SEED + episode)
    except Exception as error:  # of renderers, encoders, teachers: nothing that a finished run should be lost for
        path.unlink(missing_ok=True)
        return " ".join(str(error).split()) or type(error).__name__
    return None
