"""Teachers by the name that they go by on the command line. Each is imported when it is asked for."""

from __future__ import annotations

import importlib
import inspect
from contextlib import ExitStack
from typing import Any

from rpd_sb3.contract.names import TEACHERS, closest
from rpd_sb3.contract.teacher import Teacher, TeacherSpec

MODELS = {
    "openvla": ("rpd_sb3.teachers.openvla.teacher", "OpenVLATeacher", "pip install 'rpd_sb3[openvla]'"),
    "octo": ("rpd_sb3.teachers.octo", "OctoTeacher", "install requirements/octo.txt"),
    "openpi": ("rpd_sb3.teachers.openpi.teacher", "OpenPITeacher", "pip install 'rpd_sb3[openpi]'"),
}
"""Kind to module, class, and how to get what it needs."""


def make_teacher(name: str, env_id: str, **kwargs: Any) -> Teacher:
    """The teacher that a command line names.

    :param name: ``scripted``, ``sb3:FILE`` for a saved SB3 policy, ``openvla:PATH`` and ``octo:PATH`` for a
        checkpoint, the URLs of the replicas of a teacher service, ``openpi:HOST:PORT`` for a policy server of openpi, or
        ``package.module:Class`` for a class of the user's, which gets ``kwargs`` and nothing else
    :param env_id: environment that it is to teach
    :param kwargs: further arguments of the teacher's constructor
    :raises ValueError: for an unknown teacher, a missing file or an argument that the teacher does not have
    :raises TypeError: if an argument that it needs is missing
    :raises TeacherError: if a teacher service does not answer
    """
    kind, _, rest = name.partition(":")
    if kind == "scripted" and not rest:
        from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher

        _check_arguments(ScriptedTeacher, name, kwargs, given=1)
        return ScriptedTeacher(env_id, **kwargs)
    if kind == "sb3" and rest:
        from rpd_sb3.teachers.sb3_policy import SB3Teacher, load_sb3_model

        _check_arguments(SB3Teacher, name, kwargs, given=2)
        return SB3Teacher(load_sb3_model(rest), name, **kwargs)
    if kind in MODELS and rest:
        return _make_model(name, kind, rest, kwargs)
    if kind in ("http", "https"):
        from rpd_sb3.teachers.remote.teacher import RemoteTeacher

        _check_arguments(RemoteTeacher, name, kwargs, given=1)
        return RemoteTeacher(name.split(","), **kwargs)
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return _make_own(name, kind, rest, kwargs)
    raise ValueError(f"teacher {name!r} is unknown; choose one of {', '.join(TEACHERS)}")


def open_teacher(name: str, env_id: str, kwargs: dict[str, Any], closing: ExitStack) -> Teacher:
    """The teacher of that name; ``closing`` will close it.

    :raises ValueError: if there is none, or it does not take these options
    """
    try:
        teacher = make_teacher(name, env_id, **kwargs)
    except TypeError as error:
        raise ValueError(f"teacher {name!r} with {kwargs}: {error}") from error
    closing.callback(teacher.close)
    return teacher


def _make_model(name: str, kind: str, rest: str, kwargs: dict[str, Any]) -> Teacher:
    module, cls, install = MODELS[kind]
    try:
        teacher = getattr(importlib.import_module(module), cls)
    except ImportError as error:
        raise ValueError(f"teacher {name!r}: {error}; {install}") from error
    _check_arguments(teacher, name, kwargs, given=1)
    made: Teacher = teacher(rest, **kwargs)
    return made


def _make_own(name: str, module: str, cls: str, kwargs: dict[str, Any]) -> Teacher:
    try:
        names = vars(importlib.import_module(module))
    except ImportError as error:
        raise ValueError(f"teacher {name!r}: module {module!r} cannot be imported: {error}") from error
    if cls not in names:
        raise ValueError(f"teacher {name!r}: module {module!r} has no {cls!r}{closest(cls, names)}")
    if not (
        inspect.isclass(names[cls]) and all(callable(getattr(names[cls], part, None)) for part in ("submit", "close"))
    ):
        raise ValueError(f"teacher {name!r} is not a Teacher: expected a class with spec, submit() and close()")
    _check_arguments(names[cls], name, kwargs, given=0)
    teacher: Teacher = names[cls](**kwargs)
    if not isinstance(getattr(teacher, "spec", None), TeacherSpec):
        raise ValueError(f"teacher {name!r} has no spec: its constructor must set self.spec to a TeacherSpec")
    return teacher


def _check_arguments(teacher: type, name: str, kwargs: dict[str, Any], given: int) -> None:
    parameters = list(inspect.signature(teacher).parameters.values())[given:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [parameter.name for parameter in parameters]
    for key in kwargs:
        if key not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"teacher {name!r} has no argument {key!r} (it has {has}){closest(key, known)}")
