"""With how many threads a student runs."""

from __future__ import annotations

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space


def set_threads(n: int | None, device: str, space: spaces.Space) -> None:
    """Set PyTorch's threads; by default one for a small network on the CPU: more only contend (2.8 times slower on two cores).

    :param n: number of threads; None: chosen by the other two
    :param device: where the network runs
    :param space: of its observations
    """
    parts = space.values() if isinstance(space, spaces.Dict) else [space]
    if n is None and device == "cpu" and not any(map(is_image_space, parts)):
        n = 1
    if n is not None:
        th.set_num_threads(n)
