"""Recorded episodes and their files."""
