"""Two views of one observation: what the student sees, and what the teacher sees.

An observation may carry entries under ``teacher/``. The student never sees them; if one other entry is left, it stands
for itself, so that the student's space is a plain Box. An observation without such entries is shown to both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.contract.bins import token_bins
from rpd_sb3.contract.teacher import TEACHER_PREFIX, TeacherSpec


def _has_teacher_view(space: spaces.Space) -> bool:
    return isinstance(space, spaces.Dict) and any(key.startswith(TEACHER_PREFIX) for key in space.spaces)


def student_keys(space: spaces.Space) -> list[str] | None:
    """Entries that the student sees; None if it sees the observation as it is.

    :raises ValueError: if nothing is left for the student
    """
    if not _has_teacher_view(space):
        return None
    assert isinstance(space, spaces.Dict)
    keys = [key for key in space.spaces if not key.startswith(TEACHER_PREFIX)]
    if not keys:
        raise ValueError(
            f"the observation has only teacher entries ({', '.join(space.spaces)}): the student sees nothing"
        )
    return keys


def student_space(space: spaces.Space) -> spaces.Space:
    """The student's observation space."""
    seen = student_view(space, student_keys(space))
    return spaces.Dict(seen) if isinstance(seen, dict) else seen


def student_view(obs: Any, keys: list[str] | None) -> Any:
    """The student's part of an observation, single or batched.

    :param obs: an observation of the space that ``keys`` was made from
    :param keys: result of :func:`student_keys`
    """
    if keys is None:
        return obs
    return obs[keys[0]] if len(keys) == 1 else {key: obs[key] for key in keys}


def teacher_spaces(space: spaces.Space) -> dict[str, spaces.Space]:
    """Teacher input name to its space. A lone Box goes by ``state``, or ``images.base`` if it is an image."""
    if _has_teacher_view(space):
        assert isinstance(space, spaces.Dict)
        return {k[len(TEACHER_PREFIX) :]: v for k, v in space.spaces.items() if k.startswith(TEACHER_PREFIX)}
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    return {"images.base" if len(space.shape or ()) == 3 else "state": space}


def teacher_view(obs: Any, space: spaces.Space, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Copies of the teacher's inputs from a batched observation.

    :param obs: batched observation of ``space``
    :param space: observation space of the environment
    :param names: inputs that the teacher wants; ``instruction`` is not part of the observation
    """
    prefix = TEACHER_PREFIX if _has_teacher_view(space) else ""
    alone = not isinstance(space, spaces.Dict)
    return {name: np.array(obs if alone else obs[prefix + name]) for name in names if name != "instruction"}


def check_spec(spec: TeacherSpec, observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """Check that a teacher fits an environment.

    :raises ValueError: naming the first thing that does not fit
    """
    if "logits" in spec.labels and spec.n_bins is None:
        raise ValueError(f"teacher {spec.name!r} gives logits, but its spec has no n_bins: set it to their number")
    n_bins = token_bins(action_space)
    if n_bins is not None and spec.n_bins not in (None, n_bins):
        raise ValueError(f"teacher {spec.name!r} has {spec.n_bins} bins, but the environment's actions have {n_bins}")
    if not _same_actions(spec.action_space, action_space):
        raise ValueError(
            f"teacher {spec.name!r} gives actions of {spec.action_space}, but the environment takes {action_space}; "
            "choose the teacher made for this environment and control mode, or rescale the actions"
        )
    given = teacher_spaces(observation_space)
    for name in spec.inputs:
        if name != "instruction" and name not in given:
            raise ValueError(
                f"teacher {spec.name!r} needs the input {name!r}, but the environment shows it {sorted(given)}; "
                f"add it to the observation as {TEACHER_PREFIX + name!r}"
            )
    for name, shape in spec.input_shapes.items():
        if name in given and given[name].shape != tuple(shape):
            raise ValueError(
                f"teacher {spec.name!r} needs the input {name!r} of shape {tuple(shape)}, "
                f"but the environment gives {given[name].shape}"
            )
    for camera, size in spec.image_sizes.items():
        space = given.get(f"images.{camera}")
        if space is not None and space.shape is not None and tuple(space.shape[:2]) != tuple(size):
            raise ValueError(
                f"teacher {spec.name!r} needs images of {size[0]}x{size[1]} pixels from camera {camera!r}, "
                f"but the environment gives {space.shape[0]}x{space.shape[1]}; set image_size"
            )


def check_instructions(spec: TeacherSpec, instructions: Sequence[str | None]) -> np.ndarray | None:
    """The instructions as an array (N,) of str; None if the teacher does not want any.

    :raises ValueError: if it does, and an environment has none
    """
    if "instruction" not in spec.inputs:
        return None
    if not all(instructions):
        raise ValueError(
            f"teacher {spec.name!r} needs an instruction, but the environment has none: give it as instruction='...'"
        )
    return np.array(instructions)


def find_instructions(spec: TeacherSpec, venv: VecEnv, instruction: str | None) -> np.ndarray | None:
    """The instructions of all environments (N,); None if the teacher does not want any.

    :param instruction: for all of them; None: each environment's attribute ``instruction``
    :raises ValueError: if the teacher wants them, and an environment has none
    """
    from_envs = instruction is None and venv.has_attr("instruction")
    return check_instructions(spec, venv.get_attr("instruction") if from_envs else [instruction] * venv.num_envs)


def _same_actions(a: spaces.Space, b: spaces.Space) -> bool:
    if isinstance(a, spaces.Box) and token_bins(b) is not None:  # tokens stand for actions in [-1, 1]
        return a.shape == b.shape and bool(np.all(a.low == -1.0) and np.all(a.high == 1.0))
    if isinstance(a, spaces.Box) and isinstance(b, spaces.Box):
        return a.shape == b.shape and np.allclose(a.low, b.low) and np.allclose(a.high, b.high)
    return a == b
