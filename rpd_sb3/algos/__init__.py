"""Algorithms by the name that they go by on the command line."""

from __future__ import annotations

from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from rpd_sb3.algos.rpd import RPD

ALGOS: dict[str, type[BaseAlgorithm]] = {"ppo": PPO, "recurrent_ppo": RecurrentPPO, "rpd_ppo": RPD, "trpo": TRPO}
"""Command-line name to class. Those without ``needs`` train without a teacher."""

__all__ = ["ALGOS", "RPD"]
