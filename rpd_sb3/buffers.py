"""Where models that version 0.1 has saved look for the rollout buffers of :mod:`rpd_sb3.algos.buffers`."""

from rpd_sb3.algos.buffers import (
    CompactDictRolloutBuffer,
    CompactRolloutBuffer,
    LabelledDictRolloutBuffer,
    LabelledRolloutBuffer,
)

__all__ = ["CompactDictRolloutBuffer", "CompactRolloutBuffer", "LabelledDictRolloutBuffer", "LabelledRolloutBuffer"]
