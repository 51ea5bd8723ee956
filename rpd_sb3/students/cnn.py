"""CNNs for image observations: the RPD paper's, and a compact one that is as good at a third of the side length.

Observations are an image, or a Dict of one image and any number of vectors (``rgb+state``). Images stay uint8 in buffers
and on the way to the device; SB3's policies divide them by 255 there.

Shape letters: B batch, H and W pixels, D features.
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


class _ImageExtractor(BaseFeaturesExtractor):
    """Features of one image, and beside them the vectors of a Dict, normalized by :class:`RunningNorm`.

    :param observation_space: an image ``(3, H, W)``, or a Dict of one image and vectors
    :param image_features: D, what an image becomes
    :raises ValueError: if there is not exactly one image, or it is too small
    """

    encoder: nn.Module
    """``(B, 3, H, W)`` to ``(B, D)``"""

    def __init__(self, observation_space: spaces.Space, image_features: int) -> None:
        name = type(self).__name__
        parts = (
            dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        )
        images = [key for key, space in parts.items() if is_image_space(space)]
        if len(images) != 1:
            raise ValueError(f"{name} needs exactly one image, got {observation_space}; set env_kwargs: {{obs: rgb}}")
        (self._image,) = images
        shape = parts[self._image].shape
        assert shape is not None
        if min(shape[1:]) < 16:
            raise ValueError(f"{name} needs images of at least 16 x 16 pixels, got {shape[1]} x {shape[2]}")
        vectors = {key: RunningNorm(space) for key, space in parts.items() if key != self._image}
        super().__init__(observation_space, image_features + sum(norm.features_dim for norm in vectors.values()))
        self.norms = nn.ModuleDict(vectors)
        self.image_shape = shape

    def forward(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        parts = observations if isinstance(observations, dict) else {self._image: observations}
        # Convolutions follow the layout of the image; the weights stay contiguous, as orthogonal initialisation needs them.
        image = parts[self._image].contiguous(memory_format=th.channels_last)
        vectors = [norm(parts[key]) for key, norm in self.norms.items()]
        return th.cat([self.encoder(image - 0.5), *vectors], dim=1)  # around zero: from 0 to 1 it learns more slowly


class CompactCNN(_ImageExtractor):
    """Features extractor of 0.73 million weights at 128 x 128 pixels: Nature's strided stem, then IMPALA's residual blocks.

    :param observation_space: an image ``(3, H, W)``, or a Dict of one image and vectors
    :param features_dim: D, what an image becomes
    :param n_blocks: residual blocks at an eighth of the side length
    :param n_channels: of the blocks; the layers before and after them have half of it. A gradient costs about a third with 32
        of what it costs with 64
    :raises ValueError: if there is not exactly one image, or it is too small, or ``n_channels`` is not even and positive
    """

    def __init__(
        self, observation_space: spaces.Space, features_dim: int = 64, n_blocks: int = 2, n_channels: int = 64
    ) -> None:
        if n_channels < 2 or n_channels % 2:
            raise ValueError(f"CompactCNN: n_channels={n_channels} must be a positive even number")
        super().__init__(observation_space, features_dim)
        convolutions = nn.Sequential(
            nn.Conv2d(self.image_shape[0], n_channels // 2, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(n_channels // 2, n_channels, 4, stride=2, padding=1),
            *(ResidualBlock(n_channels) for _ in range(n_blocks)),
            nn.ReLU(),
            nn.Conv2d(n_channels, n_channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with th.no_grad():
            flat = convolutions(th.zeros(1, *self.image_shape)).shape[1]
        self.encoder = nn.Sequential(convolutions, nn.Linear(flat, features_dim), nn.ReLU())


class SpatialSoftArgmax(nn.Module):
    """Where each channel responds: the mean position under the softmax of its map (Levine et al., 2016, section 5.2).

    Each channel has a temperature of its own, which is learned (Finn et al., 2016).

    :param n_channels: C
    :param height: of the maps
    :param width: of the maps
    """

    def __init__(self, n_channels: int, height: int, width: int) -> None:
        super().__init__()
        rows, columns = th.meshgrid(th.linspace(-1, 1, height), th.linspace(-1, 1, width), indexing="ij")
        self.register_buffer("positions", th.stack([columns, rows], dim=-1).reshape(-1, 2), persistent=False)
        self.inverse_temperature = nn.Parameter(th.ones(n_channels, 1))

    def forward(self, maps: th.Tensor) -> th.Tensor:
        """``(B, C, height, width)`` to ``(B, 2 C)``: x and y of each channel, -1 to 1."""
        attention = th.softmax(maps.flatten(2) * self.inverse_temperature, dim=-1)
        return (attention @ self.positions).flatten(1)  # type: ignore[operator]


class KeypointCNN(_ImageExtractor):
    """Features extractor of 0.02 million weights: three convolutions, then the places of ``n_points`` points in the image.

    What a policy must know of an image is mostly where things are. From as many labels it learns that with half the error of
    :class:`CompactCNN`, and for half the time of a gradient.

    :param observation_space: an image ``(3, H, W)``, or a Dict of one image and vectors
    :param n_points: D / 2
    :param n_channels: of the layers before
    :raises ValueError: if there is not exactly one image, or it is too small, or a number is not positive
    """

    def __init__(self, observation_space: spaces.Space, n_points: int = 32, n_channels: int = 32) -> None:
        if n_points < 1 or n_channels < 1:
            raise ValueError(f"KeypointCNN: n_points={n_points} and n_channels={n_channels} must be positive")
        super().__init__(observation_space, 2 * n_points)
        convolutions = nn.Sequential(
            nn.Conv2d(self.image_shape[0], n_channels, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(n_channels, n_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(n_channels, n_points, 3, padding=1),
        )
        with th.no_grad():
            height, width = convolutions(th.zeros(1, *self.image_shape)).shape[2:]
        self.encoder = nn.Sequential(convolutions, SpatialSoftArgmax(n_points, height, width))


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
        paper: dict[str, Any] = {
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
