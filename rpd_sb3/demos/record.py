"""Records whole episodes that a teacher plays, as the student would have seen them.

Shape letters: N environments, A action dimensions, T steps of an episode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

import rpd_sb3
from rpd_sb3.contract.bins import to_clipped_actions, to_tokens, token_bins
from rpd_sb3.demos.files import Demonstrations, Observation, each
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.episodes.play import Step, play
from rpd_sb3.labelling.access import find_vec_teacher
from rpd_sb3.labelling.vec_teacher import VecTeacher

MAX_TRIES = 20
"""Episodes played for each one that is wanted; with fewer successes a teacher is too weak for ``only_successful``."""


def record(
    venv: VecEnv,
    n_episodes: int,
    *,
    only_successful: bool = False,
    noise: float = 0.0,
    seed: int | None = None,
    max_steps: int = 10_000,
    metadata: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Whole episodes that the teacher plays, as the student would have seen them.

    All environments play one episode, then all the next, and episode i has seed ``seed + i``: what is kept depends
    neither on the number of environments nor on how long episodes last (to keep those that end first would prefer
    short ones), as long as the teacher draws nothing at random.

    :param venv: environments with a :class:`~rpd_sb3.labelling.VecTeacher`
    :param n_episodes: to keep
    :param only_successful: keep only episodes that were successful at some step, the first ``n_episodes`` of them
    :param noise: std of Gaussian noise on the actions that are executed; those that are recorded have none, so that they
        also show the way back (DART, Laskey et al., 2017)
    :param seed: of the first episode, and of the noise; None: the environments go on as they are
    :param max_steps: at which an episode must have ended
    :param metadata: to be kept with the demonstrations, ready for JSON
    :raises ValueError: if there is no teacher of continuous actions, an episode does not end, or too few are successful
    :raises TeacherError: if the teacher does not answer
    """
    vec_teacher = find_vec_teacher(venv)
    if vec_teacher is None:
        raise ValueError("record needs a teacher: wrap the env, e.g. record(VecTeacher(venv, teacher), n_episodes=100)")
    if n_episodes < 1:
        raise ValueError(f"record: n_episodes={n_episodes} must be at least 1")
    spec = vec_teacher.teacher.spec
    fraction = vec_teacher.label_fraction
    decide = _decider(vec_teacher, venv, noise, np.random.default_rng(seed))
    vec_teacher.set_label_fraction(0.0)  # label() asks already
    try:
        kept, played = _select(venv, decide, n_episodes, only_successful, seed, max_steps)
    finally:
        vec_teacher.set_label_fraction(fraction)
    observations, actions, rewards, successes = zip(*kept)
    facts: dict[str, Any] = {
        "rpd_sb3": rpd_sb3.__version__,
        "teacher": spec.name,
        "control_mode": spec.control_mode,
        "seed": seed,
        "noise": noise,
        "only_successful": only_successful,
        "n_episodes": n_episodes,
        "n_played": len(played),
        "success_rate": None if None in played else sum(map(bool, played)) / len(played),
    }
    return Demonstrations(
        each(lambda *values: np.concatenate(values), *observations),
        np.concatenate(actions),
        np.concatenate([np.arange(len(one)) == 0 for one in rewards]),
        np.concatenate(rewards),
        None if None in played else np.array(successes, dtype=bool),
        facts | dict(metadata or {}),
    )


class RecordedEpisode(NamedTuple):
    """One episode of T steps."""

    observations: Observation
    """``(T, ...)``, or a dict of such arrays."""
    actions: np.ndarray
    """``(T, A)``, continuous"""
    rewards: np.ndarray
    """``(T,)``"""
    success: bool | None
    """At some step; None if the environment does not report it."""


_Decide = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Asks the teacher for its next actions: continuous ``(N, A)``, and as the environments take them."""


def _decider(teacher: VecTeacher, venv: VecEnv, noise: float, rng: np.random.Generator) -> _Decide:
    space = venv.action_space
    n_bins = token_bins(space)
    bounds = find_token_bounds(venv)
    taught = teacher.teacher.spec.action_space
    if noise and not isinstance(taught, spaces.Box):
        raise ValueError(f"record: noise={noise} is for continuous actions, but the teacher gives {taught}")
    if n_bins is None and not isinstance(space, spaces.Box):
        raise ValueError(f"record needs continuous actions or action tokens, but the env takes {space}")

    def decide() -> tuple[np.ndarray, np.ndarray]:
        action = teacher.label()["action"]
        if n_bins is not None and taught == space:  # the teacher gives tokens
            return to_clipped_actions(action, n_bins, bounds), action
        continuous = teacher.adapter.clip(np.asarray(action, np.float32))
        executed = continuous
        if noise:
            executed = teacher.adapter.clip(continuous + rng.normal(0.0, noise, continuous.shape).astype(np.float32))
        return continuous, executed if n_bins is None else to_tokens(executed, n_bins, bounds)

    return decide


def _select(
    venv: VecEnv, decide: _Decide, n_episodes: int, only_successful: bool, seed: int | None, max_steps: int
) -> tuple[list[RecordedEpisode], list[bool | None]]:
    """The episodes to keep, and the success of all that were played until the last of them."""
    kept: list[RecordedEpisode] = []
    played: list[bool | None] = []
    at_most = MAX_TRIES * n_episodes
    while len(kept) < n_episodes:
        if len(played) >= at_most:
            raise ValueError(
                f"only {len(kept)} of {len(played)} episodes of the teacher were successful, {n_episodes} are wanted; "
                "choose a better teacher, or keep unsuccessful episodes as well"
            )
        if seed is not None:
            venv.seed(seed + len(played))
        for episode in _play(venv, decide, max_steps)[: at_most - len(played)]:
            if only_successful and episode.success is None:
                raise ValueError("only_successful needs an env whose info has is_success, but it is missing")
            if len(kept) == n_episodes:
                break
            played.append(episode.success)
            if episode.success or not only_successful:
                kept.append(episode)
    return kept, played


def _play(venv: VecEnv, decide: _Decide, max_steps: int) -> list[RecordedEpisode]:
    """One episode in each environment."""
    observations: list[Observation] = []
    actions: list[np.ndarray] = []
    rewards: list[np.ndarray] = []

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        continuous, executed = decide()
        actions.append(continuous)
        return executed

    def on_step(step: Step) -> None:
        observations.append(each(np.array, step.obs))
        rewards.append(np.array(step.rewards, np.float32))
        if len(rewards) == max_steps and (step.playing & ~step.dones).any():
            raise ValueError(f"an episode has not ended after max_steps={max_steps} steps; give the env a time limit")

    episodes = play(venv, act, on_step=on_step)

    def rows(i: int, steps: list[Any]) -> Any:
        return each(lambda *values: np.stack([value[i] for value in values]), *steps[: episodes[i].length])

    return [
        RecordedEpisode(rows(i, observations), rows(i, actions), rows(i, rewards), episode.once)
        for i, episode in enumerate(episodes)
    ]
