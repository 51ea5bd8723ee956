"""From a section of a config to checked keyword arguments of an algorithm. Nothing is evaluated."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.utils import LinearSchedule

from rpd_sb3.algos.curriculum import CosineSchedule
from rpd_sb3.contract.names import closest
from rpd_sb3.students import AutoregressivePolicy, PaperCnnPolicy, TokenPolicy

CLASS_KEYS = ("activation_fn", "features_extractor_class", "optimizer_class")
"""Keys of ``policy_kwargs`` whose value is the dotted name of a class."""
NOT_IN_CONFIG = frozenset(
    {
        "self",
        "policy",
        "env",
        "_init_setup_model",
        "seed",
        "device",
        "tensorboard_log",
        "verbose",
        "rollout_buffer_class",
    }
)
"""Constructor arguments that are given on the command line, by the library, or as the run key of that name."""
POLICIES: dict[str, type[BasePolicy]] = {
    "AutoregressivePolicy": AutoregressivePolicy,
    "PaperCnnPolicy": PaperCnnPolicy,
    "TokenPolicy": TokenPolicy,
}
"""Our policies, for PPO and what is built on it."""
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_SCHEDULE = re.compile(r"(lin|cos)_(.+)")
_WANTED = {
    "Mapping": "a mapping",
    "bool": "true or false",
    "Schedule": "a number or a schedule",
    "int": "a whole number",
    "float": "a number",
    "str": "a name",
}


@dataclass
class RunConfig:
    """One section, checked. The fields are the run keys; everything else is in ``hyperparams``."""

    n_timesteps: int = 100_000
    """Environment steps to train for."""
    n_envs: int = 1
    policy: str | None = None
    """SB3's name of the policy, or one of :data:`POLICIES`; None: SB3's that fits the observations."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of :func:`rpd_sb3.envs.make_env`."""
    teacher: str | None = None
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    vec_teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of :class:`rpd_sb3.envs.VecTeacher`: ``timeout``, ``on_failure``."""
    warm_start: str | None = None
    """``.zip`` of a saved model of the same policy, whose weights training begins with."""
    hyperparams: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the algorithm as written in the file; :func:`build_hyperparams` makes objects of them."""

    def as_dict(self) -> dict[str, Any]:
        """The flat section that gives this config again; empty keys are left out."""
        keys = {name: getattr(self, name) for name in RUN_KEYS}
        return {k: v for k, v in (keys | self.hyperparams).items() if v is not None and v != {}}


RUN_KEYS = tuple(name for name in RunConfig.__dataclass_fields__ if name != "hyperparams")
VEC_TEACHER_KEYS = ("timeout", "on_failure")


def check_section(section: Mapping[str, Any], algo: type[BaseAlgorithm]) -> RunConfig:
    """Check every key and the type of its value.

    :param section: flat mapping, as in the file
    :param algo: whose constructor arguments are allowed
    :raises ValueError: for the first key or value that cannot be right
    """
    known = hyperparameters(algo)
    config = RunConfig()
    for key, raw in section.items():
        value = _numbers(raw)
        if key in known:
            config.hyperparams[key] = _typed(key, value, known[key].annotation)
        elif key in ("n_timesteps", "n_envs"):
            setattr(config, key, _typed(key, value, int))
            if getattr(config, key) < 1:
                raise ValueError(f"{key}={raw!r} must be at least 1")
        elif key in RUN_KEYS and key.endswith("_kwargs"):
            setattr(config, key, _mapping(key, value))
        elif key in RUN_KEYS:
            if not (raw is None or isinstance(raw, str)):
                raise ValueError(f"{key}={raw!r} must be a name")
            setattr(config, key, raw)
        else:
            names = sorted([*known, *RUN_KEYS])
            raise ValueError(
                f"unknown key {key!r} for {algo.__name__}{closest(str(key), names) or '; known are ' + ', '.join(names)}"
            )
    if config.policy is not None:
        policy_class(config.policy, algo)
    for key in config.vec_teacher_kwargs:
        if key not in VEC_TEACHER_KEYS:
            raise ValueError(f"unknown key {key!r} in vec_teacher_kwargs; known are {', '.join(VEC_TEACHER_KEYS)}")
    _check_batch(config, known)
    build_hyperparams(config, algo)
    return config


def policy_class(name: str, algo: type[BaseAlgorithm]) -> type[BasePolicy]:
    """The policy of that name.

    :raises ValueError: if the algorithm has none
    """
    known = dict(algo.policy_aliases) | (POLICIES if issubclass(algo, PPO) else {})
    if name not in known:
        raise ValueError(
            f"policy {name!r} is unknown; {algo.__name__} has {', '.join(known)}{closest(name, list(known))}"
        )
    return known[name]


