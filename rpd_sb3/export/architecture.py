"""A policy's class, arguments and spaces as data, and the policy of such data: what bare weights need to act."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

CLASSES: dict[str, type] = {
    "activation_fn": nn.Module,
    "features_extractor_class": BaseFeaturesExtractor,
    "optimizer_class": th.optim.Optimizer,
}
"""Arguments that are classes, and what they have to be."""
TRUSTED = ("torch", "stable_baselines3", "sb3_contrib", "rpd_sb3")
"""Packages that a manifest may name classes of; those of others have to be imported already."""


def describe(policy: ActorCriticPolicy) -> dict[str, Any]:
    """The architecture, ready for JSON.

    :param policy: the policy
    :raises ValueError: for an argument that is no data
    """
    arguments = policy._get_constructor_parameters()
    arguments |= {
        "share_features_extractor": policy.share_features_extractor,  # SB3 2.9 forgets it
        "normalize_images": policy.normalize_images,
    }
    for key in ("observation_space", "action_space", "lr_schedule"):
        arguments.pop(key, None)
    if not policy.use_sde:  # SB3 gives None for what only gSDE has
        for key in ("squash_output", "full_std", "use_expln"):
            arguments.pop(key, None)
    return {
        "class": _name(type(policy)),
        "kwargs": {key: _data(key, value) for key, value in arguments.items()},
        "observation_space": _space(policy.observation_space),
        "action_space": _space(policy.action_space),
    }


def build(described: Any, name: str) -> ActorCriticPolicy:
    """The policy, with weights that still have to be loaded.

    :param described: of :func:`describe`
    :param name: shown in messages
    :raises ValueError: if the data describe none
    """
    try:
        policy_class = _find(described["class"], ActorCriticPolicy)
        kwargs = {k: _find(v, CLASSES[k]) if k in CLASSES else v for k, v in described["kwargs"].items()}
        observation_space, action_space = map(_made, (described["observation_space"], described["action_space"]))
        policy = policy_class(observation_space, action_space, lambda _: 0.0, **kwargs)
    except (KeyError, TypeError, AttributeError, AssertionError, ValueError) as error:
        raise ValueError(f"{name} describes no policy that can be made here: {error}") from error
    policy.set_training_mode(False)
    return policy


def _name(found: type) -> str:
    return f"{found.__module__}.{found.__qualname__}"


def _data(key: str, value: Any) -> Any:
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, dict):
        return {str(k): _data(key, v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(key, v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"policy_kwargs.{key}={value!r} cannot be written as data: use --format onnx or torch")


def _find(name: str, kind: type) -> Any:
    """The class of that name, if it is of the kind wanted and of a package that may be imported."""
    module, _, attribute = name.rpartition(".")
    if module.split(".")[0] not in TRUSTED and module not in sys.modules:
        raise ValueError(f"class {name!r} is of a package that is not known: import {module} first if you trust it")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"class {name!r} does not exist here: {error}") from error
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{name!r} is no {kind.__name__}")
    return found


def _space(space: spaces.Space) -> dict[str, Any]:
    if isinstance(space, spaces.Dict):
        return {"type": "Dict", "spaces": {key: _space(inner) for key, inner in space.spaces.items()}}
    if isinstance(space, spaces.Box):
        low, high = ([None if np.isinf(x) else x for x in end.flatten().tolist()] for end in (space.low, space.high))
        if len(set(low)) == len(set(high)) == 1:  # an image need not list every pixel
            low, high = low[:1], high[:1]
        return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        return {"type": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, spaces.MultiBinary):
        return {"type": "MultiBinary", "shape": list(space.shape)}
    raise ValueError(f"space {space} cannot be written as data")


def _made(data: dict[str, Any]) -> spaces.Space:
    kind = data["type"]
    if kind == "Dict":
        return spaces.Dict([(key, _made(inner)) for key, inner in data["spaces"].items()])
    if kind == "Discrete":
        return spaces.Discrete(data["n"], start=data["start"])
    if kind == "MultiDiscrete":
        return spaces.MultiDiscrete(data["nvec"])
    if kind == "MultiBinary":
        return spaces.MultiBinary(data["shape"])
    if kind != "Box":
        raise ValueError(f"space {kind!r} is unknown")
    shape, low, high = tuple(data["shape"]), _bound(data, "low", -np.inf), _bound(data, "high", np.inf)
    return spaces.Box(np.broadcast_to(low, shape), np.broadcast_to(high, shape), dtype=low.dtype.type)


def _bound(data: dict[str, Any], key: str, end: float) -> Any:
    """One bound of a Box; null is infinity, and one number is that of all values."""
    array = np.array([end if value is None else value for value in data[key]], np.dtype(data["dtype"]))
    return array if len(array) == 1 else array.reshape(data["shape"])
