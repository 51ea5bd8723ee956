"""From a section of a YAML file to checked keyword arguments. A config is data: nothing in it is evaluated."""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.utils import LinearSchedule

CLASS_KEYS = ("activation_fn", "features_extractor_class", "optimizer_class")
"""Keys of ``policy_kwargs`` whose value is the dotted name of a class."""
NOT_IN_CONFIG = frozenset(
    {"self", "policy", "env", "_init_setup_model", "seed", "device", "tensorboard_log", "verbose", "rollout_buffer_class"}
)
"""Constructor arguments that are given on the command line, by the library, or as the run key of that name."""
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
_SCHEDULE = re.compile(r"(lin|cos)_(.+)")


class CosineSchedule:
    """From ``start`` to 0 along half a cosine: flat at both ends.

    :param start: value at the beginning of training
    """

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, progress_remaining: float) -> float:
        return self.start * 0.5 * (1.0 + math.cos(math.pi * (1.0 - progress_remaining)))

    def __repr__(self) -> str:
        return f"CosineSchedule(start={self.start})"


@dataclass
class RunConfig:
    """One section, checked. The fields are the run keys; everything else is in ``hyperparams``."""

    n_timesteps: int = 100_000
    """Environment steps to train for."""
    n_envs: int = 1
    policy: str | None = None
    """SB3's name of the policy; None: the one that fits the observations."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of :func:`rpd_sb3.envs.make_env`."""
    teacher: str | None = None
    teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    vec_teacher_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of :class:`rpd_sb3.envs.VecTeacher`: ``timeout``, ``on_failure``."""
    hyperparams: dict[str, Any] = field(default_factory=dict)
    """Constructor arguments of the algorithm as written in the file; :func:`build_hyperparams` makes objects of them."""

    def as_dict(self) -> dict[str, Any]:
        """The flat section that gives this config again; empty keys are left out."""
        keys = {name: getattr(self, name) for name in RUN_KEYS}
        return {k: v for k, v in (keys | self.hyperparams).items() if v is not None and v != {}}


RUN_KEYS = tuple(name for name in RunConfig.__dataclass_fields__ if name != "hyperparams")
VEC_TEACHER_KEYS = ("timeout", "on_failure")


# Files and sections ---------------------------------------------------------------------------------------------------


def find_config(algo: str) -> Path:
    """The file that comes with the library: package data, or ``zoo_configs/`` next to the package.

    :raises ValueError: if there is none for this algorithm
    """
    package = Path(str(resources.files("rpd_sb3")))
    for folder in (package / "zoo_configs", package.parent / "zoo_configs"):
        if (folder / f"{algo}.yml").is_file():
            return folder / f"{algo}.yml"
    raise ValueError(f"there is no zoo_configs/{algo}.yml; name a file with --conf-file")


def load_yaml(path: Path) -> dict[str, Any]:
    """A YAML file as a mapping.

    :raises ValueError: if it is missing, unreadable, or no mapping
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config file {str(path)!r} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"config file {path}{line}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config file {path}: expected a mapping at the top, got {type(content).__name__}")
    return content


def load_section(path: Path, env_id: str, *, reward: str | None = None, section: str | None = None) -> dict[str, Any]:
    """The section for an environment: ``section`` if it is named, else the first of ``<env_id>-<reward>``, ``<env_id>``, ``default``.

    :param path: file whose keys are section names
    :param env_id: environment
    :param reward: asked for on the command line
    :param section: name of the section, whatever the environment
    :raises ValueError: naming the sections of the file, if none fits
    """
    sections = load_yaml(path)
    names = [section] if section else [f"{env_id}-{reward}"] * bool(reward) + [env_id, "default"]
    for name in names:
        if name in sections:
            content = sections[name]
            if not isinstance(content, dict):
                raise ValueError(f"config file {path}, section {name!r}: expected a mapping, got {content!r}")
            return content
    raise ValueError(
        f"config file {path} has no section {' or '.join(map(repr, names))}, only {', '.join(sections)}"
        + closest(names[0], sections)
    )


# Command line ---------------------------------------------------------------------------------------------------------


def parse_pairs(pairs: Iterable[str], flag: str) -> dict[str, Any]:
    """``["gamma:0.8", "policy_kwargs.log_std_init:-1"]`` as a nested mapping; values are YAML.

    :param pairs: words of the form key:value
    :param flag: shown in messages
    :raises ValueError: for a word without a colon, or a value that is no YAML
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, colon, text = pair.partition(":")
        if not (key and colon):
            raise ValueError(f"{flag}: {pair!r} is not of the form key:value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{flag}: the value of {pair!r} is not YAML") from error
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{flag}: {pair!r} contradicts the value given for {part!r} before it")
        inner[last] = value
    return result


def merge(section: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``section`` with ``changes``; mappings are merged key by key, everything else is replaced."""
    result = dict(section)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


