"""Students and teachers in one harness: the same seeded episodes for everybody.

Shape letters: N environments, K episodes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.contract.bins import to_tokens, token_bins
from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs import make_vec_env
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.envs.factory import evaluation_options
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.labelling.access import find_vec_teacher

EVAL_SEED = 10_000
"""Seed of the first evaluation episode; episode i has ``EVAL_SEED + i``. Training seeds are usually small."""

Actor = Callable[[Any, np.ndarray], np.ndarray]
"""(batched observation, (N,) bool True where an episode starts) to (N, ...) actions."""


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

    def summary(self) -> dict[str, Any]:
        """The numbers without the arrays, ready for JSON."""
        return {
            "success_once": self.success_once,
            "success_at_end": self.success_at_end,
            "n_episodes": self.n_episodes,
            "ci95": None if self.ci95 is None else list(self.ci95),
            "mean_return": self.mean_return,
            "mean_length": self.mean_length,
        }


def student_actor(model: BaseAlgorithm) -> Actor:
    """The model's deterministic action, of :func:`in_eights`; recurrent models keep their state from step to step."""
    state: Any = None

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        nonlocal state
        obs, starts = in_eights(obs, len(episode_starts)), in_eights(episode_starts, len(episode_starts))
        actions, state = model.predict(obs, state=state, episode_start=starts, deterministic=True)
        return actions[: len(episode_starts)]

    return act


