"""Policies that leave the library: the deployable graph, its formats, its manifest and its card."""
