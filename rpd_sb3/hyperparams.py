"""Where models that version 0.1 has saved look for the classes of :mod:`rpd_sb3.train.hyperparams`."""

from rpd_sb3.train.hyperparams import *  # noqa: F403
