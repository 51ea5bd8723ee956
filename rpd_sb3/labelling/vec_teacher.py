"""VecTeacher: a VecEnv that asks a teacher what it would have done. N is the number of environments."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from rpd_sb3.contract.bins import to_tokens, token_bins
from rpd_sb3.contract.conventions import ActionAdapter, check_tokens
from rpd_sb3.contract.teacher import (
    EXECUTED_ACTION,
    INFO_PREFIX,
    TEACHER_ACTED,
    TEACHERS_EPISODE,
    TIMEOUT,
    Labels,
    Query,
    Teacher,
)
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.envs.worker_pool import PendingRows, WorkerPoolVecEnv
from rpd_sb3.labelling.pending import LazyLabel, PendingLabels, RetryPolicy, check_label_fraction
from rpd_sb3.labelling.take_over import TakeOvers, steps_of_the_limit
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


class Asked(NamedTuple):
    """Questions about the observations of some environments."""

    pending: PendingLabels
    envs: np.ndarray
    """(n,) the environment of each question."""


class VecTeacher(VecEnvWrapper):
    """Adds ``info["teacher_action"]`` (and other labels) to every transition: what the teacher would have done there.

    The label belongs to the observation on which the student acted, also where the episode ended and the VecEnv has
    already reset. Every observation is labelled once, while the environments step. Values are lazy:
    ``np.asarray(info["teacher_action"])`` waits for the teacher, everything else does not.

    With a ``teacher_share`` the teacher also acts: the student begins every episode, and in that share of them the teacher
    takes over at a random step and finishes it. Its action is the label of that transition, asked for as soon as the
    observation is there, and ``info["teacher_acted"]`` says where the environment got it instead of the student's. Only
    algorithms that read this may be trained on such transitions: those of this library.

    A teacher with a memory must have answered about one observation before it is asked about the next: then a question waits
    for the answer to the one before.

    The teacher stays open when the VecEnv closes: who made it closes it.

    :param venv: environments, usually from :func:`rpd_sb3.envs.make_vec_env`
    :param teacher: who labels
    :param instruction: for teachers that want one; None: each environment's attribute ``instruction``
    :param label_fraction: share of the student's transitions to label, drawn at random; the others carry no label
    :param teacher_share: share of the episodes that the teacher finishes
    :param take_over_steps: the teacher takes over at a step drawn uniformly from 0 to ``take_over_steps - 1``; None: 90 % of
        the environments' time limit
    :param take_over_at_start: share of the take-overs that come at step 0 instead
    :param timeout: seconds from the asking until an answer must be there; a failure that may pass is asked again meanwhile
    :param on_failure: what to do without one: ``raise`` a TeacherError, ``wait`` on, up to ``patience``, or ``skip`` the
        labels of that step (they become NaN, and where the teacher was to act the student does)
    :param patience: seconds from the asking after which ``wait`` raises
    :param wait: give plain arrays instead of lazy values
    :param seed: of the draws behind ``label_fraction`` and ``teacher_share``
    :raises ValueError: if teacher and environments do not fit, or an argument is out of range
    """

    def __init__(
        self,
        venv: VecEnv,
        teacher: Teacher,
        *,
        instruction: str | None = None,
        label_fraction: float = 1.0,
        teacher_share: float = 0.0,
        take_over_steps: int | None = None,
        take_over_at_start: float = 0.3,
        timeout: float = TIMEOUT,
        on_failure: str = "raise",
        patience: float = 600.0,
        wait: bool = False,
        seed: int = 0,
    ) -> None:
        check_spec(teacher.spec, venv.observation_space, venv.action_space)
        self._token_bounds = find_token_bounds(venv)
        check_tokens(teacher.spec, venv.action_space, self._token_bounds)
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
        self.n_taught = 0
        """Transitions so far in which the teacher acted."""
        self._wait = wait
        self._n_queries = 0
        self._times: deque[tuple[float, int]] = deque(maxlen=1000)  # seconds and labels of the last queries
        self._times_lock = threading.Lock()  # the teacher's thread appends to them
        self._rng = np.random.default_rng(seed)
        self._student_keys = student_keys(venv.observation_space)
        self._inputs: dict[str, np.ndarray] = {}
        self._starts = np.ones(self.num_envs, dtype=bool)  # where a teacher with a memory starts afresh
        self._was_asked = np.zeros(self.num_envs, dtype=bool)  # about the current observation
        self._last: PendingLabels | None = None  # query
        self._current: list[Asked] = []  # about the current observations; no environment is in two of them
        self._of_step: list[Asked] = []  # about the observations of the step that is being made
        self._marks: list[dict[str, Any]] | None = None  # for the infos of that step: where the teacher acts
        self._pool = venv if isinstance(venv, WorkerPoolVecEnv) else None
        self._turns: list[PendingRows] = []  # of the step that is being made; none if it is made at once
        self._take_overs = TakeOvers(self.num_envs, take_over_steps, take_over_at_start, seed)
        self.set_label_fraction(label_fraction)
        self.set_teacher_share(teacher_share)

    @property
    def label_latency(self) -> float | None:
        """Seconds that the last answered query took; None before the first answer."""
        return None if self._last is None else self._last.latency

    @property
    def label_time(self) -> LabelTime | None:
        """What the queries of the steps took; None before the first answer."""
        with self._times_lock:
            times = np.array(self._times)
        if len(times) == 0:
            return None
        return LabelTime(float(np.median(times[:, 0] / times[:, 1])), int(np.median(times[:, 1])))

    @property
    def teacher_share(self) -> float:
        """Share of the episodes that the teacher finishes."""
        return self._take_overs.share

    def set_label_fraction(self, fraction: float) -> None:
        """Change the share of the student's transitions to label from the next step on; 0 asks nothing.

        :raises ValueError: outside [0, 1]
        """
        self.label_fraction = check_label_fraction(fraction)

    def set_teacher_share(self, share: float) -> None:
        """Change the share of episodes that the teacher finishes, from those on that have not made a step.

        :raises ValueError: outside [0, 1], or if the teacher cannot act in these environments
        """
        if share > 0.0:
            self.check_can_act()
        self._take_overs.set_share(share)

    def check_can_act(self) -> None:
        """Check that the teacher can act in these environments.

        :raises ValueError: if it gives no action, or the environments have no time limit and there is no ``take_over_steps``
        """
        spec = self.teacher.spec
        if "action" not in spec.labels:
            raise ValueError(
                f"teacher_share: teacher {spec.name!r} cannot act: it gives the labels {sorted(spec.labels)} and no 'action'"
            )
        if self._take_overs.steps is None:
            self._take_overs.steps = steps_of_the_limit(self.venv)
        if self._take_overs.steps is None:
            raise ValueError(
                "teacher_share: the environments have no time limit that take_over_steps=None could go by; give VecTeacher "
                "the number of steps within which the teacher is to take over, e.g. take_over_steps=45"
            )

    def reset(self) -> VecEnvObs:
        obs = self.venv.reset()
        self._starts[:] = True
        self._was_asked[:] = False
        self._current, self._turns = [], []
        self._take_overs.begin(np.arange(self.num_envs))
        return self._split(obs)

    def step_async(self, actions: np.ndarray) -> None:
        due = self._take_overs.due
        self._ask_where(due)
        drawn = self._draw()
        students = drawn[~self._was_answered()[drawn]]
        executed = np.array(actions) if due.any() else actions
        acted = np.zeros(self.num_envs, dtype=bool)
        self._turns = []
        turns = self._make_turns(due)
        for envs in turns:
            self._let_act(envs[due[envs]], executed, acted)
            if self._pool is None or len(turns) == 1:
                self.venv.step_async(executed)
            else:
                self._turns.append(self._pool.step_rows_async(envs, executed[envs]))
            if envs is turns[0] and len(students):
                self._ask(students, self._inputs_of(students), actions)
        self._of_step, self._current = self._current, []
        self._mark(executed, acted)

    def step_wait(self) -> VecEnvStepReturn:
        if self._turns:
            obs, rewards, dones, infos = self._wait_for_turns()
        else:
            obs, rewards, dones, infos = self.venv.step_wait()
            infos = list(infos)
            self._advance(np.arange(self.num_envs), np.asarray(dones, dtype=bool))
        self._complete(infos)
        student_obs = self._split(obs)
        self._ask_where(self._take_overs.due)
        return student_obs, rewards, dones, infos

    def label(self) -> Labels:
        """Ask about the current observations and wait: for teacher roll-outs, mixing as in DAgger, evaluation.

        What was asked already is not asked again: where the teacher is to act, and by a second call if it has a memory.

        :return: label name to ``(N, ...)``
        :raises TeacherError: if the answer is late or unusable
        """
        answers = list(self._current)
        missing = np.flatnonzero(~self._was_answered())
        if len(missing):
            answers.append(self._submit(missing, self._inputs_of(missing), None, timed=False))
        if self.teacher.spec.stateful:  # to ask again would be one step in its memory
            self._current = answers
        rows = {env: (asked.pending, row) for asked in answers for row, env in enumerate(asked.envs.tolist())}
        return {
            name: np.stack([rows[env][0].row(name, rows[env][1]) for env in range(self.num_envs)])
            for name in self.teacher.spec.labels
        }

    def to_env_actions(self, actions: np.ndarray) -> np.ndarray:
        """Actions of the teacher as the environments take them: within their bounds, or as tokens.

        :param actions: ``(n, ...)`` label ``action``
        """
        actions, space = self.adapter.clip(actions), self.venv.action_space
        n_bins = None if self.teacher.spec.action_space == space else token_bins(space)
        return actions if n_bins is None else to_tokens(actions, n_bins, self._token_bounds)

    def _make_turns(self, due: np.ndarray) -> list[np.ndarray]:
        """The environments in the turns in which they step.

        Where the teacher acts, one half steps while it decides on the other. Those that need not wait for it come first,
        then those that it was asked about first.

        :param due: ``(N,)`` bool: where the teacher is to act
        """
        if self._pool is None or not due.any():
            return [np.arange(self.num_envs)]
        order = np.full(self.num_envs, -1)
        for number, asked in enumerate(self._current):
            order[asked.envs] = number
        return self._pool.halves(np.where(due, order, -1))

    def _wait_for_turns(self) -> tuple[VecEnvObs, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """What a step gives, once all turns are made; where the teacher is to act next it is asked after each of them."""
        assert self._pool is not None
        rewards, dones = np.zeros(self.num_envs, np.float32), np.zeros(self.num_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for turn in self._turns:
            rewards[turn.rows], dones[turn.rows], of_turn = self._pool.step_rows_wait(turn)
            for env, info in zip(turn.rows, of_turn):
                infos[env] = info
            self._advance(turn.rows, dones[turn.rows])
            envs = turn.rows[self._take_overs.due[turn.rows]]
            if len(envs):
                obs = self._pool.read_observations(envs)
                self._ask(envs, teacher_view(obs, self.venv.observation_space, self.teacher.spec.inputs), None)
        return self._pool.read_observations(), rewards, dones, infos

    def _let_act(self, envs: np.ndarray, actions: np.ndarray, acted: np.ndarray) -> None:
        """Put the teacher's actions in the place of the student's; its answers are waited for.

        :param envs: ``(n,)`` where the teacher is to act
        :param actions: ``(N, ...)``, changed there
        :param acted: ``(N,)`` bool, set there unless the answer was skipped
        """
        for asked in self._current if len(envs) else ():
            rows = np.isin(asked.envs, envs)
            if rows.any() and (labels := asked.pending.get()) is not None:
                acted[asked.envs[rows]] = True
                actions[asked.envs[rows]] = self.to_env_actions(labels["action"][rows])

    def _mark(self, executed: np.ndarray, acted: np.ndarray) -> None:
        """Keep for the infos of this step where the teacher acts."""
        self._marks = None
        teachers = self._take_overs.teachers
        if self.teacher_share == 0.0 and not teachers.any():
            return
        self.n_taught += int(acted.sum())
        self._marks = [{TEACHER_ACTED: a, TEACHERS_EPISODE: t} for a, t in zip(acted.tolist(), teachers.tolist())]
        for env in np.flatnonzero(acted):
            self._marks[env][EXECUTED_ACTION] = executed[env]

    def _advance(self, envs: np.ndarray, dones: np.ndarray) -> None:
        """The next observations of these environments are there."""
        self._starts[envs] = dones | ~self._was_asked[envs]
        self._was_asked[envs] = False
        self._take_overs.advance(envs, dones)

    def _complete(self, infos: list[dict[str, Any]]) -> None:
        """Add to the infos of a step what the teacher said and did, and take its view out of them."""
        if self._student_keys is not None:
            for info in infos:
                if "terminal_observation" in info:
                    info["terminal_observation"] = student_view(info["terminal_observation"], self._student_keys)
        for pending, envs in self._of_step:
            for row, env in enumerate(envs):
                for name in self.teacher.spec.labels:
                    label: Any = LazyLabel(pending, name, row)
                    infos[env][INFO_PREFIX + name] = np.asarray(label) if self._wait else label
        for info, marks in zip(infos, self._marks or ()):
            info.update(marks)

    def _split(self, obs: VecEnvObs) -> VecEnvObs:
        self._inputs = teacher_view(obs, self.venv.observation_space, self.teacher.spec.inputs)
        return student_view(obs, self._student_keys)

    def _draw(self) -> np.ndarray:
        if self.label_fraction == 1.0:
            return np.arange(self.num_envs)
        return np.flatnonzero(self._rng.random(self.num_envs) < self.label_fraction)

    def _was_answered(self) -> np.ndarray:
        """(N,) True where a question about the current observation needs not be asked again."""
        answered = np.zeros(self.num_envs, dtype=bool)
        for asked in self._current:
            answered[asked.envs] = True
        return answered

    def _inputs_of(self, envs: np.ndarray) -> dict[str, np.ndarray]:
        everything = len(envs) == self.num_envs
        return {name: value if everything else value[envs] for name, value in self._inputs.items()}

    def _ask_where(self, due: np.ndarray) -> None:
        """Ask about the current observations on which the teacher is to act: it has not seen an action of the student's."""
        envs = np.flatnonzero(due & ~self._was_answered())
        if len(envs):
            self._ask(envs, self._inputs_of(envs), None)

    def _ask(self, envs: np.ndarray, inputs: dict[str, np.ndarray], actions: np.ndarray | None) -> None:
        self._current.append(self._submit(envs, inputs, actions, timed=True))

    def _submit(
        self, envs: np.ndarray, inputs: dict[str, np.ndarray], actions: np.ndarray | None, *, timed: bool
    ) -> Asked:
        """Ask about the current observations of some environments.

        :param envs: ``(n,)``
        :param inputs: of these environments
        :param actions: ``(N, ...)`` of the student in all environments; None: it does not act there
        :param timed: the answer counts for :attr:`label_time`
        """
        if self.teacher.spec.stateful and self._last is not None:
            self._last.get()  # a question that failed is asked again before the next one
        if self._instructions is not None:
            inputs = inputs | {"instruction": self._instructions[envs]}
        query = Query(
            inputs=inputs,
            env_ids=envs,
            episode_starts=self._starts[envs],
            actions=None if actions is None else np.array(actions)[envs],
            number=self._n_queries,
        )
        self._n_queries += 1
        self.n_labels += len(envs)
        self._was_asked[envs] = True

        def note(seconds: float) -> None:
            with self._times_lock:
                self._times.append((seconds, len(envs)))

        # label() is left out: no environment steps meanwhile, and the first one warms the teacher up
        self._last = PendingLabels(self.teacher, query, self._policy, self.adapter, note if timed else None)
        return Asked(self._last, envs)
