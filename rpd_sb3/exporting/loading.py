"""An export of any format, ready to act here. Robots do without: see :mod:`rpd_sb3.runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3 import runtime
from rpd_sb3.evaluation import Actor
from rpd_sb3.exporting import architecture
from rpd_sb3.exporting.deploy import DeployablePolicy, camera_view, input_specs
from rpd_sb3.exporting.formats import FILES, load_safetensors, load_torch, torch_act
from rpd_sb3.exporting.manifest import token_bounds


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
    if [spec["shape"] for spec in input_specs(policy.observation_space)] != [
        s["shape"] for s in manifest["observation"]
    ]:
        raise ValueError(
            f"{str(folder / runtime.MANIFEST)!r}: observation and policy are of different shapes; export the run again"
        )
    return torch_act(DeployablePolicy(policy, tokens is not None, token_bounds(tokens)), specs)


def export_actor(policy: runtime.Policy, space: spaces.Space) -> Actor:
    """The exported policy as :class:`~rpd_sb3.evaluation.Evaluator` wants it.

    As with :func:`~rpd_sb3.evaluation.student_actor`, an observation gets the same action whatever the number of environments.

    :param policy: the export
    :param space: the environment's observation space
    """

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        n = len(episode_starts)
        rows = np.arange(-(-n // 8) * 8) % n
        seen = camera_view(obs, space)
        return policy({k: v[rows] for k, v in seen.items()} if isinstance(seen, dict) else seen[rows])[:n]

    return act


def check_fits(policy: runtime.Policy, name: str, env_id: str, space: spaces.Space, action_space: spaces.Space) -> None:
    """Make sure that an export can act in an environment.

    :param policy: the export
    :param name: of it, shown in messages
    :param env_id: environment
    :param space: what it shows
    :param action_space: what it takes
    :raises ValueError: if it shows something else than the export was trained on, or takes other actions
    """
    trained = policy.manifest["observation"]
    try:
        seen = [(spec["shape"], spec["dtype"]) for spec in input_specs(space)]
    except AssertionError:
        seen = []
    names = list(space.spaces) if isinstance(space, spaces.Dict) else [trained[0]["name"]]
    if seen != [(spec["shape"], spec["dtype"]) for spec in trained] or names != [spec["name"] for spec in trained]:
        wanted = ", ".join(f"{spec['name']} {spec['dtype']} {tuple(spec['shape'])}" for spec in trained)
        raise ValueError(f"{name} was trained on {wanted}, but env {env_id!r} shows {space}")
    action = policy.manifest["action"]
    whole = np.issubdtype(action_space.dtype, np.integer)
    if list(action_space.shape or ()) != action["shape"] or whole != (action["dtype"] == "int64"):
        raise ValueError(
            f"{name} gives {action['dtype']} actions {tuple(action['shape'])}, but env {env_id!r} takes {action_space}"
        )
