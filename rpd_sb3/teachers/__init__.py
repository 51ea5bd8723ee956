"""Teachers: who can tell what it would have done."""

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