def hyperparameters(algo: type[BaseAlgorithm]) -> dict[str, inspect.Parameter]:
    """Constructor arguments that a config may set."""
    return {name: parameter for name, parameter in _parameters(algo).items() if name not in NOT_IN_CONFIG}


def _parameters(owner: type) -> dict[str, inspect.Parameter]:
    """Constructor arguments; a class that passes ``**kwargs`` on has its own and those of the next class."""
    result: dict[str, inspect.Parameter] = {}
    for cls in owner.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__dict__["__init__"]).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                result.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return result


def build_hyperparams(config: RunConfig, algo: type[BaseAlgorithm]) -> dict[str, Any]:
    """Keyword arguments for the algorithm: schedules and classes instead of their names.

    :raises ValueError: for a schedule or a class that does not exist
    """
    known = hyperparameters(algo)
    built = {key: _schedule(key, value, known[key].annotation) for key, value in config.hyperparams.items()}
    if "policy_kwargs" in built:
        built["policy_kwargs"] = _policy_kwargs(built["policy_kwargs"], config.policy, algo)
    return built


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as a string; make numbers of such strings, at any depth."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _typed(key: str, value: Any, annotation: Any) -> Any:
    """The value, if the annotation allows it; a whole float where an int is due becomes one."""
    types = _types(annotation)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not types & _WANTED.keys() or (value is None and "None" in types):
        return value
    if "Mapping" in types:
        return _mapping(key, value)
    if ("bool" in types and isinstance(value, bool)) or ("str" in types and isinstance(value, str)):
        return value
    if number and "int" in types and float(value).is_integer():
        return int(value)
    if number and "float" in types and math.isfinite(value):
        return value
    if "Schedule" in types and isinstance(value, str):
        return value  # looked at by _schedule
    wanted = next(text for name, text in _WANTED.items() if name in types)
    schedule = isinstance(value, str) and _SCHEDULE.fullmatch(value)
    raise ValueError(f"{key}={value!r} must be {wanted}{', it takes no schedule' if schedule else ''}")


def _types(annotation: Any) -> set[str]:
    """The simple types that an annotation, an object or a string, names; empty if there are none."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r"(\w+\.)*Callable\[\[float\], float\]", "Schedule", text).replace("Optional", "None")
    text = re.sub(r"[dD]ict\[.*?\]", "Mapping", text)
    return set(re.findall(r"\b(?:int|float|bool|str|Schedule|Mapping|None)\b", text))


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(
            f"{key} must be a mapping, e.g. {key}: {{name: value}}, got {value!r}; strings are not evaluated"
        )
    return value


def _schedule(key: str, value: Any, annotation: Any) -> Any:
    if not (isinstance(value, str) and "Schedule" in _types(annotation)):
        return value
    match = _SCHEDULE.fullmatch(value)
    try:
        if match is None:
            raise ValueError
        start = float(match[2])
    except ValueError:
        raise ValueError(f"{key}={value!r} must be a number, or a schedule like lin_3e-4 or cos_1.0") from None
    return LinearSchedule(start, 0.0, 1.0) if match[1] == "lin" else CosineSchedule(start)


def _policy_kwargs(kwargs: dict[str, Any], policy: str | None, algo: type[BaseAlgorithm]) -> dict[str, Any]:
    parameters = _parameters(policy_class(policy or next(iter(algo.policy_aliases)), algo))
    known = [name for name in parameters if not name.endswith("_space") and name not in ("self", "lr_schedule")]
    for key in kwargs:
        if key not in known:
            raise ValueError(
                f"unknown key {key!r} in policy_kwargs{closest(key, known) or '; known are ' + ', '.join(known)}"
            )
    return {key: _class(key, value) if key in CLASS_KEYS else value for key, value in kwargs.items()}


def _class(key: str, name: Any) -> type:
    """The class that a dotted name like ``torch.nn.ReLU`` stands for."""
    module, dot, attribute = str(name).rpartition(".")
    try:
        if not dot:
            raise ImportError("no module named")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"policy_kwargs.{key}={name!r} must be the full name of a class, e.g. torch.nn.ReLU ({error})"
        ) from error
    if not isinstance(found, type):
        raise ValueError(f"policy_kwargs.{key}={name!r} is no class")
    return found


def _check_batch(config: RunConfig, known: Mapping[str, inspect.Parameter]) -> None:
    """SB3 only warns when a minibatch is larger than the rollout."""
    if not known.keys() >= {"n_steps", "batch_size"}:
        return
    n_steps, batch_size = (config.hyperparams.get(key, known[key].default) for key in ("n_steps", "batch_size"))
    if batch_size is not None and batch_size > n_steps * config.n_envs:
        raise ValueError(
            f"batch_size={batch_size} is larger than a rollout of n_steps * n_envs = "
            f"{n_steps} * {config.n_envs} = {n_steps * config.n_envs} transitions"
        )
