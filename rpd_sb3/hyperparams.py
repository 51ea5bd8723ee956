"""Where models that version 0.1 has saved look for :class:`rpd_sb3.algos.curriculum.CosineSchedule`."""

from rpd_sb3.algos.curriculum import CosineSchedule

__all__ = ["CosineSchedule"]
