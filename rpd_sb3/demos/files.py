"""Recorded episodes of a teacher and their files: .npz, robomimic's HDF5 and LeRobot's datasets.

Shape letters: n transitions, A action dimensions, K episodes, H and W pixels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote
from zipfile import BadZipFile

import numpy as np

from rpd_sb3.contract.secrets import redact

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
        return self._replace(
            observations=each(lambda value: value[:end], self.observations),
            actions=self.actions[:end],
            episode_starts=self.episode_starts[:end],
            rewards=self.rewards[:end],
            successes=None if self.successes is None else self.successes[:n_episodes],
        )


def each(function: Callable[..., np.ndarray], *observations: Any) -> Any:
    """``function`` of observations, or of each entry if they are dicts.

    :param function: takes one array of each of the observations
    :param observations: arrays, or dicts of arrays with the same keys
    """
    if isinstance(observations[0], dict):
        return {key: function(*(obs[key] for obs in observations)) for key in observations[0]}
    return function(*observations)


def check_suffix(path: Path) -> None:
    """Checks that the suffix names a format that can be written and read here.

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
    the key of an observation that is not a dict is ``state`` or ``rgb``.

    :param path: file to write
    :param demos: what to write
    :raises ValueError: for an unknown suffix, or if h5py is missing
    """
    check_suffix(path := Path(path))
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    demos = demos._replace(metadata=redact(demos.metadata))
    (_save_npz if path.suffix == ".npz" else _save_hdf5)(temporary, demos)
    os.replace(temporary, path)


def load(path: str | Path) -> Demonstrations:
    """Read demonstrations; nothing in the file is executed, and no other file is read.

    :param path: file of :func:`save`, or a robomimic file
    :raises ValueError: if it cannot be read or holds something else
    """
    check_suffix(path := Path(path))
    if not path.is_file():
        raise ValueError(f"demonstrations {str(path)!r} do not exist; record some with python -m rpd_sb3.collect")
    try:
        demos = Demonstrations(**(_load_npz(path) if path.suffix == ".npz" else _load_hdf5(path)))
        _check(demos)
    except (OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{str(path)!r} does not hold demonstrations as rpd_sb3.collect writes them: {error}"
        ) from error
    return demos


def _check(demos: Demonstrations) -> None:
    n = len(demos.actions)
    observations = demos.observations if isinstance(demos.observations, dict) else {"observations": demos.observations}
    arrays = {"actions": demos.actions, "episode_starts": demos.episode_starts, "rewards": demos.rewards} | observations
    if not n or demos.actions.ndim != 2 or any(len(array) != n for array in arrays.values()):
        raise ValueError(f"the arrays have shapes {[array.shape for array in arrays.values()]}")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf" or not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite real numbers")
    if not demos.episode_starts[0]:
        raise ValueError("the first transition does not begin an episode")
    if demos.successes is not None and len(demos.successes) != demos.n_episodes:
        raise ValueError(f"{len(demos.successes)} successes, but {demos.n_episodes} episodes")


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


def _save_hdf5(path: Path, demos: Demonstrations) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["total"] = len(demos.actions)
        data.attrs["metadata"] = json.dumps(demos.metadata)
        data.attrs["lone_observation"] = not isinstance(demos.observations, dict)
        for i, rows in enumerate(demos.episodes):
            demo = data.create_group(f"demo_{i}")
            demo.attrs["num_samples"] = rows.stop - rows.start
            if demos.successes is not None:
                demo.attrs["success"] = demos.successes[i]
            demo["actions"] = demos.actions[rows]
            demo["rewards"] = demos.rewards[rows]
            demo["dones"] = np.arange(rows.start, rows.stop) == rows.stop - 1
            for key, value in _entries(demos).items():
                demo.create_dataset(f"obs/{quote(key, safe='')}", data=value[rows], compression="gzip")


def _load_hdf5(path: Path) -> dict[str, Any]:
    """The fields of :class:`Demonstrations`; robomimic's ``env_args`` are the metadata of a file that has none of ours."""
    import h5py

    with h5py.File(path) as file:

        def read(demo: Any, name: str) -> np.ndarray:
            dataset = demo[name]
            if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
                raise ValueError(f"{dataset.name} lies in another file")
            return dataset[:]

        data = file["data"]
        demos = [data[name] for name in sorted(data, key=lambda name: int(name.removeprefix("demo_")))]
        observations = {
            unquote(key): np.concatenate([read(demo["obs"], key) for demo in demos]) for key in demos[0]["obs"]
        }
        lone = bool(data.attrs.get("lone_observation", False))
        known = all("success" in demo.attrs for demo in demos)
        return {
            "observations": next(iter(observations.values())) if lone else observations,
            "actions": np.concatenate([read(demo, "actions") for demo in demos]).astype(np.float32),
            "episode_starts": np.concatenate([np.arange(len(demo["actions"])) == 0 for demo in demos]),
            "rewards": np.concatenate([read(demo, "rewards") for demo in demos]).astype(np.float32),
            "successes": np.array([demo.attrs["success"] for demo in demos], dtype=bool) if known else None,
            "metadata": json.loads(data.attrs.get("metadata", data.attrs.get("env_args", "{}"))),
        }


