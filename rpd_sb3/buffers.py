"""Where models that version 0.1 has saved look for the classes of :mod:`rpd_sb3.algos.buffers`."""

from rpd_sb3.algos.buffers import *  # noqa: F403
