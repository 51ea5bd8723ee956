"""Distil vision-language-action models into compact policies with Stable-Baselines3."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rpd_sb3.algos import GRPO, OPD, PPD, ROAD, RPD, SFT
    from rpd_sb3.envs import make_env, make_vec_env
    from rpd_sb3.labelling import TeacherWrapper, VecTeacher
    from rpd_sb3.teachers import make_teacher

__version__ = "0.1.0"

_HOMES = {
    "GRPO": "rpd_sb3.algos",
    "OPD": "rpd_sb3.algos",
    "PPD": "rpd_sb3.algos",
    "ROAD": "rpd_sb3.algos",
    "RPD": "rpd_sb3.algos",
    "SFT": "rpd_sb3.algos",
    "TeacherWrapper": "rpd_sb3.labelling",
    "VecTeacher": "rpd_sb3.labelling",
    "make_env": "rpd_sb3.envs",
    "make_teacher": "rpd_sb3.teachers",
    "make_vec_env": "rpd_sb3.envs",
}
"""Public name to the package that has it; imported when it is first used, so that ``import rpd_sb3`` loads nothing else."""

__all__ = [
    "GRPO",
    "OPD",
    "PPD",
    "ROAD",
    "RPD",
    "SFT",
    "TeacherWrapper",
    "VecTeacher",
    "__version__",
    "make_env",
    "make_teacher",
    "make_vec_env",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
