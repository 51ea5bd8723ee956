"""Algorithms by the name that they go by on the command line."""

from __future__ import annotations

from sb3_contrib import TRPO, RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm

from rpd_sb3.algos.grpo import GRPO
from rpd_sb3.algos.opd import OPD
from rpd_sb3.algos.ppd import PPD
from rpd_sb3.algos.road import ROAD
from rpd_sb3.algos.rpd import RPD
from rpd_sb3.algos.sft import SFT
from rpd_sb3.contract.names import closest

ALGOS: dict[str, type[BaseAlgorithm]] = {
    "grpo": GRPO,
    "opd": OPD,
    "ppd": PPD,
    "ppo": PPO,
    "recurrent_ppo": RecurrentPPO,
    "road": ROAD,
    "rpd_ppo": RPD,
    "sft": SFT,
    "trpo": TRPO,
}
"""Command-line name to class. Those without ``needs`` train without a teacher."""


def find_algo(name: str) -> type[BaseAlgorithm]:
    """The algorithm of that name.

    :raises ValueError: naming the closest known one
    """
    if name not in ALGOS:
        raise ValueError(f"--algo {name!r} is unknown; choose one of {', '.join(ALGOS)}{closest(name, ALGOS)}")
    return ALGOS[name]


__all__ = ["ALGOS", "find_algo", "GRPO", "OPD", "PPD", "ROAD", "RPD", "SFT"]
