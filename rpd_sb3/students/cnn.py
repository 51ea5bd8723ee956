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


class CompactCNN(BaseFeaturesExtractor):
    """Features extractor of 0.73 million weights at 128 x 128 pixels: Nature's strided stem, then IMPALA's residual blocks.

    Vectors beside the image are normalized by :class:`RunningNorm` and appended.

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
        parts = (
            dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        )
        images = [key for key, space in parts.items() if is_image_space(space)]
        if len(images) != 1:
            raise ValueError(
                f"CompactCNN needs exactly one image, got {observation_space}; set env_kwargs: {{obs: rgb}}"
            )
        (self._image,) = images
        shape = parts[self._image].shape
        assert shape is not None
        if min(shape[1:]) < 16:
            raise ValueError(f"CompactCNN needs images of at least 16 x 16 pixels, got {shape[1]} x {shape[2]}")
        vectors = {key: RunningNorm(space) for key, space in parts.items() if key != self._image}
        super().__init__(observation_space, features_dim + sum(norm.features_dim for norm in vectors.values()))
        self.norms = nn.ModuleDict(vectors)
        convolutions = nn.Sequential(
            nn.Conv2d(shape[0], n_channels // 2, 8, stride=4, padding=2),
            nn.ReLU(),
            nn.Conv2d(n_channels // 2, n_channels, 4, stride=2, padding=1),
            *(ResidualBlock(n_channels) for _ in range(n_blocks)),
            nn.ReLU(),
            nn.Conv2d(n_channels, n_channels // 2, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        with th.no_grad():
            flat = convolutions(th.zeros(1, *shape)).shape[1]
        self.encoder = nn.Sequential(convolutions, nn.Linear(flat, features_dim), nn.ReLU())

    def forward(self, observations: th.Tensor | TensorDict) -> th.Tensor:
        parts = observations if isinstance(observations, dict) else {self._image: observations}
        # Convolutions follow the layout of the image; the weights stay contiguous, as orthogonal initialisation needs them.
        image = parts[self._image].contiguous(memory_format=th.channels_last)
        vectors = [norm(parts[key]) for key, norm in self.norms.items()]
        return th.cat([self.encoder(image - 0.5), *vectors], dim=1)  # around zero: from 0 to 1 it learns more slowly


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
