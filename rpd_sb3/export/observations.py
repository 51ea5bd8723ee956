"""The observations that an export is compared on, and facts about its environment."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.contract.teacher import GRIPPERS
from rpd_sb3.envs import make_env
from rpd_sb3.envs.factory import is_maniskill
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.episodes.play import episode_steps
from rpd_sb3.export import runtime
from rpd_sb3.export.deploy import camera_view, input_spaces

N_OBSERVATIONS = 256
SEED = 30_000
"""Seed of the first episode that observations are recorded in; training and evaluation use others."""
POSE_ACTION = ["dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper"]
PROPRIOCEPTION = "9 joint positions, 9 joint velocities, position and quaternion (w x y z) of the tool centre point"


class Recorded(NamedTuple):
    """Observations of episodes that the policy has played, and facts about the environment."""

    observations: dict[str, np.ndarray]
    """Input name to ``(n, ...)``; images channels last."""
    environment: dict[str, Any]
    """For the manifest."""


def with_image_size(env_id: str, env_kwargs: Mapping[str, Any], space: spaces.Space) -> dict[str, Any]:
    """The options with ``image_size`` written out, which otherwise depends on the teacher's images.

    :param env_id: environment of the run
    :param env_kwargs: options of the run
    :param space: observation space of the policy
    """
    sizes = [inner.shape[-1] for inner in input_spaces(space).values() if inner.shape and len(inner.shape) == 3]
    if not sizes or "image_size" in env_kwargs or not is_maniskill(env_id):
        return dict(env_kwargs)
    return dict(env_kwargs) | {"image_size": int(sizes[0])}


def record_observations(
    env_id: str, env_kwargs: Mapping[str, Any], model: BaseAlgorithm, n: int = N_OBSERVATIONS
) -> Recorded:
    """The first n observations of seeded episodes that the policy plays deterministically.

    :param env_id: environment of the run
    :param env_kwargs: its options, those of the run
    :param model: gives the actions
    :param n: observations to record
    """
    env = make_env(env_id, **env_kwargs)
    venv = DummyVecEnv([lambda: env])

    def act(obs: Any, episode_starts: np.ndarray) -> np.ndarray:
        return model.predict(obs, deterministic=True)[0]

    def observations() -> Iterator[Any]:
        for seed in itertools.count(SEED):
            venv.seed(seed)
            for step in episode_steps(venv, act):
                yield camera_view(step.obs, env.observation_space)

    try:
        rows = list(itertools.islice(observations(), n))
        names = list(input_spaces(model.observation_space))
        single = not isinstance(rows[0], dict)
        arrays = {name: np.concatenate([row if single else row[name] for row in rows]) for name in names}
        return Recorded(_as_inputs(arrays), facts_of_config(env_id, env_kwargs) | _facts_of(env, env_id))
    finally:
        venv.close()


def read(path: str, specs: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Observations from an ``.npz`` file with an array ``(n, ...)`` for each input.

    :param path: the file
    :param specs: of the inputs
    :raises ValueError: if it is not such a file, or its arrays do not fit
    """
    try:
        arrays = runtime.read_arrays(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"--observations {path} is not an .npz file without pickles: {error}") from error
    names = [spec["name"] for spec in specs]
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(
            f"--observations {path} has {', '.join(arrays) or 'nothing'}, but the policy takes {', '.join(names)}: "
            f"{', '.join(missing)} is missing"
        )
    for spec in specs:
        array = arrays[spec["name"]]
        shape = tuple(spec["shape"])
        dtype = spec["dtype"]
        fits = array.dtype == dtype or (dtype == "float32" and array.dtype.kind == "f")
        if not fits or array.shape[1:] != shape or not len(array):
            raise ValueError(
                f"--observations {path}: {spec['name']} is {array.dtype} {array.shape}, the policy takes {dtype} {('n', *shape)}"
            )
    if len({len(arrays[name]) for name in names}) > 1:
        raise ValueError(f"--observations {path}: the inputs have different numbers of rows")
    return _as_inputs({name: arrays[name] for name in names})


def facts_of_config(env_id: str, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What the id and the options of an environment say about it, for the manifest.

    :param env_id: environment
    :param env_kwargs: its options
    """
    task = TASKS.get(env_id)
    control_mode = env_kwargs.get("control_mode") or ("pd_ee_delta_pose" if task else None)
    closed, opened = GRIPPERS["-1..1"]
    return {
        "id": env_id,
        "env_kwargs": {key: value for key, value in env_kwargs.items() if key != "tokens"},
        "instruction": task.instruction if task else None,
        "control_mode": control_mode,
        "control_freq": None,
        "camera": None,
        "gripper": {"closed": closed, "open": opened} if control_mode == "pd_ee_delta_pose" else None,
    }


def _facts_of(env: gym.Env, env_id: str) -> dict[str, Any]:
    """What a ManiSkill environment says about itself, for the manifest."""
    if not is_maniskill(env_id):
        return {}
    scene: Any = env.unwrapped
    facts: dict[str, Any] = {"control_mode": scene.control_mode, "control_freq": scene.control_freq}
    arm = getattr(scene.agent.controller, "controllers", {}).get("arm")
    if scene.control_mode == "pd_ee_delta_pose" and arm is not None:
        facts["action_scale"] = {"metres": float(arm.config.pos_upper), "radians": float(arm.config.rot_upper)}
    view: Any = env.get_wrapper_attr("view")
    if view.obs != "state":
        config = scene.scene.sensors["base_camera"].config
        facts["camera"] = {
            "name": view.camera,
            "width": view.image_size,
            "height": view.image_size,
            "pose": np.asarray(config.pose.raw_pose[0].cpu(), np.float64).round(6).tolist(),
            "pose_layout": "position x y z in metres, quaternion w x y z, of the camera in the world",
            "fov": None if config.fov is None else float(config.fov),
            "crop": None if view.crop is None else dict(zip(("left", "top", "side"), view.crop)),
            "crop_layout": "square of the camera's image that the policy sees, as shares of it; scaled to width and height",
        }
    if view.obs == "rgb+state":
        facts["state"] = PROPRIOCEPTION
    return facts


def _as_inputs(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays in the dtypes that the graph takes: uint8 or float32."""
    return {
        name: np.ascontiguousarray(array, np.uint8 if array.dtype == np.uint8 else np.float32)
        for name, array in arrays.items()
    }
