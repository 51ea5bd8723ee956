"""Plays seeded episodes with a student or a teacher, and says how they went.

Shape letters: N environments, K episodes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.contract.teacher import Teacher, sees_images
from rpd_sb3.envs import make_vec_env
from rpd_sb3.envs.factory import evaluation_options
from rpd_sb3.episodes.rng import preserved_rng
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.labelling.access import find_vec_teacher

EVAL_SEED = 10_000
"""Seed of the first evaluation episode; episode i has ``EVAL_SEED + i``. Training seeds are usually small."""

Actor = Callable[[Any, np.ndarray], np.ndarray]
"""(batched observation, (N,) bool True where an episode starts) to (N, ...) actions."""


class Step(NamedTuple):
    """One step of N environments."""

    obs: Any
    """The batched observation that ``actions`` answers."""
    actions: np.ndarray
    rewards: np.ndarray
    """(N,)"""
    dones: np.ndarray
    """(N,) bool"""
    infos: Sequence[dict[str, Any]]
    playing: np.ndarray
    """(N,) bool: the step belongs to an episode that counts. False where an environment waits for the others."""


class Episode(NamedTuple):
    """How one episode went. Success is None if the environment does not report it."""

    episode_return: float
    length: int
    once: bool | None
    """Successful at some step."""
    at_end: bool | None
    """Successful at the last step."""


def episode_steps(venv: VecEnv, act: Actor) -> Iterator[Step]:
    """Plays one episode in each environment, all at once; an environment that is done acts on until all are.

    :param venv: N environments, seeded
    :param act: gives the actions
    :return: the steps, each after it was taken
    """
    obs = venv.reset()
    starts = np.ones(venv.num_envs, dtype=bool)
    playing = starts
    while playing.any():
        actions = act(obs, starts)
        next_obs, rewards, starts, infos = venv.step(actions)
        yield Step(obs, actions, rewards, starts, infos, playing)
        playing = playing & ~starts
        obs = next_obs


def play(
    venv: VecEnv, act: Actor, *, n_episodes: int | None = None, on_step: Callable[[Step], None] | None = None
) -> list[Episode]:
    """Plays one episode in each environment and says how they went.

    :param venv: N environments, seeded
    :param act: gives the actions
    :param n_episodes: only those of the first environments count; None: all N
    :param on_step: called after each step
    :return: the episodes that count, in the order of the environments
    """
    n = venv.num_envs
    counts = np.arange(n) < (n if n_episodes is None else n_episodes)
    returns, once = np.zeros(n), np.zeros(n, dtype=bool)
    episodes: dict[int, Episode] = {}
    for length, step in enumerate(episode_steps(venv, act), start=1):
        step = step._replace(playing=step.playing & counts)
        for i in np.flatnonzero(step.playing).tolist():
            returns[i] += step.rewards[i]
            success = step.infos[i].get("is_success")
            once[i] |= bool(success)
            if step.dones[i]:
                known = success is not None
                episodes[i] = Episode(
                    returns[i], length, bool(once[i]) if known else None, bool(success) if known else None
                )
        if on_step is not None:
            on_step(step)
    return [episodes[i] for i in sorted(episodes)]


def student_actor(model: BaseAlgorithm) -> Actor:
    """The model's deterministic actions, which do not depend on N; recurrent models keep their state between steps."""
    state: Any = None

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        nonlocal state
        n = len(episode_starts)
        obs, starts = pad_to_multiple_of_8(obs, n), pad_to_multiple_of_8(episode_starts, n)
        actions, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        return actions[:n]

    return act