# Checks ---------------------------------------------------------------------------------------------------------------


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
            config.hyperparams[key] = _typed(key, value, known[key])
        elif key in ("n_timesteps", "n_envs"):
            setattr(config, key, _typed(key, value, "int"))
            if getattr(config, key) < 1:
                raise ValueError(f"{key}={raw!r} must be at least 1")
        elif key in RUN_KEYS and key.endswith("_kwargs"):
            setattr(config, key, _mapping(key, value))
        elif key in RUN_KEYS:
            if not isinstance(raw, str):
                raise ValueError(f"{key}={raw!r} must be a name")
            setattr(config, key, raw)
        else:
            names = sorted([*known, *RUN_KEYS])
            raise ValueError(f"unknown key {key!r} for {algo.__name__}{closest(str(key), names) or '; known are ' + ', '.join(names)}")
    for key in config.vec_teacher_kwargs:
        if key not in VEC_TEACHER_KEYS:
            raise ValueError(f"unknown key {key!r} in vec_teacher_kwargs; known are {', '.join(VEC_TEACHER_KEYS)}")
    _check_batch(config, algo)
    build_hyperparams(config, algo)
    return config


def hyperparameters(algo: type[BaseAlgorithm]) -> dict[str, str]:
    """Constructor arguments that a config may set, and their annotations.

    A class that passes ``**kwargs`` on has its own arguments and those of the next class.
    """
    result: dict[str, str] = {}
    for cls in algo.__mro__:
        if "__init__" not in cls.__dict__:
            continue
        parameters = inspect.signature(cls.__init__).parameters.values()
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                annotation = parameter.annotation
                text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
                result.setdefault(parameter.name, text)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return {name: text for name, text in result.items() if name not in NOT_IN_CONFIG}


def build_hyperparams(config: RunConfig, algo: type[BaseAlgorithm]) -> dict[str, Any]:
    """Keyword arguments for the algorithm: schedules and classes instead of their names.

    :raises ValueError: for a schedule or a class that does not exist
    """
    known = hyperparameters(algo)
    built = {key: _schedule(key, value, known) for key, value in config.hyperparams.items()}
    if "policy_kwargs" in built:
        built["policy_kwargs"] = _policy_kwargs(_mapping("policy_kwargs", built["policy_kwargs"]), config.policy, algo)
    return built


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` or nothing."""
    hint = get_close_matches(name, list(known), n=1)
    return f"; did you mean {hint[0]!r}?" if hint else ""


def _numbers(value: Any) -> Any:
    """YAML 1.1 reads 3e-4 as a string; make numbers of such strings, at any depth."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    return float(value) if isinstance(value, str) and _FLOAT.fullmatch(value) else value


def _typed(key: str, value: Any, annotation: str) -> Any:
    """The value, if the annotation allows it; a whole float where an int is due becomes one."""
    types = set(re.split(r"\s*\|\s*", annotation))
    if value is None and "None" in types or not types & {"int", "float", "bool", "str"}:
        return value
    if "bool" in types and isinstance(value, bool) or "str" in types and isinstance(value, str):
        return value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and "int" in types and float(value).is_integer():
        return int(value)
    if number and "float" in types and math.isfinite(value):
        return value
    if _takes_schedule(annotation) and isinstance(value, str):
        return value
    wanted = "true or false" if "bool" in types else "a whole number" if "int" in types else "a number"
    if "str" in types:
        wanted = "a name"
    if isinstance(value, str) and _SCHEDULE.fullmatch(value):
        wanted += ", not a schedule"
    raise ValueError(f"{key}={value!r} must be {wanted}")


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be a mapping, e.g. {key}: {{name: value}}, got {value!r}; strings are not evaluated")
    return value


def _takes_schedule(annotation: str) -> bool:
    return "Schedule" in annotation or "Callable" in annotation


def _schedule(key: str, value: Any, known: Mapping[str, str]) -> Any:
    if not (isinstance(value, str) and _takes_schedule(known[key])):
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
    policy_class = algo.policy_aliases.get(policy or "MlpPolicy") or next(iter(algo.policy_aliases.values()))
    known = [name for name in inspect.signature(policy_class).parameters if not name.endswith("_space") and name != "lr_schedule"]
    for key in kwargs:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in policy_kwargs{closest(key, known) or '; known are ' + ', '.join(known)}")
    return {key: _class(key, value) if key in CLASS_KEYS else value for key, value in kwargs.items()}


def _class(key: str, name: Any) -> type:
    """The class that a dotted name like ``torch.nn.ReLU`` stands for."""
    module, dot, attribute = str(name).rpartition(".")
    try:
        if not dot:
            raise ImportError("no module named")
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"policy_kwargs.{key}={name!r} must be the full name of a class, e.g. torch.nn.ReLU ({error})") from error
    if not isinstance(found, type):
        raise ValueError(f"policy_kwargs.{key}={name!r} is no class")
    return found


def _check_batch(config: RunConfig, algo: type[BaseAlgorithm]) -> None:
    """SB3 only warns when a minibatch is larger than the rollout."""
    parameters = inspect.signature(algo.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        parameters = inspect.signature(next(c for c in algo.__mro__ if c.__module__.startswith("stable_baselines3"))).parameters
    values = {}
    for key in ("n_steps", "batch_size"):
        default = parameters[key].default if key in parameters else None
        values[key] = config.hyperparams.get(key, default)
    if None not in values.values() and values["batch_size"] > values["n_steps"] * config.n_envs:
        raise ValueError(
            f"batch_size={values['batch_size']} is larger than a rollout of n_steps * n_envs = "
            f"{values['n_steps']} * {config.n_envs} = {values['n_steps'] * config.n_envs} transitions"
        )
