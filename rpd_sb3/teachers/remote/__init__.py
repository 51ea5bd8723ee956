"""The client of the teacher service."""
