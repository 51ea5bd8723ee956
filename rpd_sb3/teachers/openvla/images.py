"""Camera images as inputs of the vision towers.

Shape letters: N images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch as th
from PIL import Image
from torch.nn import functional as F

from rpd_sb3.contract.names import check_choice

SIDE = 224
CROP_AREA = 0.9


class Preprocessor:
    """Resizes images to 224 x 224, crops them if asked to, and normalizes them for each tower.

    :param normalization: (mean, std) of the channels, for each tower
    :param device: of the result
    :param dtype: of the result; everything before is float32
    :param resize: ``pil`` is exactly what OpenVLA was trained and published with. ``tensor`` does the same two passes on the
        device; one value in 300 differs by one level of 255, which moved logits by 1e-2. Images of 224 x 224 need neither
    :param center_crop: cut out the middle 90 % of the area and enlarge it again, for models that were fine-tuned with random
        crops (the LIBERO ones)
    :raises ValueError: for an unknown value of ``resize``
    """

    def __init__(
        self,
        normalization: Sequence[tuple[Sequence[float], Sequence[float]]],
        device: th.device,
        dtype: th.dtype,
        resize: str = "pil",
        center_crop: bool = False,
    ) -> None:
        check_choice("OpenVLATeacher", "resize", resize, ("pil", "tensor"))
        self.device = device
        self.dtype = dtype
        self.center_crop = center_crop
        self._towers = [th.tensor(values, device=device).view(2, 1, 3, 1, 1) for values in normalization]
        self._pool = ThreadPoolExecutor(thread_name_prefix="resize") if resize == "pil" else None

    def __call__(self, images: np.ndarray) -> th.Tensor:
        """Pixels for the model.

        :param images: ``(N, H, W, 3)`` uint8
        :return: ``(N, 6, 224, 224)``, channels of the one tower, then of the other
        """
        if images.shape[1:3] != (SIDE, SIDE) and self._pool is not None:
            images = np.stack(list(self._pool.map(_resize_with_pil, images)))
        x = th.from_numpy(np.ascontiguousarray(images)).to(self.device).permute(0, 3, 1, 2)
        if x.shape[2:] != (SIDE, SIDE):
            x = resize_in_two_passes(x)
        if self.center_crop:
            x = crop_center(x)
        x = x.float() / 255.0
        towers = [(x - mean) / std for mean, std in self._towers]
        return th.cat(towers, dim=1).to(self.dtype)

    def close(self) -> None:
        """Stop the threads that resize."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)


def check_images(images: np.ndarray, name: str) -> None:
    """Checks that these are images.

    :param images: expected as ``(N, H, W, 3)`` uint8
    :param name: of the input, for the message
    :raises ValueError: for another shape or type
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape[1:3]:
        raise ValueError(f"OpenVLA needs {name} as (N, H, W, 3) uint8 RGB, but got {images.shape} {images.dtype}")


def _resize_with_pil(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def resize_in_two_passes(images: th.Tensor) -> th.Tensor:
    """Bicubic with antialiasing, width first and rounded to whole levels in between, as PIL does it.

    :param images: ``(N, 3, H, W)`` uint8
    :return: ``(N, 3, 224, 224)`` uint8
    """
    x = images.float()
    for size in ((x.shape[2], SIDE), (SIDE, SIDE)):
        x = F.interpolate(x, size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return x.to(th.uint8)


def crop_center(images: th.Tensor) -> th.Tensor:
    """The middle 90 % of the area at the full size again, sampled bilinearly as TensorFlow's crop_and_resize does.

    :param images: ``(N, 3, 224, 224)`` uint8
    :return: the same shape and type
    """
    side = CROP_AREA**0.5
    at = th.linspace(-side, side, SIDE, device=images.device)
    grid = th.stack(th.meshgrid(at, at, indexing="xy"), dim=-1).expand(len(images), -1, -1, -1)
    x = F.grid_sample(images.float() / 255.0, grid, mode="bilinear", align_corners=True)
    return (x * 255.5).clamp(0, 255).to(th.uint8)  # TensorFlow's conversion of [0, 1] to uint8
