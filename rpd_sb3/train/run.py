"""A training run from the first evaluation to the last file: model, numbers, learning curve, films."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from rpd_sb3.cli.files import write_json
from rpd_sb3.cli.interrupt import Interrupt
from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.contract.teacher import Teacher, TeacherError, sees_images
from rpd_sb3.episodes.agreement import measure_agreement
from rpd_sb3.episodes.film import Film, RenderedEnv
from rpd_sb3.episodes.play import EVAL_SEED, EvalResult, describe, preserved_rng, student_actor, teacher_actor
from rpd_sb3.labelling.access import find_vec_teacher
from rpd_sb3.train import folder as runs
from rpd_sb3.train.build import TrainingSetup
from rpd_sb3.train.callbacks import CheckpointCallback, EvalSuccessCallback, ProgressCallback
from rpd_sb3.train.cost import student_bytes, student_latency, student_parameters


class TrainingRun:
    """Trains a model and fills the run folder.

    :param setup: of :func:`rpd_sb3.train.build.build`
    """

    def __init__(self, setup: TrainingSetup) -> None:
        self.setup = setup
        self.teacher_result: EvalResult | None = None
        self._progress: ProgressCallback | None = None
        self._start_steps = setup.resumed_at or 0
        self._wall = 0.0
        self._evaluation_s = 0.0
        self._complete = False
        self._agreement: dict[str, Any] | None = None
        self._latency: dict[str, Any] | None = None

    def run(self, interrupt: Interrupt) -> int:
        """Train, evaluate, write everything down; the name of the run folder is the last line on stdout.

        :param interrupt: waits while files are written and in optimizer steps
        :return: exit code
        """
        self.interrupt = interrupt
        self._make_callbacks()
        try:
            self._train()
            self._finish()
        finally:
            self._write_down()
            print(self.setup.folder, flush=True)
        return 0

    def close(self) -> None:
        """Close environments and teachers."""
        self.setup.closing.close()

    def _make_callbacks(self) -> None:
        setup, deferred = self.setup, self.interrupt.deferred
        args, folder = setup.args, setup.folder
        self.evaluation = EvalSuccessCallback(setup.evaluator, max(args.eval_freq, 0), folder, self._report, deferred)
        self._callbacks: list[BaseCallback] = [
            self.evaluation,
            CheckpointCallback(max(args.save_freq, 0), folder, deferred),
        ]
        if sys.stdout.isatty() if args.progress is None else args.progress:
            self._progress = ProgressCallback(setup.config.n_timesteps)
            self._callbacks.append(self._progress)
        if setup.resumed_at is not None:
            self.evaluation.resume(setup.resumed_at)
        optimizer = getattr(setup.model.policy, "optimizer", None)
        if optimizer is not None:
            self.interrupt.watch(optimizer)

    def _train(self) -> None:
        """Evaluate the teacher, then learn; the model is saved whatever happens.

        :raises TeacherError: if the teacher fails
        """
        setup, model = self.setup, self.setup.model
        size = student_parameters(model)
        print(f"{self.title}: {setup.config.policy}, {size:,} parameters", flush=True)
        start = time.monotonic()
        try:
            self._evaluate_teacher()
            start = time.monotonic()
            model.learn(
                setup.config.n_timesteps - self._start_steps,
                CallbackList(self._callbacks),
                reset_num_timesteps=setup.resumed_at is None,
            )
        finally:
            self._wall = time.monotonic() - start
            self._evaluation_s = self.evaluation.duration
            with self.interrupt.deferred():
                runs.save_model(model, self.last_model)

    def _finish(self) -> None:
        """Evaluate the student at the end, measure its latency and its agreement with the teacher, film both."""
        self.evaluation.act()
        self._complete = True
        setup, teacher = self.setup, self.setup.evaluation_teacher
        setup.evaluator.close()  # its environments are not needed any more, and take memory
        self._latency = student_latency(setup.model)
        if teacher is not None:
            try:
                self._agreement = measure_agreement(setup.evaluator, setup.model)
            except TeacherError as error:
                print(f"no agreement: {error}", flush=True)
        for name, who in (("video.mp4", setup.model), ("teacher_video.mp4", teacher)):
            if setup.args.video and who is not None:
                problem = record_video(setup.folder / name, setup.args.env, setup.config.env_kwargs, who)
                if problem:
                    print(f"no {name}: {problem}", flush=True)

    def _write_down(self) -> None:
        """Write down what there is; also after an interruption."""
        if self._progress:
            self._progress.close()
        with self.interrupt.deferred():
            write_json(self.setup.folder / "result.json", self.result())
            evaluations = runs.read_evaluations(self.setup.folder)
            if evaluations is not None:
                learning_curve(self.setup.folder / "learning_curve.png", self.title, evaluations, self.teacher_result)
        self.setup.model.logger.close()
        if not self._complete:
            print(f"stopped after {self.setup.model.num_timesteps:,} steps; the model is in {self.last_model}")

    def result(self) -> dict[str, Any]:
        """The content of ``result.json``. Times, queries, ``labels_per_transition`` and ``teacher_share``, the share
        of transitions that the teacher acted on, count from ``resumed_at`` on.
        """
        setup, model = self.setup, self.setup.model
        steps = model.num_timesteps - self._start_steps
        vec_teacher = find_vec_teacher(model.env)
        queries = None if vec_teacher is None else vec_teacher.n_labels
        spec = None if setup.teacher is None else setup.teacher.spec
        label_time = None if vec_teacher is None else vec_teacher.label_time
        last = self.evaluation.last
        return {
            "algo": setup.args.algo,
            "env": setup.args.env,
            "seed": setup.args.seed,
            "complete": self._complete,
            "timesteps": model.num_timesteps,
            "resumed_at": setup.resumed_at,
            "wall_s": round(self._wall, 3),
            "evaluation_s": round(self._evaluation_s, 3),
            "fps": round(steps / self._wall, 1) if self._wall else None,
            "student": None if last is None else last.summary() | {"timesteps": self.evaluation.timesteps[-1]},
            "teacher": None if self.teacher_result is None else self.teacher_result.summary(),
            "teacher_queries": queries,
            "labels_per_transition": queries / steps if queries is not None and steps else None,
            "teacher_share": vec_teacher.n_taught / steps if vec_teacher is not None and steps else None,
            "student_parameters": student_parameters(model),
            "student_bytes": student_bytes(model),
            "teacher_parameters": None if spec is None else spec.n_parameters,
            "teacher_bytes": None if spec is None else spec.n_bytes,
            "latency_ms": self._latency,
            "teacher_latency_ms": None
            if label_time is None
            else {"median": round(1000 * label_time.per_label, 4), "batch": label_time.batch},
            "agreement": self._agreement,
        }

    @property
    def title(self) -> str:
        """Which algorithm learns where."""
        return f"{self.setup.args.algo} on {self.setup.args.env}"

    @property
    def last_model(self) -> Path:
        """Where the model is saved at the end."""
        return self.setup.folder / f"{runs.file_name(self.setup.args.env)}.zip"

    def _evaluate_teacher(self) -> None:
        setup = self.setup
        if setup.teacher is None:
            return
        self.teacher_result = setup.evaluator.teacher()
        print(f"teacher {setup.teacher.spec.name}: {describe(self.teacher_result)}", flush=True)
        obs = setup.config.env_kwargs.get("obs", "state")
        if obs == "state" and sees_images(setup.teacher.spec.inputs):
            setup.evaluator.hide_teacher()  # the student's evaluations need not render

    def _report(self, timesteps: int, result: EvalResult) -> None:
        print(f"{timesteps:>10,} steps: {describe(result)}", flush=True)


def learning_curve(path: Path, title: str, evaluations: runs.Evaluations, teacher: EvalResult | None) -> None:
    """Draw the student's evaluations over environment steps, and the teacher's as a dashed line.

    :param path: ``.png`` file
    :param title: of the figure
    :param evaluations: of the student
    :param teacher: None: no line
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, returns, _, once, _ = evaluations
    if once is None:
        level = None if teacher is None else teacher.mean_return
        mean = returns.mean(axis=1)
        low, high = mean - returns.std(axis=1), mean + returns.std(axis=1)
    else:
        level = None if teacher is None else teacher.success_once
        mean = once.mean(axis=1)
        low, high = np.array([wilson_interval(int(row.sum()), len(row)) for row in once]).T
        axes.set_ylim(-0.02, 1.02)
    (line,) = axes.plot(steps, mean, label="student")
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if teacher is not None:
        axes.axhline(level or 0.0, color="black", linestyle="--", label="teacher")
    axes.set(
        title=title, xlabel="environment steps", ylabel="return" if once is None else "success (once, 95 % Wilson)"
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
        with preserved_rng(), Film(path) as film, RenderedEnv(env_id, env_kwargs, film, make_actor, teacher) as stage:
            for episode in range(n_episodes):
                stage.play(EVAL_SEED + episode)
    except Exception as error:  # of renderers, encoders, teachers: a finished run must not be lost for it
        path.unlink(missing_ok=True)
        return " ".join(str(error).split()) or type(error).__name__
    return None
