"""Augmentation of what the imitation term sees. Shape letters: B minibatch, C channels, H and W pixels."""

from __future__ import annotations

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.type_aliases import TensorDict


def random_shift(images: th.Tensor, shift: int) -> th.Tensor:
    """Each image moved by up to ``shift`` pixels in each direction, its edge repeated (DrQ, Kostrikov et al., 2020).

    :param images: ``(B, C, H, W)``, any dtype
    :param shift: pixels; drawn uniformly from [-shift, shift] for each image and direction
    :return: ``(B, C, H, W)``
    """
    n, _, height, width = images.shape
    rows = th.arange(-shift, height + shift, device=images.device).clamp(0, height - 1)
    columns = th.arange(-shift, width + shift, device=images.device).clamp(0, width - 1)
    padded = images.index_select(2, rows).index_select(3, columns)
    corners = th.randint(0, 2 * shift + 1, (n, 2)).tolist()
    return th.stack([padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(corners)])


def shifted_images(observations: th.Tensor | TensorDict, space: spaces.Space, shift: int) -> th.Tensor | TensorDict:
    """The observations with :func:`random_shift` on every image; vectors stay as they are.

    :param observations: ``(B, ...)``, or a dict of such tensors
    :param space: what they come from, images channels first
    :param shift: pixels; 0: nothing is done
    """
    if shift == 0:
        return observations
    if isinstance(observations, dict):
        assert isinstance(space, spaces.Dict)
        return {key: shifted_images(value, space[key], shift) for key, value in observations.items()}  # type: ignore[misc]
    return random_shift(observations, shift) if is_image_space(space) else observations