def in_eights(batch: Any, n: int) -> Any:
    """A batch, array or mapping, with its n rows repeated up to a multiple of 8.

    Otherwise rounding on the CPU depends on the batch size (measured: 5e-9 for an MLP), and contacts amplify it.
    """
    rows = np.arange(-(-n // 8) * 8) % n
    return {key: value[rows] for key, value in batch.items()} if isinstance(batch, dict) else batch[rows]


def teacher_actor(venv: VecEnv) -> Actor:
    """The teacher's action label, clipped to the action space or as tokens; the observation is the teacher's own."""
    vec_teacher = find_vec_teacher(venv)
    assert vec_teacher is not None, "these environments have no teacher"
    space = venv.action_space
    n_bins = None if vec_teacher.teacher.spec.action_space == space else token_bins(space)
    bounds = find_token_bounds(venv)

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        action = vec_teacher.adapter.clip(vec_teacher.label()["action"])
        return action if n_bins is None else to_tokens(action, n_bins, bounds)

    return act


class Evaluator:
    """The same episodes for everybody, in environments of their own that are made once, when first needed.

    Episode i is seeded with ``seed + i``, whatever the number of environments. A ManiSkill episode goes on after success,
    so that ``success_once`` and ``success_at_end`` both mean something; others end as they do. Nothing here
    touches the random generators of training.

    :param env_id: as in :func:`rpd_sb3.envs.make_env`
    :param env_kwargs: its options
    :param n_episodes: K
    :param seed: of the first episode
    :param n_envs: N
    :param vec_env: ``subproc`` or ``dummy``
    :param teacher: if the teacher itself is to be evaluated; never asked about a student's episodes. A noisy teacher should
        not be the one that labels in training: its noise would depend on the evaluations. Its results depend on N
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
        self.n_episodes, self.seed = n_episodes, seed
        self._env_id, self._env_kwargs = env_id, env_kwargs or {}
        self._options = evaluation_options(env_id, self._env_kwargs)
        self._n_envs, self._vec_env, self._teacher, self._shown = min(n_envs, n_episodes), vec_env, teacher, True
        self._venv: VecEnv | None = None

    @property
    def venv(self) -> VecEnv:
        if self._venv is None:
            teacher = self._teacher if self._shown else None
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
        looks = any(name.startswith("images.") for name in self._teacher.spec.inputs)
        if looks or self._options.get("obs", "state") == "state":
            return self.evaluate(teacher_actor(self.venv))
        with closing(self._like(self._options | {"obs": "state"})) as blind:
            return blind.teacher()

    def as_trained(self) -> Evaluator:
        """One for the same episodes, which end where those of training do."""
        return self._like(self._env_kwargs)

    def _like(self, options: dict[str, Any]) -> Evaluator:
        same: dict[str, Any] = {"n_envs": self._n_envs, "vec_env": self._vec_env, "teacher": self._teacher}
        other = Evaluator(self._env_id, n_episodes=self.n_episodes, seed=self.seed, **same)
        other._options = options
        return other

    def evaluate(self, act: Actor, n_episodes: int | None = None) -> EvalResult:
        """Play the episodes.

        :param act: who plays
        :param n_episodes: only the first ones; None: all
        """
        n_episodes, episodes = n_episodes or self.n_episodes, list[Episode]()
        with untouched_rng():
            venv = self.venv
            while len(episodes) < n_episodes:
                venv.seed(self.seed + len(episodes))
                episodes += play(venv, act)
        return summarise(episodes[:n_episodes])

    def hide_teacher(self) -> None:
        """From now on render nothing for the teacher, which can neither be evaluated nor asked any more."""
        if self._shown and self._teacher is not None:
            self.close()
        self._shown = False

    def close(self) -> None:
        if self._venv is not None:
            self._venv.close()
            self._venv = None


class Episode(NamedTuple):
    """How one episode went. Success is None if the environment does not report it."""

    ret: float
    length: int
    once: bool | None
    """Successful at some step."""
    at_end: bool | None
    """Successful at the last step."""


def play(venv: VecEnv, act: Actor) -> list[Episode]:
    """One episode in each environment, in step; an environment that is done waits for the others.

    :param venv: N environments, seeded
    :param act: who plays
    """
    n = venv.num_envs
    obs = venv.reset()
    starts = np.ones(n, dtype=bool)
    returns, once = np.zeros(n), np.zeros(n, dtype=bool)
    episodes: list[Episode | None] = [None] * n
    length = 0
    while any(episode is None for episode in episodes):
        obs, rewards, starts, infos = venv.step(act(obs, starts))
        length += 1
        for i, info in enumerate(infos):
            if episodes[i] is not None:
                continue
            returns[i] += rewards[i]
            success = info.get("is_success")
            once[i] |= bool(success)
            if starts[i]:
                known = success is not None
                episodes[i] = Episode(
                    returns[i], length, bool(once[i]) if known else None, bool(success) if known else None
                )
    return [episode for episode in episodes if episode is not None]


def summarise(episodes: Sequence[Episode]) -> EvalResult:
    """What the episodes amount to, at least one."""
    returns = np.array([episode.ret for episode in episodes])
    lengths = np.array([episode.length for episode in episodes])
    once = at_end = None
    if all(episode.once is not None for episode in episodes):
        once = np.array([episode.once for episode in episodes], dtype=bool)
        at_end = np.array([episode.at_end for episode in episodes], dtype=bool)
    return EvalResult(
        success_once=None if once is None else float(once.mean()),
        success_at_end=None if at_end is None else float(at_end.mean()),
        n_episodes=len(episodes),
        ci95=None if once is None else wilson_interval(int(once.sum()), len(once)),
        mean_return=float(returns.mean()),
        mean_length=float(lengths.mean()),
        returns=returns,
        lengths=lengths,
        once=once,
        at_end=at_end,
    )


def describe(result: EvalResult) -> str:
    """A result in one line."""
    text = f"return {result.mean_return:.2f}, length {result.mean_length:.1f}"
    if result.success_once is None or result.ci95 is None or result.success_at_end is None:
        return text
    low, high = result.ci95
    return f"success {result.success_once:.0%} [{low:.0%}, {high:.0%}], at end {result.success_at_end:.0%}, {text}"


@contextmanager
def untouched_rng() -> Iterator[None]:
    """Leave Python's, NumPy's and PyTorch's global generators as they were, whatever happens inside."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch, cuda = th.get_rng_state(), th.cuda.get_rng_state_all() if th.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        th.set_rng_state(torch)
        if cuda:
            th.cuda.set_rng_state_all(cuda)
