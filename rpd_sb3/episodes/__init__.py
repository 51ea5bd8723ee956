"""Plays episodes: for evaluation, for films, and to compare a student with its teacher."""
