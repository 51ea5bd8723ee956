"""The two vision transformers of OpenVLA, DINOv2 and SigLIP, and the projector into the language model.

Shape letters: B images, P = 256 patches, W width of a tower, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from rpd_sb3.teachers.openvla.checkpoint import Entry

N_HEADS = 16
"""Of both towers; the only size that does not follow from the shapes of the weights."""
EPS = 1e-6
PATCH = 14


class TowerShape(NamedTuple):
    """Sizes of one tower."""

    width: int
    depth: int
    """Blocks in the checkpoint. The last one is not used: OpenVLA takes the features of the second to last."""
    mlp_width: int
    n_patches: int
    n_registers: int
    has_cls: bool
    layer_scale: bool


def tower_shape(tensors: Mapping[str, Entry], prefix: str) -> TowerShape:
    """The sizes of a tower, from the shapes of its weights.

    :param tensors: of the checkpoint
    :param prefix: of the names of the tower's weights, with the last dot
    :raises ValueError: if a weight of the tower is missing
    """
    try:
        width = tensors[f"{prefix}patch_embed.proj.weight"].shape[0]
        registers = tensors.get(f"{prefix}reg_token")
        depth = 0
        while f"{prefix}blocks.{depth}.norm1.weight" in tensors:
            depth += 1
        return TowerShape(
            width,
            depth,
            tensors[f"{prefix}blocks.0.mlp.fc1.weight"].shape[0],
            tensors[f"{prefix}pos_embed"].shape[1],
            0 if registers is None else registers.shape[1],
            f"{prefix}cls_token" in tensors,
            f"{prefix}blocks.0.ls1.scale_factor" in tensors,
        )
    except (KeyError, IndexError) as error:
        raise ValueError(f"the checkpoint has no complete vision tower {prefix[:-1]}: {error} is missing") from error


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(th.ones(width))

    def forward(self, x: th.Tensor) -> th.Tensor:
        return x * self.scale_factor


class Attention(nn.Module):
    """Self-attention over all patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, N_HEADS, width // N_HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    """Two layers with the exact GELU (the tanh form of other SigLIPs moves features by 2e-3)."""

    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each around a residual."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.width, EPS)
        self.attn = Attention(shape.width)
        self.norm2 = nn.LayerNorm(shape.width, EPS)
        self.mlp = Mlp(shape.width, shape.mlp_width)
        self.ls1: nn.Module = LayerScale(shape.width) if shape.layer_scale else nn.Identity()
        self.ls2: nn.Module = LayerScale(shape.width) if shape.layer_scale else nn.Identity()

    def forward(self, x: th.Tensor) -> th.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """One linear map for each patch of 14 x 14 pixels.

    Computed as a matrix product, not as a convolution: cuDNN computes those in TF32 even where matrix products are float32.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        batch, channels, height, width = pixels.shape
        x = pixels.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
        weight = self.proj.weight.flatten(1)
        return F.linear(x.reshape(batch, -1, weight.shape[1]), weight, self.proj.bias)


class VisionTower(nn.Module):
    """A vision transformer up to its second to last block, without the final norm."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shape.width)
        self.pos_embed = nn.Parameter(th.zeros(1, shape.n_patches, shape.width))
        if shape.has_cls:
            self.cls_token = nn.Parameter(th.zeros(1, 1, shape.width))
        if shape.n_registers:
            self.reg_token = nn.Parameter(th.zeros(1, shape.n_registers, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth - 1))
        self._prefix = [name for name in ("cls_token", "reg_token") if hasattr(self, name)]

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        """Features of the patches.

        :param pixels: normalized, ``(B, 3, 224, 224)``
        :return: ``(B, P, W)``, row by row
        """
        x = self.patch_embed(pixels) + self.pos_embed
        n_patches = x.shape[1]
        prefix = [getattr(self, name).expand(len(x), -1, -1) for name in self._prefix]
        x = th.cat([*prefix, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, -n_patches:]


class VisionBackbone(nn.Module):
    """Both towers; modules have the names of the checkpoint."""

    def __init__(self, dino: TowerShape, siglip: TowerShape) -> None:
        super().__init__()
        self.featurizer = VisionTower(dino)
        self.fused_featurizer = VisionTower(siglip)

    def forward(self, pixels: th.Tensor) -> th.Tensor:
        """Features of the patches.

        :param pixels: ``(B, 6, 224, 224)``, channels normalized for DINOv2, then for SigLIP
        :return: ``(B, P, W_dino + W_siglip)``
        """
        dino, siglip = pixels.split(3, dim=1)
        return th.cat([self.featurizer(dino), self.fused_featurizer(siglip)], dim=-1)


class Projector(nn.Module):
    """Three layers from the features of the towers to the embeddings of the language model."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def forward(self, x: th.Tensor) -> th.Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))
