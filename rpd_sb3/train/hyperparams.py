"""From a section of a config to checked keyword arguments of an algorithm.

A config is data: of what it names, only schedules and the classes of :data:`CLASSES` become objects.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule

from rpd_sb3.algos.curriculum import CosineSchedule
from rpd_sb3.cli.config import typed, with_numbers
from rpd_sb3.contract.names import closest
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import AutoregressivePolicy, PaperCnnPolicy, TokenPolicy

CLASSES: dict[str, tuple[type, str]] = {
    "activation_fn": (th.nn.Module, "torch.nn.ReLU"),
    "features_extractor_class": (BaseFeaturesExtractor, "stable_baselines3.common.torch_layers.NatureCNN"),
    "optimizer_class": (th.optim.Optimizer, "torch.optim.AdamW"),
}
"""Keys of ``policy_kwargs`` whose value is the dotted name of a class: the class that it must inherit from, and an example."""
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
_SCHEDULE = re.compile(r"(lin|cos)_([^_]+)|lin_([^_]+)_([^_]+)")


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
    """Options of :class:`rpd_sb3.labelling.VecTeacher`: ``timeout``, ``on_failure``, ``patience``, ``instruction``,
    ``take_over_steps``, ``take_over_at_start``."""
    warm_start: str | None = None
    """``.zip`` of a saved model of the same policy, whose weights training begins with."""
    hyperparams: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the algorithm as written in the file; :func:`build_hyperparams` makes objects of them."""

    def as_dict(self) -> dict[str, Any]:
        """The flat section that gives this config again; empty keys are left out."""
        keys = {name: getattr(self, name) for name in RUN_KEYS}
        return {k: v for k, v in (keys | self.hyperparams).items() if v is not None and v != {}}


RUN_KEYS = tuple(name for name in RunConfig.__dataclass_fields__ if name != "hyperparams")
NOT_OF_VEC_TEACHER = frozenset({"self", "venv", "teacher", "seed", "wait", "label_fraction", "teacher_share"})
"""Arguments of VecTeacher that the library gives; ``label_fraction`` and ``teacher_share`` are those of the algorithms."""


def check_section(section: Mapping[str, Any], algo: type[BaseAlgorithm]) -> RunConfig:
    """The config of a section, every key and the type of every value checked.

    :param section: flat mapping, as in the file
    :param algo: whose constructor arguments are allowed
    :raises ValueError: for the first key or value that cannot be right
    """
    known = hyperparameters(algo)
    config = RunConfig()
    for key, raw in section.items():
        value = with_numbers(raw)
        if key in known:
            config.hyperparams[key] = typed(key, value, known[key].annotation)
        elif key in ("n_timesteps", "n_envs"):
            setattr(config, key, typed(key, value, int))
            if getattr(config, key) < 1:
                raise ValueError(f"{key}={raw!r} must be at least 1")
        elif key in RUN_KEYS and key.endswith("_kwargs"):
            setattr(config, key, typed(key, value, dict))
        elif key in RUN_KEYS:
            setattr(config, key, typed(key, raw, str | None))
        else:
            _check_key(key, f"for {algo.__name__}", sorted([*known, *RUN_KEYS]))
    if config.policy is not None:
        policy_class(config.policy, algo)
    config.vec_teacher_kwargs = _vec_teacher_kwargs(config.vec_teacher_kwargs)
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
    """Constructor arguments with types for annotations; a class that passes ``**kwargs`` on has also those of the next class."""
    result: dict[str, inspect.Parameter] = {}
    for cls in owner.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__dict__["__init__"], eval_str=True).parameters
        for name, parameter in parameters.items():
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                result.setdefault(name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return result


def build_hyperparams(config: RunConfig, algo: type[BaseAlgorithm]) -> dict[str, Any]:
    """Keyword arguments for the algorithm: schedules and classes instead of their names.

    :raises ValueError: for an unknown schedule, or a class that is missing or not of the kind that its place takes
    """
    known = hyperparameters(algo)
    built = {key: _schedule(key, value, known[key].annotation) for key, value in config.hyperparams.items()}
    if built.get("policy_kwargs"):
        built["policy_kwargs"] = _policy_kwargs(built["policy_kwargs"], config.policy, algo)
    return built


def _schedule(key: str, value: Any, annotation: Any) -> Any:
    if not isinstance(value, str) or not any(get_origin(option) is Callable for option in get_args(annotation)):
        return value
    match = _SCHEDULE.fullmatch(value)
    try:
        if match is None:
            raise ValueError
        start, end = float(match[2] or match[3]), float(match[4] or 1.0)
        if not 0.0 < end <= 1.0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{key}={value!r} must be a number, or a schedule like lin_3e-4, cos_1.0, or lin_1.0_0.6, which is 0 from 60 % "
            "of training on"
        ) from None
    return CosineSchedule(start) if match[1] == "cos" else LinearSchedule(start, 0.0, end)


def _vec_teacher_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = _parameters(VecTeacher)
    known = [name for name in parameters if name not in NOT_OF_VEC_TEACHER]
    for key in kwargs:
        _check_key(key, "in vec_teacher_kwargs", known)
    return {key: typed(f"vec_teacher_kwargs.{key}", value, parameters[key].annotation) for key, value in kwargs.items()}


def _policy_kwargs(kwargs: dict[str, Any], policy: str | None, algo: type[BaseAlgorithm]) -> dict[str, Any]:
    parameters = _parameters(policy_class(policy or next(iter(algo.policy_aliases)), algo))
    known = [name for name in parameters if not name.endswith("_space") and name not in ("self", "lr_schedule")]
    for key in kwargs:
        _check_key(key, "in policy_kwargs", known)
    return {key: _class(key, value) if key in CLASSES else value for key, value in kwargs.items()}


def _check_key(key: object, where: str, known: list[str]) -> None:
    if key not in known:
        hint = closest(str(key), known) or f"; known are {', '.join(known)}"
        raise ValueError(f"unknown key {key!r} {where}{hint}")


def _class(key: str, name: Any) -> type:
    """The class that a dotted name like ``torch.nn.ReLU`` stands for.

    All that a name can make happen is the import of a module; a class that its place does not take is never called.

    :raises ValueError: if there is no such class, or it does not inherit from what its place takes
    """
    base, example = CLASSES[key]
    expected = f"policy_kwargs.{key}={name!r} must be the full name of a subclass of {base.__name__}, e.g. {example}"
    module, _, attribute = str(name).rpartition(".")
    if not all(part.isidentifier() for part in [*module.split("."), attribute]):
        raise ValueError(expected)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{expected} ({error})") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(expected)
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
