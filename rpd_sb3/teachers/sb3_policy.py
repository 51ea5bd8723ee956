"""Any saved Stable-Baselines3 policy as a teacher."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from sb3_contrib import QRDQN, TQC, RecurrentPPO
from stable_baselines3 import DQN, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space_channels_first

from rpd_sb3.contract.teacher import Labels, LocalTeacher, Query, TeacherSpec

_ALGORITHM_OF_POLICY: dict[str, type[BaseAlgorithm]] = {
    "stable_baselines3.common.policies": PPO,  # and every other algorithm with an actor-critic policy
    "stable_baselines3.dqn.policies": DQN,
    "stable_baselines3.sac.policies": SAC,
    "stable_baselines3.td3.policies": TD3,
    "sb3_contrib.qrdqn.policies": QRDQN,
    "sb3_contrib.tqc.policies": TQC,
}


class SB3Teacher(LocalTeacher):
    """Labels with the deterministic action of a trained SB3 model.

    The teacher's inputs follow from the model's observation space: ``state`` for a vector, ``images.<camera>`` for an
    image, the keys of a Dict. A recurrent policy cannot teach: SB3 gives no way to ask it about single observations.

    :param model: a trained SB3 or sb3-contrib model, or the ``.zip`` file of one (:func:`load_sb3_model`)
    :param name: shown in messages; None: ``sb3``, or ``sb3:FILE``
    :param camera: whose images the input of an image policy is
    :raises ValueError: for a recurrent policy, or a file that cannot be loaded
    """

    def __init__(self, model: BaseAlgorithm | str, name: str | None = None, camera: str = "human") -> None:
        if isinstance(model, str):
            name = name or f"sb3:{model}"
            model = load_sb3_model(model)
        name = name or "sb3"
        space: Any = model.observation_space
        if hasattr(model.policy, "lstm_actor"):
            raise ValueError(
                f"teacher {name!r} is recurrent: its answer depends on a history, which a query does not hold"
            )
        super().__init__()
        self._model = model
        image = isinstance(space, spaces.Box) and len(space.shape) == 3
        self._single = None if isinstance(space, spaces.Dict) else f"images.{camera}" if image else "state"
        given = space.spaces if self._single is None else {self._single: space}
        sizes: Mapping[str, tuple[int, int]] = {}
        if image:
            height = 1 if is_image_space_channels_first(space) else 0
            sizes = {camera: (space.shape[height], space.shape[height + 1])}
        self.spec = TeacherSpec(
            name,
            frozenset({"action"}),
            tuple(given),
            model.action_space,
            image_sizes=sizes,
            input_shapes={key: tuple(s.shape or ()) for key, s in given.items() if not key.startswith("images.")},
            n_parameters=sum(parameter.numel() for parameter in model.policy.parameters()),
            n_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.policy.parameters()),
        )

    def label(self, query: Query) -> Labels:
        obs: Any = dict(query.inputs) if self._single is None else query.inputs[self._single]
        action, _ = self._model.predict(obs, deterministic=True)
        return {"action": np.asarray(action)}


def load_sb3_model(path: str, device: str = "cpu") -> BaseAlgorithm:
    """Load a model that SB3, sb3-contrib or this library has saved, whatever its algorithm.

    Only load files that you trust: SB3 keeps the policy's classes as pickles in them.

    :param path: the ``.zip`` file
    :param device: where its network runs
    :raises ValueError: if there is no such file, it is damaged, or its algorithm is unknown
    """
    return _algorithm_of(read_model_data(path), path).load(path, device=device)


def read_model_data(path: str) -> dict[str, Any]:
    """The attributes of a saved model, without unpickling anything; the whole file is checked.

    :param path: the ``.zip`` file
    :raises ValueError: if there is no such file, or it is damaged
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"model {path!r} does not exist")
    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
            damaged = archive.testzip()
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model {path!r} is not a zip file written by SB3's save(): {error}") from error
    if damaged is not None:
        raise ValueError(f"model {path!r} is damaged: {damaged} fails its checksum")
    return data


def _algorithm_of(data: dict[str, Any], path: str) -> type[BaseAlgorithm]:
    """The class to load with. SB3 does not save it, but the module of the policy's class tells."""
    module = data.get("policy_class", {}).get("__module__", "")
    if "recurrent" in module:
        return RecurrentPPO
    if module in _ALGORITHM_OF_POLICY:
        return _ALGORITHM_OF_POLICY[module]
    if "gae_lambda" in data:  # an on-policy algorithm with a policy class of the user's
        return PPO
    raise ValueError(f"model {path!r} has a policy of module {module!r}; known are {', '.join(_ALGORITHM_OF_POLICY)}")
