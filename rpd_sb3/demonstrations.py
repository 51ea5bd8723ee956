"""Whole episodes of a teacher: recording them, and the files that they are kept in.

Shape letters: n transitions, A action dimensions, N environments, K episodes, T steps of one episode.
"""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

import rpd_sb3
from rpd_sb3.bins import Bounds, to_actions, to_tokens
from rpd_sb3.demonstration_formats import load_hdf5, save_hdf5
from rpd_sb3.envs.action_tokens import find_token_bounds
from rpd_sb3.envs.teacher_access import find_vec_teacher
from rpd_sb3.envs.vec_teacher import VecTeacher
from rpd_sb3.envs.views import token_bins

Observation = np.ndarray | dict[str, np.ndarray]

SUFFIXES = (".npz", ".hdf5", ".h5")
MAX_TRIES = 20
"""Episodes played for each one that is wanted, before a teacher counts as too weak for ``only_successful``."""


class Demonstrations(NamedTuple):
    """K whole episodes, one after the other."""

    observations: Observation
    """``(n, ...)``, or a dict of such arrays: what the student sees, images as the environment gives them."""
    actions: np.ndarray
    """``(n, A)`` float32: what the teacher wanted, within the bounds; continuous also where the environment takes tokens."""
    episode_starts: np.ndarray
    """``(n,)`` bool: True at the first transition of each episode."""
    rewards: np.ndarray
    """``(n,)`` float32"""
    successes: np.ndarray | None
    """``(K,)`` bool: successful at some step; None if the environment does not report it."""
    metadata: dict[str, Any]
    """Where they come from, ready for JSON."""

    @property
    def n_episodes(self) -> int:
        return int(self.episode_starts.sum())

    @property
    def episodes(self) -> list[slice]:
        """The transitions of each episode."""
        borders = [*np.flatnonzero(self.episode_starts).tolist(), len(self.actions)]
        return [slice(start, end) for start, end in zip(borders, borders[1:])]

    def first(self, n_episodes: int) -> Demonstrations:
        """The first episodes alone.

        :param n_episodes: how many
        :raises ValueError: if there are not that many
        """
        if not 1 <= n_episodes <= self.n_episodes:
            raise ValueError(
                f"{n_episodes} demonstrations are asked for, but there are {self.n_episodes} to choose from"
            )
        end = self.episodes[n_episodes - 1].stop
        starts, rewards = self.episode_starts[:end], self.rewards[:end]
        successes = None if self.successes is None else self.successes[:n_episodes]
        observations = each(lambda value: value[:end], self.observations)
        return Demonstrations(observations, self.actions[:end], starts, rewards, successes, self.metadata)


