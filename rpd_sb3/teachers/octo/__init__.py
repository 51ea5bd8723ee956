"""Octo as a teacher; importing this imports neither JAX nor octo."""

from rpd_sb3.teachers.octo.teacher import OctoTeacher

__all__ = ["OctoTeacher"]
