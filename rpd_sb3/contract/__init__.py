"""What teachers, wrappers and algorithms agree on; it imports nothing of ours."""
