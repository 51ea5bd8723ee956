"""An export of any format, ready to act here. Robots do without: see :mod:`rpd_sb3.export.runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3.episodes.play import Actor, pad_to_multiple_of_8
from rpd_sb3.export import architecture, runtime
from rpd_sb3.export.deploy import DeployablePolicy, camera_view, input_spaces, input_specs
from rpd_sb3.export.formats import FILES, load_safetensors, load_torch, torch_act
from rpd_sb3.export.manifest import token_bounds


def load_export(folder: str | Path) -> runtime.Policy:
    """The policy of an export.

    :param folder: of the export
    :raises ValueError: if it is none, is damaged, or its parts do not fit
    """
    manifest = runtime.read_manifest(folder)
    if manifest["format"] == "onnx":
        return runtime.load(folder)
    return runtime.Policy(folder, manifest, _act(Path(folder), manifest))


def _act(folder: Path, manifest: dict[str, Any]) -> runtime.Act:
    if manifest["format"] not in FILES:
        raise ValueError(f"export {str(folder)!r} has format {manifest['format']!r}; known are {', '.join(FILES)}")
    path = runtime.checked_file(folder, manifest, FILES[manifest["format"]])
    specs = manifest["observation"]
    if manifest["format"] == "torch":
        return torch_act(load_torch(path), specs)
    tokens = manifest.get("tokens")
    policy = architecture.build(manifest.get("policy"), str(folder / runtime.MANIFEST))
    load_safetensors(path, policy)
    if [spec["shape"] for spec in input_specs(policy.observation_space)] != [spec["shape"] for spec in specs]:
        raise ValueError(
            f"{str(folder / runtime.MANIFEST)!r}: observation and policy are of different shapes; export the run again"
        )
    return torch_act(DeployablePolicy(policy, tokens is not None, token_bounds(tokens)), specs)


def export_actor(policy: runtime.Policy, space: spaces.Space) -> Actor:
    """The exported policy as :class:`~rpd_sb3.episodes.play.Evaluator` wants it.

    As with :func:`~rpd_sb3.episodes.play.student_actor`, an observation gets the same action whatever the number of environments.

    :param policy: the export
    :param space: the environment's observation space
    """

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        n = len(episode_starts)
        return policy(pad_to_multiple_of_8(camera_view(obs, space), n))[:n]

    return act


def check_observed(policy: runtime.Policy, space: spaces.Space, name: str, env_id: str) -> None:
    """Make sure that the environment shows what the export was trained on.

    :param policy: the export
    :param space: the environment's observations
    :param name: of the export, for the message
    :param env_id: of the environment, for the message
    :raises ValueError: if it shows something else
    """
    trained = policy.manifest["observation"]
    shown = {key: box for key, box in input_spaces(space).items() if isinstance(box, spaces.Box)}
    seen = [(spec["shape"], spec["dtype"]) for spec in input_specs(space)] if len(shown) == len(trained) else []
    names = list(shown) if isinstance(space, spaces.Dict) else [trained[0]["name"]]
    if seen != [(spec["shape"], spec["dtype"]) for spec in trained] or names != [spec["name"] for spec in trained]:
        wanted = ", ".join(f"{spec['name']} {spec['dtype']} {tuple(spec['shape'])}" for spec in trained)
        raise ValueError(f"{name} was trained on {wanted}, but env {env_id!r} shows {space}")


def check_acted(policy: runtime.Policy, space: spaces.Space, name: str, env_id: str) -> None:
    """Make sure that the environment takes what the export gives.

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
