"""As much of the interfaces of ``octo`` and ``jax`` as OctoTeacher uses, in numpy, to test its wiring; no network.

An action says what the model was given, see :meth:`Head.predict_action`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

CHUNK = 4
MAX_HORIZON = 3
SIZE, WRIST_SIZE = (8, 8), (4, 6)
SEES, FRAMES, OLDEST, WORDS, STEP, NOISE, WRIST = range(7)
"""What the dimensions of an action say: the mean of the present image, the number of frames, the mean of the first one
that is not masked, the number of words, the step of the chunk, noise from the key, the mean of the wrist's image."""
STATISTICS: dict[str, Any] = {"mean": np.zeros(7), "std": np.ones(7), "mask": np.ones(7, bool)}


class Head:
    readout_key = "readout_action"
    action_horizon = CHUNK

    def predict_action(self, outputs: Any, rng: Any, train: bool, embodiment_action_dim: int) -> np.ndarray:
        assert not train
        assert embodiment_action_dim == 7
        chunk = np.repeat(outputs[self.readout_key]["tokens"][0][None], CHUNK, axis=0)
        chunk[:, STEP] = np.arange(CHUNK)
        chunk[:, NOISE] = np.random.default_rng(rng).random()
        return chunk[None]


class ContinuousActionHead(Head):
    """The name is what counts."""


class TextProcessor:
    def __init__(self) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: list[str]) -> dict[str, np.ndarray]:
        self.encoded += texts
        return {"input_ids": np.array([[len(text.split())] for text in texts])}


class OctoModel:
    """One for each folder, so that tests can look at what it was asked."""

    latest: OctoModel
    load_error: Exception | None = None
    changes: dict[str, Any] = {}

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.params: dict[str, Any] = {
            "octo_transformer": {"kernel": np.zeros((3, 4), np.float32), "bias": np.zeros(4, np.float16)}
        }
        self.config: dict[str, Any] = {"dataset_kwargs": {"action_proprio_normalization_type": "normal"}}
        self.text_processor: Any = TextProcessor()
        self.dataset_statistics: Any = {"action": STATISTICS}
        self.example_batch: Any = {
            "observation": {
                "image_primary": np.zeros((1, 2, *SIZE, 3), np.uint8),
                "image_wrist": np.zeros((1, 2, *WRIST_SIZE, 3), np.uint8),
            }
        }
        heads = {"action": Head()}
        transformer = SimpleNamespace(max_horizon=MAX_HORIZON)
        self.module: Any = SimpleNamespace(heads=heads, octo_transformer=transformer, bind=lambda _: self.module)

    @classmethod
    def load_pretrained(cls, path: str, step: int | None = None) -> OctoModel:
        if cls.load_error is not None:
            raise cls.load_error
        cls.latest = cls()
        vars(cls.latest).update(cls.changes, path=path, step=step)
        return cls.latest

    def replace(self, **_: Any) -> OctoModel:
        return self

    def create_tasks(self, texts: list[str]) -> dict[str, Any]:
        masks = {"language_instruction": np.ones(len(texts), bool)}
        images = {"image_primary": np.zeros((len(texts), *SIZE, 3))}
        return {**images, "language_instruction": self.text_processor.encode(texts), "pad_mask_dict": masks}

    def run_transformer(self, observations: Any, tasks: Any, mask: Any, train: bool) -> dict[str, Any]:
        assert not train
        assert "image_primary" not in tasks
        images = observations["image_primary"]
        self.batches.append(len(images))
        assert images.dtype == np.uint8
        tokens = np.zeros((len(images), 7), np.float32)
        tokens[:, SEES] = images[:, -1].mean(axis=(1, 2, 3))
        tokens[:, FRAMES] = mask.sum(axis=1)
        tokens[:, OLDEST] = [frames[seen][0].mean() for frames, seen in zip(images, mask)]
        tokens[:, WORDS] = tasks["language_instruction"]["input_ids"][:, 0]
        if "image_wrist" in observations:
            tokens[:, WRIST] = observations["image_wrist"][:, -1].mean(axis=(1, 2, 3))
        return {Head.readout_key: {"tokens": tokens}}

    def sample_actions(self, observations: Any, tasks: Any, timestep_pad_mask: Any = None) -> None:
        """Only its signature is looked at."""


def tree_map(function: Any, tree: Any, *rest: Any) -> Any:
    if isinstance(tree, dict):
        return {key: tree_map(function, tree[key], *(other[key] for other in rest)) for key in tree}
    if isinstance(tree, tuple):
        return tuple(tree_map(function, *items) for items in zip(tree, *rest))
    return function(tree, *rest)


def vmap(function: Any, in_axes: Any = 0) -> Any:
    def mapped(*args: Any) -> np.ndarray:
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        first = next(arg for arg, axis in zip(args, axes) if axis is not None)
        n = len(first["tokens"] if isinstance(first, dict) else first)
        rows = [[x if axis is None else tree_map(lambda y: y[i], x) for x, axis in zip(args, axes)] for i in range(n)]  # noqa: B023
        return np.stack([function(*row) for row in rows])

    return mapped


def fold_in(key: np.ndarray, data: int) -> np.ndarray:
    return np.random.SeedSequence([*key.tolist(), int(data)]).generate_state(2)


def fake_jax() -> ModuleType:
    jax: Any = ModuleType("jax")
    jax.random = SimpleNamespace(PRNGKey=lambda seed: np.array([0, seed], np.uint32), fold_in=fold_in)
    jax.tree_util = SimpleNamespace(tree_map=tree_map)
    jax.numpy, jax.vmap, jax.jit, jax.device_put = np, vmap, lambda function: function, lambda tree: tree
    return jax  # type: ignore[no-any-return]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a package ``octo`` into a folder and on the path, a fake ``jax`` into its place, and write a checkpoint.

    :return: path of the checkpoint
    """
    write_package(folder, "from tests.support.fake_octo import OctoModel")
    use_package(folder, monkeypatch)
    monkeypatch.setitem(sys.modules, "jax", fake_jax())
    monkeypatch.setattr(OctoModel, "load_error", None)
    monkeypatch.setattr(OctoModel, "changes", {})
    checkpoint = folder / "checkpoint"
    for step in (0, 5):
        (checkpoint / str(step)).mkdir(parents=True)
    for name in ("config.json", "example_batch.msgpack", "dataset_statistics.json"):
        (checkpoint / name).write_text(json.dumps({}))
    return str(checkpoint)


def write_package(folder: Path, source: str) -> None:
    """The files by which octo is known; importing its model runs ``source``."""
    (folder / "octo" / "model").mkdir(parents=True)
    for package in ("octo", "octo/model"):
        (folder / package / "__init__.py").touch()
    (folder / "octo" / "model" / "octo_model.py").write_text(source)


def use_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import octo`` find what is in a folder."""
    monkeypatch.syspath_prepend(folder)
    forget_package(monkeypatch)


def forget_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import octo`` look for files, whatever was imported before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "octo"]:
        monkeypatch.delitem(sys.modules, name)
    # What a test imports is gone after it: monkeypatch removes what was not there.
    for name in ("octo", "octo.model", "octo.model.octo_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]
