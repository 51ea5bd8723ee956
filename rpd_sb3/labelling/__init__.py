"""Wrappers that ask a teacher what it would have done."""

from rpd_sb3.labelling.teacher_wrapper import TeacherWrapper
from rpd_sb3.labelling.vec_teacher import VecTeacher

__all__ = ["TeacherWrapper", "VecTeacher"]
