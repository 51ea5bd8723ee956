"""The names of teachers on a command line, choices among known names, and hints at names that are almost right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple


class TeacherKind(NamedTuple):
    """A kind of teacher, and where its class is."""

    help: str
    module: str = ""
    """Imported when such a teacher is made; empty: the name on the command line says it."""
    class_name: str = ""
    install: str = "pip install rpd_sb3"
    """How to get the packages that the module needs."""


TEACHERS: dict[str, TeacherKind] = {
    "scripted": TeacherKind(
        "experts for eight ManiSkill tasks", "rpd_sb3.teachers.scripted.teacher", "ScriptedTeacher"
    ),
    "sb3:FILE": TeacherKind("a policy saved by SB3 or sb3-contrib", "rpd_sb3.teachers.sb3_policy", "SB3Teacher"),
    "openvla:PATH": TeacherKind(
        "an OpenVLA checkpoint, a folder or a hub id",
        "rpd_sb3.teachers.openvla.teacher",
        "OpenVLATeacher",
        "pip install 'rpd_sb3[openvla]'",
    ),
    "octo:PATH": TeacherKind(
        "an Octo checkpoint, a folder or hf://org/name",
        "rpd_sb3.teachers.octo.teacher",
        "OctoTeacher",
        "install requirements/octo.txt",
    ),
    "http://HOST:PORT[,http://HOST:PORT...]": TeacherKind(
        "the replicas of a teacher service", "rpd_sb3.teachers.remote.teacher", "RemoteTeacher"
    ),
    "openpi:HOST:PORT": TeacherKind(
        "a policy server of openpi",
        "rpd_sb3.teachers.openpi.teacher",
        "OpenPITeacher",
        "pip install 'rpd_sb3[openpi]'",
    ),
    "MODULE:CLASS": TeacherKind("a class of your own"),
}
"""How a teacher is written on a command line, to its kind. The only list of them: commands build their help from it."""

TEACHER_HELP = ", ".join(list(TEACHERS)[:-1]) + f" or {list(TEACHERS)[-1]}"
"""For the help of a command's ``--teacher``."""


def closest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` with the only known name that begins with this one, or else the most similar; or nothing."""
    names = list(known)
    longer = [other for other in names if name and other.startswith(name)]
    hint = longer if len(longer) == 1 else get_close_matches(name, names, n=1)
    return f"; did you mean {hint[0]!r}?" if hint else ""


def check_choice(owner: str, key: str, value: object, choices: Iterable[object]) -> None:
    """Check that a value is one of the choices.

    :param owner: whose argument it is, for the message
    :param key: name of the argument
    :param value: what was given
    :param choices: what may be given
    :raises ValueError: with the choices and the closest of them
    """
    names = [name for name in choices if isinstance(name, str)]
    if value not in choices:
        hint = closest(value, names) if isinstance(value, str) else ""
        raise ValueError(f"{owner}: {key}={value!r} is unknown; choose one of {', '.join(names)}{hint}")


def check_counts(**values: object) -> None:
    """Check that these arguments are whole numbers of at least 1.

    :param values: argument name to its value
    :raises ValueError: naming the first that is not
    """
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
