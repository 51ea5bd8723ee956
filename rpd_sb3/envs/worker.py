"""Imported once by the fork server: everything that a worker process needs."""

import stable_baselines3.common.monitor
import stable_baselines3.common.vec_env  # noqa: F401

import rpd_sb3.envs.factory
import rpd_sb3.envs.maniskill  # noqa: F401
