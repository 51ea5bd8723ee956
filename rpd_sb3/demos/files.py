"""Whole episodes of a teacher: recording them, and the files that they are kept in.

Shape letters: n transitions, A action dimensions, N environments, K episodes, T steps of one episode.
"""

from __future__ import annotations

import importlib.util
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from rpd_sb3.contract.secrets import redact
from rpd_sb3.demos.formats import load_hdf5, save_hdf5

Observation = np.ndarray | dict[str, np.ndarray]

SUFFIXES = (".npz", ".hdf5", ".h5")


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
    """Write demonstrations, without secrets in their metadata; a file of that name is replaced only by a complete one.

    ``.npz`` holds the fields under their names, entries of a dict as ``observations/<key>``, metadata as JSON. ``.hdf5``
    and ``.h5`` have robomimic's layout: ``data/demo_i`` with ``actions``, ``rewards``, ``dones`` and ``obs/<key>``, where
    the key of an observation that is no dict is ``state`` or ``rgb``.

    :param path: file to write
    :param demos: what to write
    :raises ValueError: for an unknown suffix, or if h5py is missing
    """
    check_suffix(path := Path(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    demos = demos._replace(metadata=redact(demos.metadata))
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
