"""Teachers by the name that they go by on the command line."""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from rpd_sb3.teachers.base import Teacher
from rpd_sb3.teachers.sb3_policy import SB3Teacher, load_sb3_model
from rpd_sb3.teachers.scripted import ScriptedTeacher

TEACHERS = ("scripted", "sb3:FILE")


def make_teacher(name: str, env_id: str, **kwargs: Any) -> Teacher:
    """The teacher that a command line names.

    :param name: ``scripted``, or ``sb3:FILE`` for a saved SB3 policy
    :param env_id: environment that it is to teach
    :param kwargs: further arguments of the teacher's constructor
    :raises ValueError: for an unknown teacher, a missing file or an argument that the teacher does not have
    """
    kind, _, rest = name.partition(":")
    if kind == "scripted" and not rest:
        _check_arguments(ScriptedTeacher, name, kwargs, given=1)
        return ScriptedTeacher(env_id, **kwargs)
    if kind == "sb3" and rest:
        _check_arguments(SB3Teacher, name, kwargs, given=2)
        return SB3Teacher(load_sb3_model(rest), name, **kwargs)
    raise ValueError(f"teacher {name!r} is unknown; choose one of {', '.join(TEACHERS)}")


def _check_arguments(teacher: type, name: str, kwargs: dict[str, Any], given: int) -> None:
    known = list(inspect.signature(teacher).parameters)[given:]
    for key in kwargs:
        if key not in known:
            hint = get_close_matches(key, known, n=1)
            closest = f"; did you mean {hint[0]!r}?" if hint else ""
            raise ValueError(f"teacher {name!r} has no argument {key!r} (it has {', '.join(known) or 'none'}){closest}")
