"""Student policies and parts of them, selected by name in YAML."""

from rpd_sb3.students.cnn import CompactCNN, KeypointCNN, PaperCnnPolicy
from rpd_sb3.students.normalize import RunningNorm
from rpd_sb3.students.tokens import TokenPolicy
from rpd_sb3.students.transformer import AutoregressivePolicy

__all__ = ["AutoregressivePolicy", "CompactCNN", "KeypointCNN", "PaperCnnPolicy", "RunningNorm", "TokenPolicy"]
