"""Where a student computes, and with how many threads."""

from __future__ import annotations

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space


def check_device(name: str) -> str:
    """The device, ``auto`` resolved.

    :raises ValueError: if PyTorch does not know it or it is not there
    """
    try:
        device = th.device("cuda" if name == "auto" and th.cuda.is_available() else "cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is unknown to PyTorch; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= th.cuda.device_count():
        raise ValueError(f"--device {name!r}: PyTorch sees {th.cuda.device_count()} CUDA devices here")
    return str(device)


def set_threads(n: int | None, device: str, space: spaces.Space) -> None:
    """One thread for a small network on the CPU: more only contend (2.8 times slower on two cores)."""
    if n is None and device == "cpu" and not has_images(space):
        n = 1
    if n is not None:
        th.set_num_threads(n)


def has_images(space: spaces.Space) -> bool:
    """True if an observation is an image or holds one."""
    return any(is_image_space(part) for part in (space.values() if isinstance(space, spaces.Dict) else [space]))
