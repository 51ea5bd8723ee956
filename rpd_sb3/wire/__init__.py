"""What client and server of a teacher service share: the Open Inference Protocol v2. NumPy and the standard library only."""

PROTOCOL_VERSION = 2
"""Counts the changes that an older client or server would misunderstand; part of the model's metadata."""