def pad_to_multiple_of_8(batch: Any, n: int) -> Any:
    """A batch, array or mapping, with its n rows repeated up to a multiple of 8.

    Otherwise rounding on the CPU depends on the batch size (measured: 5e-9 for an MLP), and contacts amplify it.
    """
    rows = np.arange(-(-n // 8) * 8) % n
    return {key: value[rows] for key, value in batch.items()} if isinstance(batch, dict) else batch[rows]


def teacher_actor(venv: VecEnv) -> Actor:
    """The teacher's action label, clipped to the action space or as tokens; the observation is the teacher's own."""
    vec_teacher = find_vec_teacher(venv)
    assert vec_teacher is not None, "these environments have no teacher"
    return lambda obs, episode_starts: vec_teacher.to_env_actions(vec_teacher.label()["action"])


class EvalResult(NamedTuple):
    """How K episodes went. Success is None if the environment does not report it."""

    success_once: float | None
    """Share of episodes that were successful at some step."""
    success_at_end: float | None
    """Share of episodes that were successful at their last step."""
    n_episodes: int
    ci95: tuple[float, float] | None
    """Wilson interval of ``success_once``."""
    mean_return: float
    mean_length: float
    returns: np.ndarray
    """(K,)"""
    lengths: np.ndarray
    """(K,)"""
    once: np.ndarray | None
    """(K,) bool"""
    at_end: np.ndarray | None
    """(K,) bool"""

    @classmethod
    def of(
        cls, returns: np.ndarray, lengths: np.ndarray, once: np.ndarray | None, at_end: np.ndarray | None
    ) -> EvalResult:
        """The statistics of K episodes, K at least 1.

        :param returns: ``(K,)``
        :param lengths: ``(K,)``
        :param once: ``(K,)`` bool; None: not reported
        :param at_end: ``(K,)`` bool; None: not reported
        """
        return cls(
            success_once=None if once is None else float(once.mean()),
            success_at_end=None if at_end is None else float(at_end.mean()),
            n_episodes=len(returns),
            ci95=None if once is None else wilson_interval(int(once.sum()), len(once)),
            mean_return=float(returns.mean()),
            mean_length=float(lengths.mean()),
            returns=returns,
            lengths=lengths,
            once=once,
            at_end=at_end,
        )

    def summary(self) -> dict[str, Any]:
        """The numbers without the arrays, ready for JSON."""
        arrays = ("returns", "lengths", "once", "at_end")
        numbers = {name: value for name, value in self._asdict().items() if name not in arrays}
        return numbers | {"ci95": None if self.ci95 is None else list(self.ci95)}


class Evaluator:
    """Plays the same seeded episodes for every policy, in environments of its own that are made when first needed.

    Episode i is seeded with ``seed + i``, whatever the number of environments. A ManiSkill episode goes on after success,
    so that ``success_once`` and ``success_at_end`` both mean something; others end as they do. The global random
    generators, which training uses, stay as they were.

    :param env_id: as in :func:`rpd_sb3.envs.make_env`
    :param env_kwargs: its options
    :param n_episodes: K
    :param seed: of the first episode
    :param n_envs: N
    :param vec_env: ``subproc`` or ``dummy``
    :param teacher: if the teacher itself is to be evaluated; never asked about a student's episodes. A noisy teacher should
        not be the one that labels in training: its noise would depend on the evaluations. Its results depend on N
    :raises ValueError: if ``n_episodes`` is below 1
    """

    def __init__(
        self,
        env_id: str,
        env_kwargs: dict[str, Any] | None = None,
        *,
        n_episodes: int = 50,
        seed: int = EVAL_SEED,
        n_envs: int = 8,
        vec_env: str = "subproc",
        teacher: Teacher | None = None,
    ) -> None:
        if n_episodes < 1:
            raise ValueError(f"n_episodes={n_episodes} must be at least 1")
        self.n_episodes = n_episodes
        self.seed = seed
        self._env_id = env_id
        self._env_kwargs = env_kwargs or {}
        self._options = evaluation_options(env_id, self._env_kwargs)
        self._n_envs = min(n_envs, n_episodes)
        self._vec_env = vec_env
        self._teacher = teacher
        self._teacher_hidden = False
        self._venv: VecEnv | None = None

    @property
    def venv(self) -> VecEnv:
        """The environments, with the teacher unless it is hidden."""
        if self._venv is None:
            teacher = None if self._teacher_hidden else self._teacher
            spec = None if teacher is None else teacher.spec
            venv = make_vec_env(self._env_id, self._n_envs, vec_env=self._vec_env, teacher=spec, **self._options)
            self._venv = venv if teacher is None else VecTeacher(venv, teacher, label_fraction=0.0)
        return self._venv

    def student(self, model: BaseAlgorithm) -> EvalResult:
        """Evaluate a model's deterministic actions."""
        return self.evaluate(student_actor(model))

    def teacher(self) -> EvalResult:
        """Evaluate the teacher; images that only the student looks at are not rendered.

        :raises TeacherError: if it does not answer
        """
        assert self._teacher is not None
        looks = sees_images(self._teacher.spec.inputs)
        if looks or self._options.get("obs", "state") == "state":
            return self.evaluate(teacher_actor(self.venv))
        with closing(self._with_options(self._options | {"obs": "state"})) as blind:
            return blind.teacher()

    def with_training_ends(self) -> Evaluator:
        """An evaluator of the same episodes, which end where those of training do; the teacher is not hidden."""
        return self._with_options(self._env_kwargs)

    def _with_options(self, options: dict[str, Any]) -> Evaluator:
        other = copy.copy(self)
        other._options = options
        other._teacher_hidden = False
        other._venv = None
        return other

    def evaluate(
        self, act: Actor, n_episodes: int | None = None, on_step: Callable[[Step], None] | None = None
    ) -> EvalResult:
        """Play the episodes.

        :param act: gives the actions
        :param n_episodes: only the first ones; None: all
        :param on_step: called after each step
        """
        n_episodes = self.n_episodes if n_episodes is None else n_episodes
        episodes: list[Episode] = []
        with preserved_rng():
            venv = self.venv
            while len(episodes) < n_episodes:
                venv.seed(self.seed + len(episodes))
                episodes += play(venv, act, n_episodes=n_episodes - len(episodes), on_step=on_step)
        return summarize(episodes)

    def hide_teacher(self) -> None:
        """From now on render nothing for the teacher, which can then be neither evaluated nor asked."""
        if self._teacher is not None and not self._teacher_hidden:
            self.close()
        self._teacher_hidden = True

    def close(self) -> None:
        if self._venv is not None:
            self._venv.close()
            self._venv = None


def summarize(episodes: Sequence[Episode]) -> EvalResult:
    """The statistics of at least one episode."""
    known = all(episode.once is not None for episode in episodes)
    return EvalResult.of(
        np.array([episode.episode_return for episode in episodes]),
        np.array([episode.length for episode in episodes]),
        np.array([episode.once for episode in episodes], dtype=bool) if known else None,
        np.array([episode.at_end for episode in episodes], dtype=bool) if known else None,
    )


def describe(result: EvalResult) -> str:
    """A result in one line."""
    text = f"return {result.mean_return:.2f}, length {result.mean_length:.1f}"
    if result.success_once is None or result.ci95 is None or result.success_at_end is None:
        return text
    low, high = result.ci95
    return f"success {result.success_once:.0%} [{low:.0%}, {high:.0%}], at end {result.success_at_end:.0%}, {text}"
