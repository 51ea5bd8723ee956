"""Loads a checkpoint into the model, tensor by tensor: memory never holds two copies of the weights."""

from __future__ import annotations

import torch as th
from safetensors import safe_open
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from rpd_sb3.teachers.openvla.checkpoint import Checkpoint
from rpd_sb3.teachers.openvla.model import OpenVLAModel
from rpd_sb3.teachers.openvla.vision import tower_shape

DTYPES = {"bf16": th.bfloat16, "fp16": th.float16, "fp32": th.float32}


def load_model(checkpoint: Checkpoint, device: th.device, dtype: th.dtype) -> OpenVLAModel:
    """The model, ready for inference. Weights that inference does not use (the towers' last blocks, norms, pooling) are not read.

    :param checkpoint: from :func:`~rpd_sb3.teachers.openvla.checkpoint.open_checkpoint`
    :param device: of the weights
    :param dtype: of the weights
    :raises ValueError: if a weight is missing, or its shape does not fit the configuration and the other weights
    """
    dino, siglip = (
        tower_shape(checkpoint.tensors, f"vision_backbone.{name}.") for name in ("featurizer", "fused_featurizer")
    )
    with th.device("meta"):
        model = OpenVLAModel(dino, siglip, dict(checkpoint.text_config))
    check_weights(checkpoint, model)
    read_weights(checkpoint, model, device, dtype)
    fuse_norms(model)
    # Not in the checkpoint; its frequencies stay float32 whatever the dtype of the weights.
    model.language_model.model.rotary_emb = LlamaRotaryEmbedding(model.llama_config).to(device)
    return model.eval().requires_grad_(False)


def fuse_norms(model: OpenVLAModel) -> None:
    """Replaces transformers' RMSNorm, six kernels, by PyTorch's, one: a prefill of 32 rows takes 221 ms, not 245 (H200, bf16)."""
    for module in model.language_model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, device="meta")
                norm.weight = child.weight
                setattr(module, name, norm)


def check_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Checks that the checkpoint has every weight of the model, in its shape.

    :raises ValueError: with the name of a weight that is missing or has another shape
    """
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if missing := sorted(wanted.keys() - checkpoint.tensors.keys()):
        raise ValueError(f"{checkpoint.folder} lacks {len(missing)} of {len(wanted)} weights, e.g. {missing[0]}")
    for name, shape in wanted.items():
        if (got := checkpoint.tensors[name].shape) != shape:
            raise ValueError(
                f"{checkpoint.folder}: {name} has the shape {got}, but config and other weights need {shape}"
            )


def read_weights(checkpoint: Checkpoint, model: nn.Module, device: th.device, dtype: th.dtype) -> None:
    """Reads the model's weights, shard by shard."""
    by_file: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        by_file.setdefault(str(checkpoint.tensors[name].file), []).append(name)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in names:
                parent, _, leaf = name.rpartition(".")
                weight = file.get_tensor(name).to(device, dtype)
                setattr(model.get_submodule(parent), leaf, nn.Parameter(weight, requires_grad=False))
