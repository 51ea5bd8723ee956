"""TeacherWrapper: one Gymnasium environment that asks a teacher what it would have done."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from rpd_sb3.contract.conventions import ActionAdapter, check_tokens
from rpd_sb3.contract.teacher import INFO_PREFIX, TIMEOUT, Labels, Query, Teacher
from rpd_sb3.labelling.pending import PendingLabels, RetryPolicy, check_label_fraction
from rpd_sb3.labelling.views import (
    check_instructions,
    check_spec,
    student_keys,
    student_space,
    student_view,
    teacher_view,
)


class TeacherWrapper(gym.Wrapper):
    """Adds ``info["teacher_action"]`` (and other labels) to every step: what the teacher would have done there.

    Synchronous; for many environments use :class:`rpd_sb3.labelling.VecTeacher`, which labels them in one batch.

    :param env: any Gymnasium environment
    :param teacher: who labels
    :param instruction: for teachers that want one; None: the environment's attribute ``instruction``
    :param timeout: seconds from the asking until an answer must be there; a failure that may pass is asked again meanwhile
    :param on_failure: what to do without one: ``raise`` a TeacherError, or ``wait`` on, up to ``patience``
    :param patience: seconds from the asking after which ``wait`` raises
    :param seed: of the draw behind the label fraction; None: that of :meth:`reset`, whenever it gets one
    :raises ValueError: if teacher and environment do not fit, or an argument is out of range
    """

    def __init__(
        self,
        env: gym.Env,
        teacher: Teacher,
        *,
        instruction: str | None = None,
        timeout: float = TIMEOUT,
        on_failure: str = "raise",
        patience: float = 600.0,
        seed: int | None = None,
    ) -> None:
        if on_failure == "skip":
            raise ValueError("TeacherWrapper: on_failure='skip' is for VecTeacher; choose raise or wait")
        check_spec(teacher.spec, env.observation_space, env.action_space)
        bounds = env.get_wrapper_attr("token_bounds") if env.has_wrapper_attr("token_bounds") else None
        check_tokens(teacher.spec, env.action_space, bounds)
        self.adapter = ActionAdapter(teacher.spec, env.action_space)
        super().__init__(env)
        if instruction is None and env.has_wrapper_attr("instruction"):
            instruction = env.get_wrapper_attr("instruction")
        self._instructions = check_instructions(teacher.spec, [instruction])
        self.teacher = teacher
        self.n_labels = 0
        """Labels asked for so far."""
        self.label_fraction = 1.0
        self._policy = RetryPolicy("TeacherWrapper", on_failure, timeout, patience)
        self._n_queries = 0
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._student_keys = student_keys(env.observation_space)
        self._inputs: dict[str, np.ndarray] = {}
        self._starts = True  # a teacher with a memory starts afresh
        self._current: Labels | None = None  # what label() was told about the current observation
        self.observation_space = student_space(env.observation_space)

    def label_names(self) -> frozenset[str]:
        """Labels that the teacher gives."""
        return self.teacher.spec.labels

    def set_label_fraction(self, fraction: float) -> None:
        """Change the share of steps to label; 0 asks nothing.

        :raises ValueError: outside [0, 1]
        """
        self.label_fraction = check_label_fraction(fraction)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None and self._seed is None:
            self._rng = np.random.default_rng([seed, 1])  # the environment has the seed's own numbers
        obs, info = self.env.reset(seed=seed, options=options)
        self._starts = True
        self._current = None
        return self._split(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        asked = self.label_fraction == 1.0 or self._rng.random() < self.label_fraction
        looked_at = self._current is not None
        if self._current is not None and self.teacher.spec.stateful:  # to ask again would be one step in its memory
            labels = self._current
        else:
            labels = self.label(action) if asked else {}
        self._current = None
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._starts = not (asked or looked_at)  # a teacher's memory has a gap where it was not asked
        info = info | {INFO_PREFIX + name: value[0] for name, value in labels.items()}
        return self._split(obs), reward, terminated, truncated, info

    def label(self, action: Any = None) -> Labels:
        """Ask about the current observation and wait.

        :param action: what the student does there, if it has decided
        :return: label name to ``(1, ...)``
        :raises TeacherError: if the answer is late or unusable
        """
        extra = {} if self._instructions is None else {"instruction": self._instructions}
        query = Query(
            inputs=self._inputs | extra,
            env_ids=np.zeros(1, dtype=int),
            episode_starts=np.array([self._starts]),
            actions=None if action is None else np.asarray(action)[None],
            number=self._n_queries,
        )
        self._n_queries += 1
        self.n_labels += 1
        self._current = PendingLabels(self.teacher, query, self._policy, self.adapter).get()
        assert self._current is not None, "labels of one environment are not skipped"
        return self._current

    def _split(self, obs: Any) -> Any:
        batch = {k: v[None] for k, v in obs.items()} if isinstance(obs, dict) else np.asarray(obs)[None]
        self._inputs = teacher_view(batch, self.env.observation_space, self.teacher.spec.inputs)
        return student_view(obs, self._student_keys)
