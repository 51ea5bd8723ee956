"""A training run from its first evaluation to its last file."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList

from rpd_sb3.cli.common import Interrupt
from rpd_sb3.contract.teacher import TeacherError
from rpd_sb3.episodes.agreement import measure_agreement
from rpd_sb3.episodes.play import EvalResult, describe
from rpd_sb3.train import folder as runs
from rpd_sb3.train.artifacts import learning_curve, record_video
from rpd_sb3.train.build import Session
from rpd_sb3.train.callbacks import CheckpointCallback, EvalSuccessCallback, ProgressCallback
from rpd_sb3.train.measurements import student_bytes, student_latency, student_parameters


class Trainer:
    """Trains the model of a session and fills its run folder.

    :param session: what to train
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.teacher: EvalResult | None = None
        self._progress: ProgressCallback | None = None
        self._start_steps = session.resumed_at or 0
        self._wall = 0.0
        self._evaluation_s = 0.0
        self._complete = False
        self._agreement: dict[str, Any] | None = None
        self._latency: dict[str, Any] | None = None

    def run(self, interrupt: Interrupt) -> int:
        """Train, evaluate, write everything down; the name of the run folder is the last line on stdout.

        :param interrupt: told what must not be interrupted
        """
        self.interrupt = interrupt
        self._make_callbacks()
        try:
            self._train()
            self._finish()
        finally:
            self._write_down()
            print(self.session.folder, flush=True)
        return 0

    def close(self) -> None:
        self.session.close()

    def _make_callbacks(self) -> None:
        session, interrupt = self.session, self.interrupt
        args, folder = session.args, session.folder
        self.evaluation = EvalSuccessCallback(
            session.evaluator, max(args["eval_freq"], 0), folder, self._report, interrupt.deferred
        )
        self._callbacks: list[BaseCallback] = [
            self.evaluation,
            CheckpointCallback(max(args["save_freq"], 0), folder, interrupt.deferred),
        ]
        if sys.stdout.isatty() if args["progress"] is None else args["progress"]:
            self._progress = ProgressCallback(session.config.n_timesteps)
            self._callbacks.append(self._progress)
        if session.resumed_at is not None:
            self.evaluation.resume(session.resumed_at)
        optimizer = getattr(session.model.policy, "optimizer", None)
        if optimizer is not None:
            interrupt.watch(optimizer)

    def _train(self) -> None:
        """Evaluate the teacher, then learn; the model is saved whatever happens.

        :raises TeacherError: if the teacher fails
        """
        session, model = self.session, self.session.model
        size = student_parameters(model)
        print(f"{session.args['algo']} on {session.env_id}: {session.config.policy}, {size:,} parameters", flush=True)
        start = time.monotonic()
        try:
            self._evaluate_teacher()
            start = time.monotonic()
            model.learn(
                session.config.n_timesteps - self._start_steps,
                CallbackList(self._callbacks),
                reset_num_timesteps=session.resumed_at is None,
            )
        finally:
            self._wall, self._evaluation_s = time.monotonic() - start, self.evaluation.duration
            with self.interrupt.deferred():
                runs.save_model(model, self.last_model)

    def _finish(self) -> None:
        """The last evaluation, and what the report tells of student and teacher."""
        self.evaluation.act()
        self._complete = True
        session, teacher = self.session, self.session.evaluation_teacher
        session.evaluator.close()  # its environments are not needed any more, and take memory
        self._latency = student_latency(session.model)
        if teacher is not None:
            try:
                self._agreement = measure_agreement(session.evaluator, session.model)
            except TeacherError as error:
                print(f"no agreement: {error}", flush=True)
        for name, who in (("video.mp4", session.model), ("teacher_video.mp4", teacher)):
            if session.args["video"] and who is not None:
                problem = record_video(session.folder / name, session.env_id, session.config.env_kwargs, who)
                if problem:
                    print(f"no {name}: {problem}", flush=True)

    def _write_down(self) -> None:
        """Write down what there is; also after an interruption."""
        if self._progress:
            self._progress.close()
        with self.interrupt.deferred():
            runs.write_json(self.session.folder / "result.json", self.result())
            if self.evaluation.timesteps:
                title = f"{self.session.args['algo']} on {self.session.env_id}"
                learning_curve(self.session.folder / "learning_curve.png", title, self.evaluation.curve(), self.teacher)
        self.session.model.logger.close()
        if not self._complete:
            print(f"stopped after {self.session.model.num_timesteps:,} steps; the model is in {self.last_model}")

    def result(self) -> dict[str, Any]:
        """The content of ``result.json``. Times, queries and ``labels_per_transition`` count from ``resumed_at`` on."""
        session, model = self.session, self.session.model
        steps = model.num_timesteps - self._start_steps
        vec_teacher = session.vec_teacher
        queries = None if vec_teacher is None else vec_teacher.n_labels
        spec = None if session.teacher is None else session.teacher.spec
        label_time = None if vec_teacher is None else vec_teacher.label_time
        last = self.evaluation.last
        return {
            "algo": session.args["algo"],
            "env": session.env_id,
            "seed": session.args["seed"],
            "complete": self._complete,
            "timesteps": model.num_timesteps,
            "resumed_at": session.resumed_at,
            "wall_s": round(self._wall, 3),
            "evaluation_s": round(self._evaluation_s, 3),
            "fps": round(steps / self._wall, 1) if self._wall else None,
            "student": None if last is None else last.summary() | {"timesteps": self.evaluation.timesteps[-1]},
            "teacher": None if self.teacher is None else self.teacher.summary(),
            "teacher_queries": queries,
            "labels_per_transition": queries / steps if queries is not None and steps else None,
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
    def last_model(self) -> Path:
        """Where the model is saved at the end."""
        return self.session.folder / f"{runs.file_name(self.session.env_id)}.zip"

    def _evaluate_teacher(self) -> None:
        session = self.session
        if session.teacher is None:
            return
        self.teacher = session.evaluator.teacher()
        print(f"teacher {session.teacher.spec.name}: {describe(self.teacher)}", flush=True)
        obs = session.config.env_kwargs.get("obs", "state")
        if obs == "state" and any(name.startswith("images.") for name in session.teacher.spec.inputs):
            session.evaluator.hide_teacher()  # the student's evaluations need not render

    def _report(self, timesteps: int, result: EvalResult) -> None:
        print(f"{timesteps:>10,} steps: {describe(result)}", flush=True)
