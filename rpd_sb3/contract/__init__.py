"""What teachers, environments, wrappers and algorithms agree on. It imports no other folder of the library."""
