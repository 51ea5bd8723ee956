"""Where a network runs. The only module of this room that imports PyTorch."""

from __future__ import annotations

import torch as th


def check_device(name: str) -> str:
    """The device, ``auto`` resolved to cuda if there is one.

    :param name: ``auto``, or a device as PyTorch names it
    :raises ValueError: if PyTorch does not know it or it is not there
    """
    if name == "auto":
        return "cuda" if th.cuda.is_available() else "cpu"
    try:
        device = th.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to PyTorch; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= th.cuda.device_count():
        raise ValueError(f"device {name!r} does not exist: PyTorch sees {th.cuda.device_count()} CUDA devices")
    return str(device)
