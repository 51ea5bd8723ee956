"""How near a student's actions are to its teacher's, dimension by dimension.

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
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.episodes.play import Actor, Evaluator, student_actor, untouched_rng
from rpd_sb3.labelling.access import find_vec_teacher

CONSTANT = 1e-6
"""A range of actions below this has no correlation with anything."""


def measure_agreement(evaluator: Evaluator, model: BaseAlgorithm, n_episodes: int = 16) -> dict[str, Any] | None:
    """Compare the student's deterministic action with the teacher's, at every observation of the student's own episodes.

    Both are what is acted with: clipped, and of tokens the centres of their bins. Episodes end as in training: what comes
    after success, the student has never been taught.

    :param evaluator: whose episodes to play, and whose teacher to ask
    :param model: the student
    :param n_episodes: the first ones of the evaluator's, at most all of them
    :return: see :func:`compare`, and ``n_episodes``, ``control_mode``; None if actions have no size, as those of a Discrete space
    :raises TeacherError: if the teacher does not answer
    """
    n_episodes = min(n_episodes, evaluator.n_episodes)
    if not isinstance(model.action_space, spaces.Box) and token_bins(model.action_space) is None:
        return None
    with closing(evaluator.as_trained()) as same:
        with untouched_rng():
            venv = same.venv
        pairs = Pairs(venv, student_actor(model), n_episodes)
        same.evaluate(pairs, n_episodes)
        mode = venv.get_attr("control_mode", 0)[0] if venv.has_attr("control_mode") else None
    student, teacher, std = pairs.arrays()
    return {"n_episodes": n_episodes, "control_mode": mode} | compare(student, teacher, std)


class Pairs:
    """An :data:`~rpd_sb3.episodes.play.Actor` that plays as the student and asks the teacher about each observation.

    :param venv: N environments with a teacher
    :param act: the student
    :param n_episodes: whose observations count; those of an environment that waits for the others do not
    """

    def __init__(self, venv: VecEnv, act: Actor, n_episodes: int) -> None:
        teacher = find_vec_teacher(venv)
        assert teacher is not None, "these environments have no teacher"
        self._teacher, self._act, self._left = teacher, act, n_episodes
        self._space, self._bounds = venv.action_space, find_token_bounds(venv)
        self._n_bins = token_bins(self._space)
        self._playing = np.zeros(venv.num_envs, dtype=bool)
        self._rows: list[tuple[np.ndarray, ...]] = []

    def __call__(self, obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        if episode_starts.all():  # all begin together, and never again before all of them have ended
            self._playing = np.arange(len(episode_starts)) < self._left
            self._left -= len(episode_starts)
        else:
            self._playing &= ~episode_starts
        action = self._act(obs, episode_starts)
        labels = self._teacher.label()
        theirs = labels["action"]
        same = self._n_bins is not None and self._teacher.teacher.spec.action_space == self._space
        theirs = self._continuous(theirs) if same else self._teacher.adapter.clip(theirs)
        row = (action if self._n_bins is None else self._continuous(action), theirs, labels.get("std"))
        self._rows.append(tuple(np.array(part)[self._playing] for part in row if part is not None))
        return action

    def _continuous(self, tokens: np.ndarray) -> np.ndarray:
        assert self._n_bins is not None
        return to_clipped_actions(tokens, self._n_bins, self._bounds)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The student's actions, the teacher's, and the teacher's std if it has one, (n, A) each."""
        student, teacher, *std = (np.concatenate(parts) for parts in zip(*self._rows))
        return student, teacher, std[0] if std else None


def compare(student: np.ndarray, teacher: np.ndarray, std: np.ndarray | None = None) -> dict[str, Any]:
    """Statistics of n pairs of actions for each dimension, ready for JSON.

    :param student: ``(n, A)``
    :param teacher: ``(n, A)``
    :param std: ``(n, A)``, how sure the teacher is, if it says so
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
