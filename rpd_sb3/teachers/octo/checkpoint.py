"""Octo's checkpoints: loading one, and the statistics that unnormalize its actions.

Shape letter: A = 7 action dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rpd_sb3.contract.names import closest
from rpd_sb3.teachers.octo.package import explained, first_line, import_model_class

ACTION_SIZE = 7
HUB = "hf://"
FILES = ("config.json", "example_batch.msgpack", "dataset_statistics.json")
NORMALIZATION = "action_proprio_normalization_type"
"""Key of the training configuration that says how actions were normalized."""
DETERMINISTIC = "ContinuousActionHead"
"""Base class of the heads whose samples are all equal."""


class Statistics(NamedTuple):
    """The statistics that actions were normalized with in training: ``(action - mean) / std`` where ``mask``."""

    mean: np.ndarray
    """(A,) float32."""
    std: np.ndarray
    """(A,) float32."""
    mask: np.ndarray
    """(A,) bool; False: that dimension was not normalized."""

    def unnormalize(self, actions: np.ndarray) -> np.ndarray:
        """Actions (..., A) float32 in the units of the dataset, from normalized ones."""
        return np.where(self.mask, actions * self.std + self.mean, actions)


class Checkpoint(NamedTuple):
    """An Octo checkpoint: the loaded model and its sizes."""

    model: Any
    """An ``octo.model.octo_model.OctoModel``."""
    max_horizon: int
    """Most images of its history, the current one included."""
    action_horizon: int
    """Actions of one chunk."""
    image_sizes: Mapping[str, tuple[int, int]]
    """``image_primary`` and the like to (H, W)."""


def weights(params: Mapping[str, Any]) -> Iterator[Any]:
    """All arrays of a model's ``params``, however deep."""
    for value in params.values():
        if isinstance(value, Mapping):
            yield from weights(value)
        else:
            yield value


def load_checkpoint(path: str, step: int | None) -> Checkpoint:
    """Load a checkpoint.

    :param path: a folder that octo's ``save_pretrained`` has written, or ``hf://org/name``
    :param step: which of the folder's; None: the latest
    :raises ValueError: if octo or the checkpoint is missing, or this teacher cannot use the model
    """
    cls = import_model_class()
    hub = path.startswith(HUB)
    if not hub:
        check_folder(path, step)
    try:
        # Orbax 0.5 and later want absolute paths.
        model = cls.load_pretrained(path if hub else os.path.abspath(path), step)
    except (ImportError, AttributeError) as error:
        raise ValueError(explained(error)) from error
    except OSError as error:
        raise ValueError(
            f"octo's checkpoint {path!r} cannot be loaded ({first_line(error)}): the models that its configuration names, "
            "like the tokenizer t5-base, must be in the hub's cache, or the network must be reachable; see docs/octo.md"
        ) from error
    if model.text_processor is None:
        raise ValueError(f"octo's checkpoint {path!r} has no text processor: it does not follow instructions")
    normalization = _find(model.config, NORMALIZATION)
    if normalization not in (None, "normal"):
        raise ValueError(
            f"octo's checkpoint {path!r} was trained with actions normalized to {normalization!r}, not 'normal': this "
            "teacher cannot unnormalize them"
        )
    observation = model.example_batch["observation"]
    head = model.module.heads["action"]
    return Checkpoint(
        model,
        max_horizon=int(model.module.octo_transformer.max_horizon),
        action_horizon=int(head.action_horizon),
        image_sizes={key: tuple(value.shape[2:4]) for key, value in observation.items() if key.startswith("image_")},
    )


def check_folder(path: str, step: int | None) -> None:
    """Checks that a local checkpoint is complete.

    :param path: its folder
    :param step: which of its steps is wanted; None: any
    :raises ValueError: with the file or step that is missing
    """
    folder = Path(path)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        what = f"has no {missing[0]}" if folder.is_dir() else "does not exist"
        raise ValueError(
            f"octo's checkpoint {path!r} {what}: name the folder that holds {', '.join(FILES)} and the steps, or hf://org/name"
        )
    steps = sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit() and entry.is_dir())
    if not steps:
        raise ValueError(
            f"octo's checkpoint {path!r} has no steps: the folder has no subfolder with a number as its name"
        )
    if step is not None and step not in steps:
        raise ValueError(f"octo's checkpoint {path!r} has no step {step}; it has {', '.join(map(str, steps))}")


def is_deterministic(model: Any) -> bool:
    """True if the model's head gives the same action whatever the random key."""
    return any(cls.__name__ == DETERMINISTIC for cls in type(model.module.heads["action"]).__mro__)


def action_statistics(statistics: Mapping[str, Any] | None, unnorm_key: str | None) -> Statistics:
    """The statistics that unnormalize the actions.

    :param statistics: the checkpoint's ``dataset_statistics``: ``{"action": ...}`` of a fine-tuned one,
        ``{dataset: {"action": ...}}`` of a pretrained one
    :param unnorm_key: which dataset; None where there is only one
    :raises ValueError: if there is no such dataset, or its actions do not have A dimensions
    """
    found: Mapping[str, Any] = statistics or {}
    datasets = [key for key, value in found.items() if isinstance(value, Mapping) and "action" in value]
    known = ", ".join(sorted(datasets))
    if unnorm_key is None and "action" not in found:
        raise ValueError(
            f"unnorm_key is missing: the checkpoint was trained on several datasets, choose one of {known}"
        )
    if unnorm_key is not None and unnorm_key not in datasets:
        has = f"it has {known}" if known else "it has only one, without a name: leave unnorm_key out"
        raise ValueError(
            f"unnorm_key={unnorm_key!r} is not a dataset of the checkpoint ({has}){closest(unnorm_key, datasets)}"
        )
    action = found["action"] if unnorm_key is None else found[unnorm_key]["action"]
    mean, std = (np.asarray(action[key], np.float32) for key in ("mean", "std"))
    mask = np.asarray(action.get("mask", np.ones(mean.shape)), bool)
    if not mean.shape == std.shape == mask.shape == (ACTION_SIZE,):
        raise ValueError(
            f"the checkpoint's actions have shape {mean.shape}, this teacher's {ACTION_SIZE}: three of position, three of "
            "rotation, gripper"
        )
    return Statistics(mean, std, mask)


def _find(config: Any, key: str) -> Any:
    """The first value of ``key`` anywhere in nested mappings; None if there is none."""
    if not isinstance(config, Mapping):
        return None
    if key in config:
        return config[key]
    return next((value for inner in config.values() if (value := _find(inner, key)) is not None), None)
