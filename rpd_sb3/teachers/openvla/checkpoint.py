"""An OpenVLA checkpoint's folder, checked before any weights are read.

The layout is that of the published Hugging Face models: config.json, safetensors in one file or in shards with an index,
tokenizer.json, preprocessor_config.json and, for fine-tuned models, dataset_statistics.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from rpd_sb3.contract.names import closest

TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,  # Llama-2's own config says 1e-5; OpenVLA was trained and published with this one
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "vocab_size": 32064,
    "hidden_act": "silu",
}
"""What a published config.json leaves out of ``text_config``, because it was the default when the file was written."""
ARCHITECTURE = {
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "image_resize_strategy": "resize-naive",
}
"""Keys of config.json whose values the code here is written for."""


class Entry(NamedTuple):
    """A tensor of the checkpoint: its file and its shape."""

    file: Path
    shape: tuple[int, ...]


class Statistics(NamedTuple):
    """The actions of a dataset that -1 and 1 stand for: ``low + (a + 1) / 2 (high - low)`` for a in [-1, 1]."""

    key: str
    low: tuple[float, ...]
    """1st percentile of each dimension; -1 where the data were not normalized (the gripper)."""
    high: tuple[float, ...]


@dataclass(frozen=True)
class Checkpoint:
    """An OpenVLA checkpoint: a folder whose files are complete and fit together."""

    folder: Path
    config: Mapping[str, Any]
    text_config: Mapping[str, Any]
    """Values for all keys of :data:`TEXT_DEFAULTS`."""
    tensors: Mapping[str, Entry]
    normalization: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    """(mean, std) of the RGB channels for each vision tower."""
    norm_stats: Mapping[str, Any]

    @property
    def n_bins(self) -> int:
        return int(self.config.get("n_action_bins", 256))

    @property
    def first_unused_id(self) -> int:
        """Token ids below this one are words; the last ``n_bins`` of them are the actions."""
        return int(self.text_config["vocab_size"]) - int(self.config.get("pad_to_multiple_of", 64))

    def statistics(self, unnorm_key: str | None) -> Statistics:
        """The statistics that unnormalize actions.

        :param unnorm_key: name of the dataset; None if there is only one
        :raises ValueError: for an unknown name, a missing name where there are several, or unusable statistics
        """
        known = ", ".join(self.norm_stats) or "none"
        if unnorm_key is None and len(self.norm_stats) == 1:
            unnorm_key = next(iter(self.norm_stats))
        if unnorm_key is None:
            raise ValueError(f"{self.folder} was trained on several datasets: choose unnorm_key, one of {known}")
        if unnorm_key not in self.norm_stats:
            hint = closest(unnorm_key, self.norm_stats)
            raise ValueError(f"{self.folder} has no unnorm_key {unnorm_key!r}, only {known}{hint}")
        try:
            action = self.norm_stats[unnorm_key]["action"]
            q01, q99 = [float(x) for x in action["q01"]], [float(x) for x in action["q99"]]
            mask = action.get("mask") or [True] * len(q01)
            if not len(q01) == len(q99) == len(mask) > 0 or not all(map(math.isfinite, [*q01, *q99])):
                raise ValueError("q01, q99 and mask must be of one length, and finite")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{self.folder}: the statistics of {unnorm_key!r} cannot be used: {error!r}") from error
        low = tuple(q if normalized else -1.0 for q, normalized in zip(q01, mask))
        high = tuple(q if normalized else 1.0 for q, normalized in zip(q99, mask))
        return Statistics(unnorm_key, low, high)


def open_checkpoint(path: str) -> Checkpoint:
    """Find a checkpoint and read everything but its weights.

    :param path: folder, or the hub id ``org/name`` of a model, which is downloaded if it is not in the cache
    :raises ValueError: in one sentence, if a file is missing or damaged, or the model has another architecture
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(path)
    config = _read_json(folder / "config.json")
    for key, expected in ARCHITECTURE.items():
        if config.get(key) != expected:
            raise ValueError(f"{folder} has {key}={config.get(key)!r}; an OpenVLA checkpoint has {expected!r}")
    given = config.get("text_config")
    if not isinstance(given, dict):
        raise ValueError(f"{folder / 'config.json'} has no text_config")
    text_config = {key: given.get(key, default) for key, default in TEXT_DEFAULTS.items()}
    stats = config.get("norm_stats") or {}
    if (folder / "dataset_statistics.json").is_file():  # of a fine-tuned model: they replace those of the base model
        stats = _read_json(folder / "dataset_statistics.json")
    if not stats:
        raise ValueError(
            f"{folder} has no norm_stats in config.json and no dataset_statistics.json: actions have no scale"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json")
    return Checkpoint(folder, config, text_config, _find_tensors(folder), read_normalization(folder), stats)


def _download(path: str) -> Path:
    parts = path.split("/")
    if len(parts) != 2 or not all(parts) or path.startswith((".", "~")):
        raise ValueError(f"there is no folder {path!r}; give an OpenVLA checkpoint's folder, or its hub id org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub's errors have no common class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"there is no folder {path!r}, and as a hub id it cannot be downloaded: {reason}") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}: it is not a complete OpenVLA checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _find_tensors(folder: Path) -> dict[str, Entry]:
    """All tensors of the shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not {str}.issuperset(map(type, weight_map.values())):
            raise ValueError(f"{index} has no weight_map from tensors to files")
        names = sorted(set(weight_map.values()))
    else:
        weight_map = None
        names = ["model.safetensors"]
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, {len(missing)} of {len(names)} files of weights")
    found = {name: entry for file in names for name, entry in read_header(folder / file).items()}
    for name, file in (weight_map or {}).items():
        if name not in found or found[name].file.name != file:
            raise ValueError(f"{folder / file} lacks the tensor {name}, which the index says it has")
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """Names and shapes of the tensors in a safetensors file; the library checks lengths and offsets.

    :raises ValueError: if it is not a safetensors file, or incomplete
    """
    try:
        with safe_open(path, framework="np") as file:
            return {name: Entry(path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file, or an incomplete one ({error}): copy it again") from error


def read_normalization(folder: Path) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]:
    """(mean, std) of the RGB channels for each vision tower.

    From ``tvf_normalize_params``, which upstream uses: the conversion after training has rounded them to bfloat16.

    :raises ValueError: if the file has none, or not for two towers of three channels
    """
    content = _read_json(folder / "preprocessor_config.json")
    try:
        towers = tuple(
            (tuple(map(float, tower["mean"])), tuple(map(float, tower["std"])))
            for tower in content["tvf_normalize_params"]
        )
        if len(towers) != 2 or any(len(values) != 3 for tower in towers for values in tower):
            raise ValueError("expected 2 towers of 3 channels")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'preprocessor_config.json'}: tvf_normalize_params cannot be used: {error!r}"
        ) from error
    return towers