def each(function: Callable[..., np.ndarray], *observations: Any) -> Any:
    """``function`` of observations, or of each entry if they are dicts.

    :param function: takes one array of each of the observations
    :param observations: arrays, or dicts of arrays with the same keys
    """
    if isinstance(observations[0], dict):
        return {key: function(*(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


def record(
    venv: VecEnv,
    n_episodes: int,
    *,
    only_successful: bool = False,
    seed: int | None = None,
    max_steps: int = 10_000,
    metadata: Mapping[str, Any] | None = None,
) -> Demonstrations:
    """Have the teacher play whole episodes, and keep what the student would have seen.

    All environments play one episode, then all the next, and episode i has seed ``seed + i``: what is kept depends
    neither on the number of environments nor on how long episodes last (whoever keeps those that end first prefers
    short ones), as long as the teacher draws nothing at random.

    :param venv: environments with a :class:`~rpd_sb3.envs.VecTeacher`
    :param n_episodes: to keep
    :param only_successful: keep only episodes that were successful at some step, the first ``n_episodes`` of them
    :param seed: of the first episode; None: the environments go on as they are
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
    spec, fraction = vec_teacher.teacher.spec, vec_teacher.label_fraction
    decide = _decider(vec_teacher, venv.action_space, find_token_bounds(venv))
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


class _Episode(NamedTuple):
    observations: Observation  # (T, ...)
    actions: np.ndarray
    rewards: np.ndarray
    success: bool | None


_Decide = Callable[[], tuple[np.ndarray, np.ndarray]]
"""Gives the teacher's next actions: continuous ``(N, A)``, and as the environments take them."""


def _decider(teacher: VecTeacher, space: spaces.Space, bounds: Bounds | None) -> _Decide:
    taught = teacher.teacher.spec.action_space
    n_bins = token_bins(space)
    if n_bins is None and not isinstance(space, spaces.Box):
        raise ValueError(f"record needs continuous actions or action tokens, but the env takes {space}")

    def decide() -> tuple[np.ndarray, np.ndarray]:
        action = teacher.label()["action"]
        if n_bins is not None and taught == space:  # a teacher that speaks in tokens itself
            return to_actions(action, n_bins, bounds).clip(-1.0, 1.0), action  # as ActionTokens acts
        continuous = teacher.adapter.clip(np.asarray(action, np.float32))
        return continuous, continuous if n_bins is None else to_tokens(continuous, n_bins, bounds)

    return decide


def _select(
    venv: VecEnv, decide: _Decide, n_episodes: int, only_successful: bool, seed: int | None, max_steps: int
) -> tuple[list[_Episode], list[bool | None]]:
    """The episodes to keep, and the success of all that were played up to the last of them."""
    kept: list[_Episode] = []
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
                raise ValueError("the env reports no is_success: successful episodes cannot be told from others")
            if len(kept) < n_episodes:
                played.append(episode.success)
                kept += [episode] * (bool(episode.success) or not only_successful)
    return kept, played


def _play(venv: VecEnv, decide: _Decide, max_steps: int) -> list[_Episode]:
    """One episode in each environment, in step; an environment that is done waits for the others."""
    lengths = np.zeros(venv.num_envs, dtype=int)
    successes: list[bool | None] = [None] * venv.num_envs
    observations: list[Any] = []
    actions: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    obs = venv.reset()
    while not lengths.all():
        if len(rewards) == max_steps:
            raise ValueError(f"an episode has not ended after max_steps={max_steps} steps; give the env a time limit")
        continuous, action = decide()
        observations.append(each(np.array, obs))
        actions.append(continuous)
        obs, reward, dones, infos = venv.step(action)
        rewards.append(np.array(reward, np.float32))
        for i in np.flatnonzero(lengths == 0):
            if (success := infos[i].get("is_success")) is not None:
                successes[i] = bool(successes[i]) or bool(success)
            if dones[i]:
                lengths[i] = len(rewards)

    def rows(i: int, steps: list[Any]) -> Any:
        return each(lambda *values: np.stack([value[i] for value in values]), *steps[: lengths[i]])

    return [
        _Episode(rows(i, observations), rows(i, actions), rows(i, rewards), successes[i]) for i in range(venv.num_envs)
    ]


def check_suffix(path: Path) -> None:
    """Make sure that the suffix names a format that can be written and read here.

    :raises ValueError: for an unknown suffix, or one whose package is missing
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"demonstrations {str(path)!r}: the suffix must be one of {', '.join(SUFFIXES)}")
    if path.suffix != ".npz" and importlib.util.find_spec("h5py") is None:
        raise ValueError(
            f"demonstrations {str(path)!r} need h5py, which is not installed: pip install h5py, or use .npz"
        )


def save(path: str | Path, demos: Demonstrations) -> None:
    """Write demonstrations; a file of that name is replaced only by a complete one.

    ``.npz`` holds the fields under their names, entries of a dict as ``observations/<key>``, metadata as JSON. ``.hdf5``
    and ``.h5`` have robomimic's layout: ``data/demo_i`` with ``actions``, ``rewards``, ``dones`` and ``obs/<key>``, where
    the key of an observation that is no dict is ``state`` or ``rgb``.

    :param path: file to write
    :param demos: what to write
    :raises ValueError: for an unknown suffix, or if h5py is missing
    """
    check_suffix(path := Path(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    (_save_npz if path.suffix == ".npz" else save_hdf5)(temporary, demos)
    os.replace(temporary, path)


def load(path: str | Path) -> Demonstrations:
    """Read demonstrations; nothing of the file is executed.

    :param path: file of :func:`save`, or a robomimic file
    :raises ValueError: if it cannot be read or holds something else
    """
    check_suffix(path := Path(path))
    if not path.is_file():
        raise ValueError(f"demonstrations {str(path)!r} do not exist; record some with python -m rpd_sb3.collect")
    try:
        demos = Demonstrations(**(_load_npz(path) if path.suffix == ".npz" else load_hdf5(path)))
        _check(demos)
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{str(path)!r} holds no demonstrations as rpd_sb3.collect writes them: {error}") from error
    return demos


def _check(demos: Demonstrations) -> None:
    n, seen = len(demos.actions), demos.observations
    arrays = [demos.actions, demos.episode_starts, demos.rewards]
    arrays += seen.values() if isinstance(seen, dict) else [seen]
    episodes = demos.n_episodes if demos.successes is None else len(demos.successes)
    if not n or demos.actions.ndim != 2 or {len(array) for array in arrays} != {n}:
        raise ValueError(f"the arrays have shapes {[array.shape for array in arrays]}")
    if episodes != demos.n_episodes or not demos.episode_starts[0] or not np.isfinite(demos.actions).all():
        raise ValueError(f"actions are not finite, or {episodes} episodes do not begin where they are said to")


def _save_npz(path: Path, demos: Demonstrations) -> None:
    fields = demos._asdict() | {"metadata": json.dumps(demos.metadata)}
    if isinstance(demos.observations, dict):
        fields |= {f"observations/{key}": value for key, value in fields.pop("observations").items()}
    np.savez_compressed(path, **{k: v for k, v in fields.items() if v is not None})


def _load_npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays: dict[str, Any] = dict(file)
    observations = {k.partition("/")[2]: arrays.pop(k) for k in list(arrays) if k.startswith("observations/")}
    missing: dict[str, Any] = {"successes": None} | ({"observations": observations} if observations else {})
    return missing | arrays | {"metadata": json.loads(str(arrays["metadata"]))}
