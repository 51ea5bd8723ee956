"""A small OpenVLA checkpoint whose weights follow from their names, and the answers that OpenVLA's own code gave."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from safetensors.numpy import save_file

from rpd_sb3.contract.teacher import Query
from rpd_sb3.teachers.openvla.checkpoint import open_checkpoint
from rpd_sb3.teachers.openvla.images import Preprocessor
from rpd_sb3.teachers.openvla.loading import load_model
from rpd_sb3.teachers.openvla.model import Batch, OpenVLAModel, batch_texts
from rpd_sb3.teachers.openvla.text import Prompts
from tests.support import ROOT

FIXTURE = ROOT / "tests" / "data" / "openvla_tiny"
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


ROWS = [(i, j) for i in range(6) for j in range(3)]
"""Every image with every instruction."""
FEW = [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2)]
"""Every image once."""
TOLERANCES = {
    "pixels": 0.0,
    "vision_features": 5e-5,
    "vision_sums": 2e-3,
    "projected": 5e-5,
    "projected_sums": 1e-3,
    "last_hidden": 1e-4,
    "logits": 2e-4,
}
"""Greatest deviations from the goldens in float32 on a CPU; tests/data/README.md allows 5e-4 for logits."""


class Answers(NamedTuple):
    """What the model made of rows ``(i, j)``, up to its logits of all tokens."""

    pixels: th.Tensor
    features: th.Tensor
    projected: th.Tensor
    last_hidden: th.Tensor
    ids: th.Tensor
    logits: th.Tensor

    def deviations(self, rows: list[tuple[int, int]]) -> dict[str, float]:
        """Greatest deviations from the goldens, by the keys of :data:`TOLERANCES`."""
        wanted = goldens()
        i, j = map(list, zip(*rows))
        pairs = {
            "pixels": (self.pixels[:, :, ::14, ::14], wanted["pixel_values_s"][i]),
            "vision_features": (self.features[:, ::16], wanted["vision_features_s"][i]),
            "vision_sums": (self.features.double().sum(1), wanted["vision_sums"][i]),
            "projected": (self.projected[:, ::16], wanted["projected_s"][i]),
            "projected_sums": (self.projected.double().sum(1), wanted["projected_sums"][i]),
            "last_hidden": (self.last_hidden, wanted["last_hidden"][i, j]),
            "logits": (self.logits[..., 31744:32000], wanted["logits"][i, j]),
        }
        return {name: float(np.abs(ours.numpy() - theirs).max()) for name, (ours, theirs) in pairs.items()}


@lru_cache
def goldens() -> dict[str, np.ndarray]:
    """Inputs and answers; images i = 0..5 and instructions j = 0..2."""
    with np.load(FIXTURE / "goldens.npz") as file:
        return dict(file)


def images(rows: list[tuple[int, int]]) -> list[np.ndarray]:
    """The rows' images, of 224 or 256 pixels."""
    both = [*goldens()["images_224"], *goldens()["images_256"]]
    return [both[i] for i, _ in rows]


def instructions(rows: list[tuple[int, int]]) -> list[str]:
    """The rows' instructions."""
    return [str(goldens()["instructions"][j]) for _, j in rows]


def load(folder: Path) -> OpenVLAModel:
    """The model in float32 on the CPU."""
    return load_model(open_checkpoint(str(folder)), th.device("cpu"), th.float32)


def preprocess(folder: Path, rows: list[tuple[int, int]]) -> th.Tensor:
    """Pixels of the rows' images."""
    make = Preprocessor(open_checkpoint(str(folder)).normalization, th.device("cpu"), th.float32)
    return th.cat([make(image[None]) for image in images(rows)])


def prompts(folder: Path, rows: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """Token ids of the rows' instructions."""
    make = Prompts(folder / "tokenizer.json")
    return [make(text) for text in instructions(rows)]


def batch_of(folder: Path, rows: list[tuple[int, int]]) -> Batch:
    """The rows as the model's input."""
    return Batch(preprocess(folder, rows), *batch_texts(prompts(folder, rows), th.device("cpu")))


@th.inference_mode()
def answers(model: OpenVLAModel, batch: Batch) -> Answers:
    """What the model makes of a batch, step by step."""
    features = model.vision_backbone(batch.pixels)
    prompted = model.read(batch, 6)
    ids, logits = model.generate(prompted, 7)
    return Answers(batch.pixels, features, model.projector(features), prompted.hidden, ids, logits)


def tokens_of(rows: list[tuple[int, int]]) -> np.ndarray:
    """Ids that upstream's code generates."""
    return np.stack([goldens()["tokens"][row] for row in rows])


def question(rows: list[tuple[int, int]], actions: np.ndarray | None = None, size: int = 256) -> Query:
    """A teacher's query; the rows' images all have ``size`` pixels."""
    seen = images(rows)
    assert {len(image) for image in seen} == {size}
    inputs = {"images.human": np.stack(seen), "instruction": np.array(instructions(rows))}
    return Query(inputs, np.arange(len(rows)), np.ones(len(rows), bool), actions)
