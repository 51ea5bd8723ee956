"""VecTeacher: a VecEnv that asks a teacher what it would have done. N is the number of environments."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from rpd_sb3.contract.conventions import ActionAdapter, check_tokens
from rpd_sb3.contract.teacher import INFO_PREFIX, TIMEOUT, Labels, Query, Teacher
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.labelling.pending import LazyLabel, PendingLabels, RetryPolicy, check_label_fraction
from rpd_sb3.labelling.views import (
    check_spec,
    find_instructions,
    student_keys,
    student_space,
    student_view,
    teacher_view,
)


class LabelTime(NamedTuple):
    """How long the teacher takes while training."""

    per_label: float
    """Seconds of a query over its labels, median over the last queries."""
    batch: int
    """Labels of a query, median."""


class VecTeacher(VecEnvWrapper):
    """Adds ``info["teacher_action"]`` (and other labels) to every transition: what the teacher would have done there.

    The label belongs to the observation on which the student acted, also where the episode ended and the VecEnv has
    already reset. Every observation is labelled once, while the environments step. Values are lazy:
    ``np.asarray(info["teacher_action"])`` waits for the teacher, everything else does not.

    A teacher with a memory must have answered about one observation before it is asked about the next: then a step waits
    for the answer to the step before.

    The teacher stays open when the VecEnv closes: who made it closes it.

    :param venv: environments, usually from :func:`rpd_sb3.envs.make_vec_env`
    :param teacher: who labels
    :param instruction: for teachers that want one; None: each environment's attribute ``instruction``
    :param label_fraction: share of transitions to label, drawn at random; the others carry no label
    :param timeout: seconds from the asking until an answer must be there; a failure that may pass is asked again meanwhile
    :param on_failure: what to do without one: ``raise`` a TeacherError, ``wait`` on, up to ``patience``, or ``skip`` the
        labels of that step (they become NaN)
    :param patience: seconds from the asking after which ``wait`` raises
    :param wait: give plain arrays instead of lazy values
    :param seed: of the draw behind ``label_fraction``
    :raises ValueError: if teacher and environments do not fit, or an argument is out of range
    """

    def __init__(
        self,
        venv: VecEnv,
        teacher: Teacher,
        *,
        instruction: str | None = None,
        label_fraction: float = 1.0,
        timeout: float = TIMEOUT,
        on_failure: str = "raise",
        patience: float = 600.0,
        wait: bool = False,
        seed: int = 0,
    ) -> None:
        check_spec(teacher.spec, venv.observation_space, venv.action_space)
        check_tokens(teacher.spec, venv.action_space, find_token_bounds(venv))
        self.adapter = ActionAdapter(teacher.spec, venv.action_space)
        super().__init__(venv, observation_space=student_space(venv.observation_space))
        self._policy = RetryPolicy("VecTeacher", on_failure, timeout, patience)
        if on_failure == "skip" and teacher.spec.stateful:
            raise ValueError(
                f"VecTeacher: on_failure='skip' would leave gaps in the memory of teacher {teacher.spec.name!r}; "
                "choose raise or wait"
            )
        self._instructions = find_instructions(teacher.spec, venv, instruction)
        self.teacher = teacher
        self.n_labels = 0
        """Labels asked for so far."""
        self._wait = wait
        self._n_queries = 0
        self._times: deque[tuple[float, int]] = deque(maxlen=1000)  # seconds and labels of the last queries
        self._times_lock = threading.Lock()  # the teacher's thread appends to them
        self._rng = np.random.default_rng(seed)
        self._student_keys = student_keys(venv.observation_space)
        self._inputs: dict[str, np.ndarray] = {}
        self._starts = np.ones(self.num_envs, dtype=bool)  # where a teacher with a memory starts afresh
        self._pending: PendingLabels | None = None  # of the last step
        self._current: PendingLabels | None = None  # of the current observations, if label() has asked about them
        self._asked_envs = np.zeros(0, dtype=int)
        self._was_asked = np.zeros(self.num_envs, dtype=bool)
        self.set_label_fraction(label_fraction)

    @property
    def label_latency(self) -> float | None:
        """Seconds that the last answered query took; None before the first answer."""
        return None if self._pending is None else self._pending.latency

    @property
    def label_time(self) -> LabelTime | None:
        """What the queries of the steps took; None before the first answer."""
        with self._times_lock:
            times = np.array(self._times)
        if len(times) == 0:
            return None
        return LabelTime(float(np.median(times[:, 0] / times[:, 1])), int(np.median(times[:, 1])))

    def set_label_fraction(self, fraction: float) -> None:
        """Change the share of transitions to label from the next step on; 0 asks nothing.

        :raises ValueError: outside [0, 1]
        """
        self.label_fraction = check_label_fraction(fraction)

    def reset(self) -> VecEnvObs:
        obs = self.venv.reset()
        self._starts = np.ones(self.num_envs, dtype=bool)
        self._current = None
        return self._split(obs)

    def step_async(self, actions: np.ndarray) -> None:
        self._finish_memory()
        self.venv.step_async(actions)
        self._asked_envs = self._draw()
        if self._current is not None and self.teacher.spec.stateful:  # to ask again would be one step in its memory
            self._pending = self._current
            self._asked_envs = np.arange(self.num_envs)
        else:
            self._pending = self._submit(self._asked_envs, actions) if len(self._asked_envs) else None
        self._was_asked = np.isin(np.arange(self.num_envs), self._asked_envs) | (self._current is not None)
        self._current = None

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = self.venv.step_wait()
        infos = list(infos)
        if self._student_keys is not None:
            for info in infos:
                if "terminal_observation" in info:
                    info["terminal_observation"] = student_view(info["terminal_observation"], self._student_keys)
        if self._pending is not None:
            for row, env in enumerate(self._asked_envs):
                for name in self.teacher.spec.labels:
                    label: Any = LazyLabel(self._pending, name, row)
                    infos[env][INFO_PREFIX + name] = np.asarray(label) if self._wait else label
        self._starts = np.asarray(dones, dtype=bool) | ~self._was_asked
        return self._split(obs), rewards, dones, infos

    def label(self) -> Labels:
        """Ask about the current observations and wait: for teacher roll-outs, mixing as in DAgger, evaluation.

        :return: label name to ``(N, ...)``
        :raises TeacherError: if the answer is late or unusable
        """
        self._finish_memory()
        pending = self._current = self._submit(np.arange(self.num_envs), None)
        labels = pending.get()
        if labels is None:
            labels = {
                name: np.stack([pending.row(name, i) for i in range(self.num_envs)])
                for name in self.teacher.spec.labels
            }
        return labels

    def _finish_memory(self) -> None:
        """Wait until a teacher with a memory has answered: a question that failed is asked again before the next one."""
        if self.teacher.spec.stateful and self._pending is not None:
            self._pending.get()

    def _split(self, obs: VecEnvObs) -> VecEnvObs:
        self._inputs = teacher_view(obs, self.venv.observation_space, self.teacher.spec.inputs)
        return student_view(obs, self._student_keys)

    def _draw(self) -> np.ndarray:
        if self.label_fraction == 1.0:
            return np.arange(self.num_envs)
        return np.flatnonzero(self._rng.random(self.num_envs) < self.label_fraction)

    def _submit(self, rows: np.ndarray, actions: np.ndarray | None) -> PendingLabels:
        all_rows = len(rows) == self.num_envs
        inputs = {name: value if all_rows else value[rows] for name, value in self._inputs.items()}
        if self._instructions is not None:
            inputs["instruction"] = self._instructions[rows]
        query = Query(
            inputs=inputs,
            env_ids=rows,
            episode_starts=self._starts[rows],
            actions=None if actions is None else np.array(actions)[rows],
            number=self._n_queries,
        )
        self._n_queries += 1
        self.n_labels += len(rows)

        def note(seconds: float) -> None:
            with self._times_lock:
                self._times.append((seconds, len(rows)))

        # label() is left out: no environment steps meanwhile, and the first one warms the teacher up
        return PendingLabels(self.teacher, query, self._policy, self.adapter, None if actions is None else note)
