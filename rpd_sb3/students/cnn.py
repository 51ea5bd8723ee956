"""Students that look at images: the RPD paper's CNN, and a compact one that is as good at a third of the side length.

Observations are an image, or a Dict of one image and any number of vectors (``rgb+state``). Images stay uint8 in buffers
and on the way to the device; SB3's policies divide them by 255 there.

Shape letters: B batch, H and W pixels, K keypoints, D features.
"""

from __future__ import annotations

import math
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticCnnPolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, NatureCNN
from stable_baselines3.common.type_aliases import Schedule, TensorDict
from torch import nn

from rpd_sb3.students.normalize import RunningNorm


class SpatialSoftArgmax(nn.Module):
    """Where each channel fires: the mean position under a softmax over its pixels (Levine et al., 2016, section 5.1).

    Positions of things are what an arm needs from an image, and a mean over pixels is finer than a pixel.

    :param height: of the feature map
    :param width: of the feature map
    """

    rows: th.Tensor
    columns: th.Tensor

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", th.linspace(-1.0, 1.0, height), persistent=False)
        self.register_buffer("columns", th.linspace(-1.0, 1.0, width), persistent=False)

    def forward(self, features: th.Tensor) -> th.Tensor:
        """Positions, -1 at the upper and left edge, 1 at the lower and right one.

        :param features: ``(B, K, H, W)``
        :return: ``(B, 2 K)``: all columns, then all rows
        """
        weights = features.flatten(2).softmax(dim=-1).view_as(features)
        x = (weights.sum(dim=2) * self.columns).sum(dim=-1)
        y = (weights.sum(dim=3) * self.rows).sum(dim=-1)
        return th.cat([x, y], dim=1)


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x)))), as in IMPALA (Espeholt et al., 2018, figure 3).

    :param n_channels: in and out
    """

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_channels, n_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(n_channels, n_channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x + self.conv2(th.relu(self.conv1(th.relu(x))))


class CompactCNN(BaseFeaturesExtractor):
    """Features extractor of about 30 thousand weights: strided stem, IMPALA's residual blocks, spatial soft-argmax.

    Vectors beside the image are standardised by :class:`RunningNorm` and appended.

    :param observation_space: an image ``(3, H, W)``, or a Dict of one image and vectors
    :param n_channels: of the residual blocks; the stem has half of them
    :param n_blocks: residual blocks at a quarter of the side length
    :param n_keypoints: K; an image becomes 2 K numbers
    :raises ValueError: if there is not exactly one image, or it is too small
    """

    def __init__(
        self, observation_space: spaces.Space, n_channels: int = 32, n_blocks: int = 1, n_keypoints: int = 32
    ) -> None:
        parts = (
            dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        )
        images = [key for key, space in parts.items() if is_image_space(space)]
        if len(images) != 1:
            raise ValueError(
                f"CompactCNN looks at one image, got {observation_space}; ask for it with env_kwargs: {{obs: rgb}}"
            )
        (self._image,) = images
        shape = parts[self._image].shape
        assert shape is not None
        if min(shape[1:]) < 16:
            raise ValueError(f"CompactCNN needs images of at least 16 x 16 pixels, got {shape[1]} x {shape[2]}")
        vectors = {key: RunningNorm(space) for key, space in parts.items() if key != self._image}
        super().__init__(observation_space, 2 * n_keypoints + sum(norm.features_dim for norm in vectors.values()))
        self.norms = nn.ModuleDict(vectors)
        sides = [math.ceil(side / 4) for side in shape[1:]]
        self.encoder = nn.Sequential(
            nn.Conv2d(shape[0], n_channels // 2, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(n_channels // 2, n_channels, 3, stride=2, padding=1),
            *(ResidualBlock(n_channels) for _ in range(n_blocks)),
            nn.ReLU(),
            nn.Conv2d(n_channels, n_keypoints, 1),
            SpatialSoftArgmax(*sides),
        )

    def forward(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        parts = observations if isinstance(observations, dict) else {self._image: observations}
        # Images decide: convolutions follow their layout, and orthogonal initialisation knows only contiguous weights.
        image = parts[self._image].contiguous(memory_format=th.channels_last)
        vectors = [norm(parts[key]) for key, norm in self.norms.items()]
        return th.cat([self.encoder(image), *vectors], dim=1)


class PaperCnnPolicy(ActorCriticCnnPolicy):
    """The RPD paper's student: Nature's CNN on a 256 x 256 image, 256 features, heads of 512; 13,188,527 weights.

    Layers and initialisation are those of the authors' code: PyTorch's own in the CNN, orthogonal with gain sqrt(2) in the
    heads, 0.01 sqrt(2) in the last layer of the actor.

    :param observation_space: an image
    :param action_space: as in SB3
    :param lr_schedule: as in SB3
    :param kwargs: SB3's other arguments, instead of the paper's
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, lr_schedule: Schedule, **kwargs: Any
    ) -> None:
        paper = {
            "net_arch": {"pi": [512], "vf": [512]},
            "activation_fn": nn.ReLU,
            "log_std_init": -0.5,
            "ortho_init": False,
            "features_extractor_class": NatureCNN,
            "features_extractor_kwargs": {"features_dim": 256},
        }
        super().__init__(observation_space, action_space, lr_schedule, **(paper | kwargs))

    def _build(self, lr_schedule: Schedule) -> None:
        super()._build(lr_schedule)
        gain = math.sqrt(2)
        for module, scale in ((self.mlp_extractor, gain), (self.action_net, 0.01 * gain), (self.value_net, gain)):
            module.apply(lambda layer, scale=scale: self.init_weights(layer, scale))  # type: ignore[misc]
