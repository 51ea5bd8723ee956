"""A teacher's spec as the metadata of a model, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.teacher import TeacherSpec
from rpd_sb3.wire import PROTOCOL_VERSION
from rpd_sb3.wire.tensors import ProtocolError

_PLAIN = ("name", "control_mode", "env_id", "stateful", "n_bins", "gripper", "rotation", "rotation_sign", "unnorm_key")
_OPTIONAL = ("stochastic", "n_parameters", "n_bytes")
"""Fields that an older peer neither sends nor reads."""
ASKERS_INPUTS = {"env_id": "INT64", "episode_start": "BOOL", "action": "FP32", "action_tokens": "INT64"}
"""What every query may carry besides the teacher's inputs; teachers with a memory need the first two."""


def metadata(spec: TeacherSpec, name: str, version: str, **extra: Any) -> dict[str, Any]:
    """The model metadata of the Open Inference Protocol, the spec among its parameters.

    :param spec: of the teacher
    :param name: of the model
    :param version: of the library
    :param extra: further parameters
    """
    return {
        "name": name,
        "platform": "rpd_sb3",
        "inputs": [_input(key, spec) for key in [*spec.inputs, *ASKERS_INPUTS]],
        "outputs": [_output(key, spec) for key in sorted(spec.labels)],
        "parameters": {
            "protocol_version": PROTOCOL_VERSION,
            "library_version": version,
            "spec": spec_to_json(spec),
            **extra,
        },
    }


def spec_to_json(spec: TeacherSpec) -> dict[str, Any]:
    """A spec as JSON values."""
    return {
        **{key: getattr(spec, key) for key in _PLAIN + _OPTIONAL},
        "labels": sorted(spec.labels),
        "inputs": list(spec.inputs),
        "action_space": space_to_json(spec.action_space),
        "image_sizes": {camera: list(size) for camera, size in spec.image_sizes.items()},
        "input_shapes": {key: list(shape) for key, shape in spec.input_shapes.items()},
        "token_bounds": None if spec.token_bounds is None else [list(ends) for ends in spec.token_bounds],
    }


def spec_from_json(content: Mapping[str, Any]) -> TeacherSpec:
    """The spec that :func:`spec_to_json` has written.

    :raises ProtocolError: if something is missing or not as it should be
    """
    try:
        return TeacherSpec(
            labels=frozenset(content["labels"]),
            inputs=tuple(content["inputs"]),
            action_space=space_from_json(content["action_space"]),
            image_sizes={camera: (int(h), int(w)) for camera, (h, w) in content["image_sizes"].items()},
            input_shapes={key: tuple(map(int, shape)) for key, shape in content["input_shapes"].items()},
            token_bounds=_bounds(content["token_bounds"]),
            **{key: content[key] for key in _PLAIN},
            stochastic=bool(content.get("stochastic", False)),
            n_parameters=_count(content.get("n_parameters")),
            n_bytes=_count(content.get("n_bytes")),
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, AssertionError) as error:
        raise ProtocolError(f"the teacher's spec cannot be read: {error!r}") from error


def _count(content: Any) -> int | None:
    return None if content is None else int(content)


def _bounds(content: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if content is None:
        return None
    low, high = (tuple(map(float, ends)) for ends in content)
    return low, high


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """An action space as JSON values; null stands for an infinite bound.

    :raises ProtocolError: for other spaces than Box, Discrete and MultiDiscrete
    """
    if isinstance(space, spaces.Box):
        low, high = ([x if np.isfinite(x) else None for x in b.ravel().tolist()] for b in (space.low, space.high))
        return {"type": "Box", "low": low, "high": high, "shape": list(space.shape), "dtype": str(space.dtype)}
    if isinstance(space, spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, spaces.MultiDiscrete):
        nvec, start = space.nvec.tolist(), space.start.tolist()
        return {"type": "MultiDiscrete", "nvec": nvec, "start": start, "dtype": str(space.dtype)}
    raise ProtocolError(f"an action space of type {type(space).__name__} cannot be served")


def space_from_json(content: Mapping[str, Any]) -> spaces.Space:
    """The action space that :func:`space_to_json` has written.

    :raises ProtocolError: for an unknown type
    """
    kind = content["type"]
    if kind == "Box":
        shape, dtype = tuple(content["shape"]), np.dtype(content["dtype"])
        low = np.array([-np.inf if x is None else x for x in content["low"]], dtype).reshape(shape)
        high = np.array([np.inf if x is None else x for x in content["high"]], dtype).reshape(shape)
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Discrete":
        return spaces.Discrete(content["n"], start=content["start"])
    if kind == "MultiDiscrete":
        dtype = np.dtype(content["dtype"]).type
        return spaces.MultiDiscrete(np.array(content["nvec"]), dtype, start=np.array(content["start"]))
    raise ProtocolError(f"the action space has the unknown type {kind!r}")


def input_form(name: str, spec: TeacherSpec) -> tuple[str, tuple[int, ...] | None]:
    """Datatype of an input, and the shape of one row, with -1 for any number; None: any shape.

    :param name: one of the teacher's inputs, or of :data:`ASKERS_INPUTS`
    :param spec: of the teacher
    """
    if name.startswith("images."):
        return "UINT8", (*spec.image_sizes.get(name.removeprefix("images."), (-1, -1)), 3)
    if name == "instruction":
        return "BYTES", ()
    if name in ASKERS_INPUTS:
        return ASKERS_INPUTS[name], None if name.startswith("action") else ()
    return "FP32", spec.input_shapes.get(name)


def _input(name: str, spec: TeacherSpec) -> dict[str, Any]:
    datatype, row = input_form(name, spec)
    return {"name": name, "datatype": datatype, "shape": [-1, *((-1,) if row is None else row)]}


def _output(name: str, spec: TeacherSpec) -> dict[str, Any]:
    actions = list(spec.action_space.shape or ())
    if name == "logits":
        return {"name": name, "datatype": "FP32", "shape": [-1, *actions, spec.n_bins or -1]}
    whole = name == "action" and not isinstance(spec.action_space, spaces.Box)
    return {"name": name, "datatype": "INT64" if whole else "FP32", "shape": [-1, *actions]}
