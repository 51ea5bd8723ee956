"""Teachers by their name on a command line. The module of a teacher is imported when one is made."""

from __future__ import annotations

import importlib
import inspect
from contextlib import ExitStack
from typing import Any

from rpd_sb3.contract.names import TEACHERS, TeacherKind, closest
from rpd_sb3.contract.secrets import redact
from rpd_sb3.contract.teacher import Teacher, TeacherSpec

_KINDS = {written.partition(":")[0]: kind for written, kind in TEACHERS.items() if kind.module}
"""What stands before the first colon of a name, to the kind of teacher."""


def make_teacher(name: str, env_id: str, /, **kwargs: Any) -> Teacher:
    """The teacher that a command line names.

    :param name: written as one of :data:`~rpd_sb3.contract.names.TEACHERS`
    :param env_id: environment that it is to teach
    :param kwargs: further arguments of the teacher's constructor; a class of the user's gets nothing else
    :raises ValueError: for an unknown teacher, a missing file or an argument that the teacher does not have
    :raises TypeError: if an argument that it needs is missing
    :raises TeacherError: if a teacher service does not answer
    """
    kind, _, rest = name.partition(":")
    known = _KINDS.get("http" if kind == "https" else kind)
    if known is not None and bool(rest) != (kind == "scripted"):
        first: Any = env_id if kind == "scripted" else name.split(",") if kind in ("http", "https") else rest
        return _make_known(name, known, first, kwargs)
    if all(part.isidentifier() for part in [*kind.split("."), rest]):
        return _make_own(name, kind, rest, kwargs)
    raise ValueError(f"teacher {name!r} is unknown; choose one of {', '.join(TEACHERS)}")


def open_teacher(name: str, env_id: str, kwargs: dict[str, Any], closing: ExitStack) -> Teacher:
    """The teacher that a command line names; ``closing`` closes it.

    :param name: as in :func:`make_teacher`
    :param env_id: as in :func:`make_teacher`
    :param kwargs: as in :func:`make_teacher`
    :param closing: closes the teacher when it is closed itself
    :raises ValueError: if there is no such teacher, or it does not take these options
    :raises TeacherError: if a teacher service does not answer
    """
    try:
        teacher = make_teacher(name, env_id, **kwargs)
    except TypeError as error:
        raise ValueError(f"teacher {name!r} with {redact(kwargs)}: {error}") from error
    closing.callback(teacher.close)
    return teacher


def _make_known(name: str, kind: TeacherKind, first: Any, kwargs: dict[str, Any]) -> Teacher:
    """A teacher of the library's.

    :param first: first argument of its constructor: what the name says
    """
    try:
        cls = getattr(importlib.import_module(kind.module), kind.class_name)
    except ImportError as error:
        raise ValueError(f"teacher {name!r}: {error}; {kind.install}") from error
    _check_arguments(cls, name, kwargs, given=1)
    teacher: Teacher = cls(first, **kwargs)
    return teacher


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
