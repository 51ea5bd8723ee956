"""Loads exports of any format to evaluate them. A robot needs :mod:`rpd_sb3.export.runtime` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3.episodes.play import Actor, pad_to_multiple_of_8
from rpd_sb3.export import runtime
from rpd_sb3.export.deploy import camera_view, input_spaces, input_specs
from rpd_sb3.export.formats import FILES, load_torch, torch_act


def load_export(folder: str | Path) -> runtime.Policy:
    """The policy of an export.

    :param folder: of the export
    :raises ValueError: if it is not an export, or is damaged
    """
    manifest = runtime.read_manifest(folder)
    if manifest["format"] == "onnx":
        return runtime.load(folder)
    if manifest["format"] not in FILES:
        raise ValueError(f"export {str(folder)!r} has format {manifest['format']!r}; known are {', '.join(FILES)}")
    path = runtime.checked_file(folder, manifest, FILES[manifest["format"]])
    return runtime.Policy(folder, manifest, torch_act(load_torch(path), manifest["observation"]))


def export_actor(policy: runtime.Policy, space: spaces.Space) -> Actor:
    """The exported policy as an actor for :class:`~rpd_sb3.episodes.play.Evaluator`.

    As with :func:`~rpd_sb3.episodes.play.student_actor`, an observation gets the same action whatever the number of environments.

    :param policy: the export
    :param space: the environment's observation space
    """

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        n = len(episode_starts)
        return policy(pad_to_multiple_of_8(camera_view(obs, space), n))[:n]

    return act


def check_observed(policy: runtime.Policy, space: spaces.Space, name: str, env_id: str) -> None:
    """Check that an environment shows what the export was trained on.

    :param policy: the export
    :param space: the environment's observations
    :param name: of the export, for the message
    :param env_id: of the environment, for the message
    :raises ValueError: if it shows something else
    """
    trained = policy.manifest["observation"]
    arrays = all(isinstance(inner, spaces.Box) for inner in input_spaces(space).values())
    shown = input_specs(space) if arrays else []
    keys = ("name", "shape", "dtype") if isinstance(space, spaces.Dict) else ("shape", "dtype")
    if [[spec[key] for key in keys] for spec in shown] != [[spec[key] for key in keys] for spec in trained]:
        wanted = ", ".join(f"{spec['name']} {spec['dtype']} {tuple(spec['shape'])}" for spec in trained)
        raise ValueError(f"{name} was trained on {wanted}, but env {env_id!r} shows {space}")


def check_acted(policy: runtime.Policy, space: spaces.Space, name: str, env_id: str) -> None:
    """Check that an environment takes the actions of the export.

    :param policy: the export
    :param space: the environment's actions
    :param name: of the export, for the message
    :param env_id: of the environment, for the message
    :raises ValueError: if it takes other actions
    """
    action = policy.manifest["action"]
    whole = np.issubdtype(space.dtype, np.integer) and not isinstance(space, spaces.MultiBinary)
    if list(space.shape or ()) != action["shape"] or whole != (action["dtype"] == "int64"):
        gives = f"{action['dtype']} actions {tuple(action['shape'])}"
        raise ValueError(f"{name} gives {gives}, but env {env_id!r} takes {space}")
