"""A small OpenVLA checkpoint whose weights follow from their names, and the answers that OpenVLA's own code gave."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIXTURE = Path(__file__).parent / "data" / "openvla_tiny"
RULES: tuple[tuple[tuple[str, ...], float, float, bool], ...] = (
    (("embed_tokens.weight",), 0.05, 0.0, False),
    (("scale_factor",), 0.05, 0.5, False),
    (("norm.weight", "norm1.weight", "norm2.weight"), 0.1, 1.0, False),
    (("bias",), 0.02, 0.0, False),
    (("pos_embed", "cls_token", "reg_token", "latent"), 0.1, 0.0, False),
    (("patch_embed.proj.weight",), 0.1, 0.0, True),
    (("down_proj.weight",), 3.0, 0.0, True),
    (("q_proj.weight", "k_proj.weight"), 2.0, 0.0, True),
    (("attn.qkv.weight",), 1.5, 0.0, True),
    (("",), 1.0, 0.0, True),
)
"""End of the name, std, mean, whether the std is to be divided by the square root of the fan-in."""


def weight(name: str, shape: list[int]) -> np.ndarray:
    """The tensor of that name."""
    x = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape)).astype(np.float32)
    fan_in = math.prod(shape[1:])
    ends, std, mean, scaled = next(rule for rule in RULES if name.endswith(rule[0]))
    scale: Any = std / math.sqrt(fan_in) if scaled else std
    if name.endswith("lm_head.weight"):  # action tokens and end-of-sequence stand out
        scale = np.full((shape[0], 1), 0.75 / math.sqrt(fan_in))
        scale[31744:32000] = scale[2] = 3 / math.sqrt(fan_in)
    return x * np.float32(scale) + np.float32(mean)


def make_checkpoint(folder: Path, n_shards: int = 1) -> Path:
    """Write the checkpoint; with several shards, an index as well."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in FIXTURE.glob("*.json"):
        shutil.copy(path, folder)
    shapes = json.loads((FIXTURE / "keys.json").read_text())
    weights = {name: weight(name, shape) for name, shape in shapes.items()}
    if n_shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder
    names = sorted(weights)
    weight_map = {}
    for i in range(n_shards):
        file = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = names[i::n_shards]
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def goldens() -> dict[str, np.ndarray]:
    """Inputs and answers; images i = 0..5 and instructions j = 0..2."""
    with np.load(FIXTURE / "goldens.npz") as file:
        return dict(file)
