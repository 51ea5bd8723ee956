"""The command that records a teacher's episodes."""
