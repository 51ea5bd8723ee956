"""Where a student runs, and with how many threads."""

from __future__ import annotations

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space

from rpd_sb3.contract.device import check_device

__all__ = ["check_device", "has_images", "set_threads"]


def set_threads(n: int | None, device: str, space: spaces.Space) -> None:
    """Set PyTorch's threads; by default one for a small network on the CPU: more only contend (2.8 times slower on two cores).

    :param n: number of threads; None: chosen by the other two
    :param device: where the network runs
    :param space: of its observations
    """
    if n is None and device == "cpu" and not has_images(space):
        n = 1
    if n is not None:
        th.set_num_threads(n)


def has_images(space: spaces.Space) -> bool:
    """True if an observation is an image or holds one."""
    return any(is_image_space(part) for part in (space.values() if isinstance(space, spaces.Dict) else [space]))
