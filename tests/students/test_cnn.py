"""Students that look at images, and the augmentation of what they imitate."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from rpd_sb3.algos.augmentation import random_shift, shifted_images
from rpd_sb3.students import CompactCNN, KeypointCNN, PaperCnnPolicy
from rpd_sb3.students.cnn import SpatialSoftArgmax
from rpd_sb3.train.hyperparams import policy_class

ACTIONS = spaces.Box(-1.0, 1.0, (7,), np.float32)
VECTOR = spaces.Box(-np.inf, np.inf, (25,), np.float32)


def image(size: int) -> spaces.Box:
    return spaces.Box(0, 255, (3, size, size), np.uint8)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The paper's ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paper() -> PaperCnnPolicy:
    return PaperCnnPolicy(image(256), ACTIONS, lambda _: 3e-4)


def test_paper_policy_has_the_number_of_weights_of_the_authors_code(paper: PaperCnnPolicy) -> None:
    assert count(paper) == 13_188_527


def test_paper_policy_has_the_layers_of_the_authors_code(paper: PaperCnnPolicy) -> None:
    convolutions = [m for m in paper.features_extractor.modules() if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convolutions] == [
        (3, 32, 8, 4),
        (32, 64, 4, 2),
        (64, 64, 3, 1),
    ]
    heads = [paper.features_extractor.linear[0], paper.mlp_extractor.policy_net[0], paper.action_net]
    assert [(head.in_features, head.out_features) for head in heads] == [(50176, 256), (256, 512), (512, 7)]
    assert th.equal(paper.log_std, th.full((7,), -0.5))


def test_paper_policy_is_initialised_as_in_the_authors_code(paper: PaperCnnPolicy) -> None:
    def gain(layer: nn.Linear) -> float:
        """Of an orthogonal matrix times a number: each of its singular values."""
        values = th.linalg.svdvals(layer.weight.detach())
        th.testing.assert_close(values, values[:1].expand_as(values), rtol=1e-4, atol=1e-6)
        return float(values[0])

    assert gain(paper.mlp_extractor.policy_net[0]) == pytest.approx(2**0.5, rel=1e-4)
    assert gain(paper.mlp_extractor.value_net[0]) == pytest.approx(2**0.5, rel=1e-4)
    assert gain(paper.action_net) == pytest.approx(0.01 * 2**0.5, rel=1e-4)
    assert gain(paper.value_net) == pytest.approx(2**0.5, rel=1e-4)
    # PyTorch's own: uniform within 1 / sqrt(fan in), biases too.
    first = paper.features_extractor.cnn[0]
    assert first.weight.abs().max() <= 192**-0.5
    assert first.weight.std().item() == pytest.approx((192 * 3) ** -0.5, rel=0.05)
    assert first.bias.abs().max() > 0


def test_arguments_override_the_papers() -> None:
    policy = PaperCnnPolicy(image(84), ACTIONS, lambda _: 3e-4, log_std_init=-2.0, net_arch=[64])
    assert th.equal(policy.log_std, th.full((7,), -2.0))
    assert policy.action_net.in_features == 64


def test_yaml_knows_the_paper_policy_by_name() -> None:
    assert policy_class("PaperCnnPolicy", PPO) is PaperCnnPolicy


# The compact one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "parameters"), [(84, 576_975), (96, 667_087), (128, 896_463)])
def test_compact_policy_has_less_than_a_million_weights(size: int, parameters: int) -> None:
    policy = PPO.policy_aliases["CnnPolicy"](
        image(size), ACTIONS, lambda _: 1e-3, features_extractor_class=CompactCNN, net_arch=[256, 256]
    )
    assert count(policy) == parameters < 1_000_000


@pytest.mark.parametrize("size", [16, 63, 84, 127])
def test_any_side_length_will_do(size: int) -> None:
    assert CompactCNN(image(size))(th.rand(2, 3, size, size)).shape == (2, 64)


def test_half_the_channels_are_a_quarter_of_the_convolutions_weights() -> None:
    wide, slim = (
        sum(p.numel() for p in CompactCNN(image(64), n_channels=n).encoder[0][3].parameters()) for n in (64, 32)
    )
    assert (wide, slim) == (2 * (64 * 64 * 9 + 64), 2 * (32 * 32 * 9 + 32))
    with pytest.raises(ValueError, match="n_channels=33 must be a positive even number"):
        CompactCNN(image(64), n_channels=33)


def test_a_point_lies_where_its_channel_responds() -> None:
    maps = th.zeros(1, 3, 5, 9)
    maps[0, 0, 4, 8] = maps[0, 1, 0, 2] = 200.0  # lower right corner; a quarter along the upper edge; nothing
    points = SpatialSoftArgmax(3, 5, 9)(maps)
    th.testing.assert_close(points, th.tensor([[1.0, 1.0, -0.5, -1.0, 0.0, 0.0]]))


def test_a_student_of_points_is_small() -> None:
    extractor = KeypointCNN(image(64))
    assert extractor.features_dim == 64
    assert count(extractor) == (3 * 64 + 1) * 32 + 2 * (32 * 9 + 1) * 32 + 32
    assert KeypointCNN(image(96), n_points=5)(th.rand(2, 3, 96, 96)).shape == (2, 10)
    with pytest.raises(ValueError, match="n_points=0 and n_channels=32 must be positive"):
        KeypointCNN(image(64), n_points=0)


@pytest.mark.parametrize("extractor_class", [CompactCNN, KeypointCNN])
def test_vectors_are_normalized_and_appended(extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(spaces.Dict({"rgb": image(84), "state": VECTOR}))
    assert extractor.features_dim == 64 + 25
    obs = {"rgb": th.rand(40, 3, 84, 84), "state": 7.0 + 3.0 * th.randn(40, 25)}
    extractor(obs)
    appended = extractor.eval()(obs)[:, 64:]
    th.testing.assert_close(appended.mean(0), th.zeros(25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("extractor_class", [CompactCNN, KeypointCNN])
def test_every_pixel_and_every_weight_takes_part(extractor_class: type[BaseFeaturesExtractor]) -> None:
    extractor = extractor_class(image(32))
    pixels = th.rand(1, 3, 32, 32, requires_grad=True)
    extractor(pixels).square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).all()
    assert all((parameter.grad != 0).any() for name, parameter in extractor.named_parameters() if "encoder" in name)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (VECTOR, "exactly one image, got Box"),
        (spaces.Dict({"a": image(84), "b": image(84)}), "exactly one image, got Dict"),
        (image(12), "at least 16 x 16 pixels, got 12 x 12"),
    ],
)
def test_other_observations_are_refused(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactCNN(space)


@pytest.mark.parametrize("extractor_class", [CompactCNN, KeypointCNN])
@pytest.mark.parametrize("obs", ["image", "both"])
def test_it_survives_saving(obs: str, extractor_class: type[BaseFeaturesExtractor], tmp_path: Any) -> None:
    space = image(32) if obs == "image" else spaces.Dict({"rgb": image(32), "state": VECTOR})
    policy = PPO.policy_aliases["CnnPolicy" if obs == "image" else "MultiInputPolicy"](
        space, ACTIONS, lambda _: 1e-3, features_extractor_class=extractor_class
    )
    policy.save(tmp_path / "policy")
    loaded = type(policy).load(tmp_path / "policy")
    sample = space.sample()
    np.testing.assert_array_equal(
        policy.predict(sample, deterministic=True)[0], loaded.predict(sample, deterministic=True)[0]
    )


# Augmentation ---------------------------------------------------------------------------------------------------------


def test_shift_moves_the_image_and_repeats_its_edge() -> None:
    columns = th.arange(8, dtype=th.uint8).expand(200, 1, 8, 8)
    shifted = random_shift(columns, 2)
    assert shifted.dtype == th.uint8
    offsets = (shifted[:, 0, 0, 3].int() - 3).tolist()
    assert set(offsets) == {-2, -1, 0, 1, 2}
    for row, offset in zip(shifted, offsets):
        expected = (th.arange(8) + offset).clamp(0, 7).to(th.uint8).expand(1, 8, 8)
        assert th.equal(row, expected)


@pytest.mark.parametrize("memory_format", [th.contiguous_format, th.channels_last])
def test_a_shifted_image_is_cut_out_of_the_padded_one(memory_format: th.memory_format) -> None:
    images = th.randint(0, 256, (50, 3, 6, 9), dtype=th.uint8).contiguous(memory_format=memory_format)
    th.manual_seed(1)
    shifted = random_shift(images, 3)
    th.manual_seed(1)
    corners = th.randint(0, 7, (50, 2)).tolist()
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (3, 3), (3, 3)), mode="edge")
    for i, (y, x) in enumerate(corners):
        np.testing.assert_array_equal(shifted[i], padded[i, :, y : y + 6, x : x + 9])


def test_rows_and_columns_are_shifted_independently() -> None:
    rows = 10 * th.arange(9)[:, None] + th.arange(9)
    centres = random_shift(rows.to(th.uint8).expand(400, 1, 9, 9), 1)[:, 0, 4, 4].tolist()
    assert set(centres) == {44 + 10 * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)}


def test_only_images_are_shifted() -> None:
    space = spaces.Dict({"rgb": image(84), "state": VECTOR})
    obs = {"rgb": th.randint(0, 256, (8, 3, 84, 84), dtype=th.uint8), "state": th.randn(8, 25)}
    shifted = shifted_images(obs, space, 4)
    assert isinstance(shifted, dict)
    assert shifted["state"] is obs["state"]
    assert not th.equal(shifted["rgb"], obs["rgb"])


def test_no_shift_is_the_observation_itself() -> None:
    obs = th.zeros(1, 3, 8, 8)
    assert shifted_images(obs, image(84), 0) is obs
