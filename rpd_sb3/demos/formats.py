"""Demonstrations in the layouts of other libraries: robomimic's HDF5 files and LeRobot's datasets.

Shape letters: n transitions, K episodes, H and W pixels.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np

if TYPE_CHECKING:
    from rpd_sb3.demos.files import Demonstrations


def save_hdf5(path: Path, demos: Demonstrations) -> None:
    """Write ``data/demo_i`` with ``actions``, ``rewards``, ``dones`` and ``obs/<key>``, as robomimic reads it.

    :param path: file to write
    :param demos: what to write
    """
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
            demo["actions"], demo["rewards"] = demos.actions[rows], demos.rewards[rows]
            demo["dones"] = np.arange(rows.start, rows.stop) == rows.stop - 1
            for key, value in _entries(demos).items():
                demo.create_dataset(f"obs/{quote(key, safe='')}", data=value[rows], compression="gzip")


def load_hdf5(path: Path) -> dict[str, Any]:
    """The fields of :class:`~rpd_sb3.demos.files.Demonstrations`; without our metadata, robomimic's ``env_args``.

    :param path: file of :func:`save_hdf5`, or robomimic's
    :raises LookupError: if it is neither
    """
    import h5py

    with h5py.File(path) as file:
        data = file["data"]
        demos = [data[name] for name in sorted(data, key=lambda name: int(name.removeprefix("demo_")))]
        observations = {
            unquote(key): np.concatenate([demo["obs"][key][:] for demo in demos]) for key in demos[0]["obs"]
        }
        lone = bool(data.attrs.get("lone_observation", False))
        known = all("success" in demo.attrs for demo in demos)
        return {
            "observations": next(iter(observations.values())) if lone else observations,
            "actions": np.concatenate([demo["actions"][:] for demo in demos]).astype(np.float32),
            "episode_starts": np.concatenate([np.arange(len(demo["actions"])) == 0 for demo in demos]),
            "rewards": np.concatenate([demo["rewards"][:] for demo in demos]).astype(np.float32),
            "successes": np.array([demo.attrs["success"] for demo in demos], dtype=bool) if known else None,
            "metadata": json.loads(data.attrs.get("metadata", data.attrs.get("env_args", "{}"))),
        }


def check_lerobot(folder: Path) -> None:
    """Make sure that a LeRobot dataset can be written there.

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
    :param fps: steps of the environment in a second
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


def _entries(demos: Demonstrations) -> dict[str, np.ndarray]:
    """The observations by name, ``(n, ...)`` each; one that is no dict goes by ``state``, or ``rgb`` if it is an image."""
    if isinstance(demos.observations, dict):
        return demos.observations
    return {"rgb" if _is_image(demos.observations) else "state": demos.observations}


def _is_image(values: np.ndarray) -> bool:
    return values.ndim == 4 and values.dtype == np.uint8


def _columns(demos: Demonstrations) -> dict[str, np.ndarray]:
    """What goes into each frame under LeRobot's names, ``(n, ...)`` with at least one dimension after n."""
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