def _entries(demos: Demonstrations) -> dict[str, np.ndarray]:
    """The observations by name, ``(n, ...)`` each; the name of one that is not a dict is ``rgb`` for images, else ``state``."""
    if isinstance(demos.observations, dict):
        return demos.observations
    return {"rgb" if _is_image(demos.observations) else "state": demos.observations}


def _is_image(values: np.ndarray) -> bool:
    return values.ndim == 4 and values.dtype == np.uint8


def check_lerobot(folder: Path) -> None:
    """Checks that a LeRobot dataset can be written there.

    :param folder: of the dataset
    :raises ValueError: if it exists, its parent does not, or LeRobot is missing
    """
    if importlib.util.find_spec("lerobot") is None:
        raise ValueError(
            "LeRobot datasets need the package lerobot (Python 3.12), which is not installed: pip install 'lerobot[dataset]'"
        )
    if folder.exists():
        raise ValueError(f"folder {str(folder)!r} exists already; name a new one for the LeRobot dataset")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"folder {str(folder.parent)!r} does not exist; make it, or name another one")


def export_lerobot(folder: Path, demos: Demonstrations, *, fps: int, task: str) -> None:
    """Write a LeRobotDataset (v3.0): ``observation.state``, ``observation.images.<key>`` as video, ``action``, ...

    :param folder: of the dataset, must not exist
    :param demos: what to write; images are ``(n, H, W, 3)`` uint8
    :param fps: steps per second of the environment
    :param task: instruction of all episodes
    :raises ValueError: if LeRobot is missing or the folder cannot be made
    """
    check_lerobot(folder)
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    columns = _columns(demos)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=f"rpd_sb3/{folder.name}",
        fps=fps,
        root=temporary,
        features={name: _feature(values) for name, values in columns.items()},
        use_videos=any(_is_image(values) for values in columns.values()),
    )
    for rows in demos.episodes:
        for i in range(rows.start, rows.stop):
            dataset.add_frame({name: values[i] for name, values in columns.items()} | {"task": task})
        dataset.save_episode()
    dataset.finalize()
    temporary.rename(folder)


def _columns(demos: Demonstrations) -> dict[str, np.ndarray]:
    """The columns of a LeRobot dataset by name, ``(n, ...)`` with at least one dimension after n."""
    columns: dict[str, np.ndarray] = {}
    for key, values in _entries(demos).items():
        name = key.replace("/", ".").removeprefix("images.")
        columns[f"observation.images.{name}" if _is_image(values) else f"observation.{name}"] = values
    columns["action"] = demos.actions
    columns["next.reward"] = demos.rewards[:, None]
    columns["next.done"] = np.append(demos.episode_starts[1:], True)[:, None]
    if demos.successes is not None:
        successful = np.repeat(demos.successes, [rows.stop - rows.start for rows in demos.episodes])
        columns["next.success"] = successful[:, None] & columns["next.done"]
    return columns


def _feature(values: np.ndarray) -> dict[str, Any]:
    """LeRobot's description of a column."""
    if _is_image(values):
        return {"dtype": "video", "shape": values.shape[1:], "names": ["height", "width", "channels"]}
    return {"dtype": str(values.dtype), "shape": values.shape[1:], "names": None}
