"""How near a student's actions are to its teacher's, for each action dimension.

Shape letters: N environments, A action dimensions, n observations.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.contract.bins import to_clipped_actions, token_bins
from rpd_sb3.contract.teacher import Labels
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.episodes.play import Actor, Evaluator, Step, student_actor
from rpd_sb3.episodes.rng import preserved_rng
from rpd_sb3.labelling.access import find_vec_teacher

CONSTANT = 1e-6
"""Actions with a smaller range count as constant: they have no correlation."""


def measure_agreement(evaluator: Evaluator, model: BaseAlgorithm, n_episodes: int = 16) -> dict[str, Any] | None:
    """Compare the student's deterministic action with the teacher's, at every observation of the student's own episodes.

    Both are compared as the environment executes them: clipped, tokens as the centres of their bins. Episodes end as in
    training, because the student has never been taught what to do after success.

    :param evaluator: gives the episodes and the teacher
    :param model: the student
    :param n_episodes: the first ones of the evaluator's, at most all of them
    :return: see :func:`compare`, and ``n_episodes``, ``control_mode``; None if differences of actions mean nothing, as in a
        Discrete space
    :raises TeacherError: if the teacher does not answer
    """
    n_episodes = min(n_episodes, evaluator.n_episodes)
    if not isinstance(model.action_space, spaces.Box) and token_bins(model.action_space) is None:
        return None
    with closing(evaluator.with_training_ends()) as same:
        with preserved_rng():
            venv = same.venv
        pairs = Pairs(venv, student_actor(model))
        same.evaluate(pairs.act, n_episodes, pairs.on_step)
        mode = venv.get_attr("control_mode", 0)[0] if venv.has_attr("control_mode") else None
    student, teacher, std = pairs.arrays()
    return {"n_episodes": n_episodes, "control_mode": mode} | compare(student, teacher, std)


class Pairs:
    """Pairs of actions, the student's and the teacher's, while the student plays.

    :meth:`act` and :meth:`on_step` go to :meth:`~rpd_sb3.episodes.play.Evaluator.evaluate`.

    :param venv: N environments with a teacher
    :param student: gives the actions that are executed
    """

    def __init__(self, venv: VecEnv, student: Actor) -> None:
        teacher = find_vec_teacher(venv)
        assert teacher is not None, "these environments have no teacher"
        self._student = student
        self._teacher = teacher
        self._bounds = find_token_bounds(venv)
        self._n_bins = token_bins(venv.action_space)
        self._teacher_gives_tokens = self._n_bins is not None and teacher.teacher.spec.action_space == venv.action_space
        self._labels: Labels = {}
        self._rows: list[tuple[np.ndarray, ...]] = []

    def act(self, obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        """The student's actions; the teacher labels the same observations."""
        actions = self._student(obs, episode_starts)
        self._labels = self._teacher.label()
        return actions

    def on_step(self, step: Step) -> None:
        """Keep the actions of the episodes that count."""
        student = step.actions if self._n_bins is None else self._continuous(step.actions)
        teacher = self._labels["action"]
        teacher = self._continuous(teacher) if self._teacher_gives_tokens else self._teacher.adapter.clip(teacher)
        row = (student, teacher, self._labels.get("std"))
        self._rows.append(tuple(np.array(part)[step.playing] for part in row if part is not None))

    def _continuous(self, tokens: np.ndarray) -> np.ndarray:
        assert self._n_bins is not None
        return to_clipped_actions(tokens, self._n_bins, self._bounds)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The student's actions, the teacher's, and the teacher's std if it has one, ``(n, A)`` each."""
        student, teacher, *std = (np.concatenate(parts) for parts in zip(*self._rows))
        return student, teacher, std[0] if std else None


def compare(student: np.ndarray, teacher: np.ndarray, std: np.ndarray | None = None) -> dict[str, Any]:
    """Statistics of n pairs of actions for each dimension, ready for JSON.

    :param student: ``(n, A)``
    :param teacher: ``(n, A)``
    :param std: ``(n, A)``, the teacher's label ``std``, if it gives one
    :return: ``n_observations``, and lists of A numbers: ``mean_abs_difference`` and ``bias`` (student - teacher),
        ``teacher_std`` and ``student_std`` over the observations, ``correlation`` (None where either is constant),
        ``teacher_label_std``, the mean of ``std`` (None without)
    """
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    difference = student - teacher
    varies = (np.ptp(student, axis=0) > CONSTANT) & (np.ptp(teacher, axis=0) > CONSTANT)
    return {
        "n_observations": len(student),
        "mean_abs_difference": np.abs(difference).mean(axis=0).tolist(),
        "bias": difference.mean(axis=0).tolist(),
        "teacher_std": teacher.std(axis=0).tolist(),
        "student_std": student.std(axis=0).tolist(),
        "correlation": [
            float(np.corrcoef(student[:, i], teacher[:, i])[0, 1]) if varies[i] else None for i in range(len(varies))
        ],
        "teacher_label_std": None if std is None else std.astype(np.float64).mean(axis=0).tolist(),
    }
