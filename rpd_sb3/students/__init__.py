"""Parts of student policies, selected by name in YAML."""

from rpd_sb3.students.normalize import RunningNorm

__all__ = ["RunningNorm"]
