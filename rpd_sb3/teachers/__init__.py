"""Teachers: they label an observation with the action that they would take there."""

from rpd_sb3.contract.teacher import Labels, LocalTeacher, Query, Teacher, TeacherError, TeacherSpec, TeacherUnavailable
from rpd_sb3.teachers.registry import make_teacher

__all__ = [
    "Labels",
    "LocalTeacher",
    "Query",
    "Teacher",
    "TeacherError",
    "TeacherSpec",
    "TeacherUnavailable",
    "make_teacher",
]
