"""Train a small model of OpenVLA's architecture on demonstrations, and save it as an OpenVLA checkpoint.

    for env in PushCube PullCube; do
        python -m rpd_sb3.collect --env $env-v1 --teacher scripted --teacher-kwargs noise:0.15 \
            --env-kwargs obs:rgb image_size:224 -n 120 --out $env.npz
    done
    python examples/tiny_openvla/train.py PushCube.npz PullCube.npz --out my_tiny_openvla

Same parts as the 7B model (two vision towers, projector, Llama, 256 action tokens, statistics of the data), a thousandth of
the size, from random weights. It takes minutes on two CPU cores. It knows its demonstrations' tasks and nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from safetensors.torch import save_file
from torch.nn import functional as F

from rpd_sb3 import demonstrations
from rpd_sb3.bins import Bounds, to_tokens
from rpd_sb3.teachers.openvla.checkpoint import TEXT_DEFAULTS, read_normalization
from rpd_sb3.teachers.openvla.images import Preprocessor
from rpd_sb3.teachers.openvla.model import Batch, OpenVLAModel, batch_texts
from rpd_sb3.teachers.openvla.text import Prompts
from rpd_sb3.teachers.openvla.vision import TowerShape

HERE = Path(__file__).parent
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
DINO = TowerShape(64, 2, 256, 256, 4, has_cls=True, layer_scale=True)
SIGLIP = TowerShape(64, 2, 256, 256, 0, has_cls=False, layer_scale=False)
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.1,  # Llama's 0.02 is for thousands of dimensions
}
N_BINS = 256
LAST_ID = 31999
"""Id of the least action; the others count down from here."""
UNNORM_KEY = "maniskill_tiny"


class Data(NamedTuple):
    """Frames of all tasks; the last episodes of each are held out."""

    images: np.ndarray
    """``(n, 224, 224, 3)`` uint8."""
    tokens: np.ndarray
    """``(n, 7)`` ids."""
    texts: list[str]
    """Instruction of each task."""
    tasks: np.ndarray
    """``(n,)`` index into ``texts``."""
    held_out: np.ndarray
    """``(n,)`` bool."""
    statistics: dict[str, Any]


def load(paths: list[str], share: float = 0.1) -> Data:
    """Frames of demonstration files, as OpenVLA's data have them: the gripper from 0 to 1, all else by percentiles."""
    found = [demonstrations.load(path) for path in paths]
    texts = [str(demos.metadata["instruction"]) for demos in found]
    actions = np.concatenate([demos.actions for demos in found]).astype(np.float64)
    actions[:, -1] = (actions[:, -1] + 1) / 2
    mask = [True] * (actions.shape[1] - 1) + [False]
    q01, q99 = (np.quantile(actions, q, axis=0) for q in (0.01, 0.99))
    bounds = Bounds(np.where(mask, q01, -1.0), np.where(mask, q99, 1.0))
    statistics = {"mean": actions.mean(0), "std": actions.std(0), "q01": q01, "q99": q99}
    action = {key: values.tolist() for key, values in statistics.items()} | {"mask": mask}
    held_out = []
    for demos in found:
        episodes = np.cumsum(demos.episode_starts)
        held_out.append(episodes > (1 - share) * episodes[-1])
    return Data(
        np.concatenate([np.asarray(demos.observations) for demos in found]),
        LAST_ID - to_tokens(actions, N_BINS, bounds),
        texts,
        np.repeat(np.arange(len(found)), [len(demos.actions) for demos in found]),
        np.concatenate(held_out),
        {
            UNNORM_KEY: {
                "action": action,
                "num_transitions": len(actions),
                "num_trajectories": int(sum(demos.n_episodes for demos in found)),
            }
        },
    )


def position_embedding(side: int, width: int) -> th.Tensor:
    """Sines and cosines of row and column at growing frequencies, ``(1, side * side, width)``."""
    frequencies = 2.0 ** th.arange(width // 4) * th.pi / side / 2
    at = th.arange(side)[:, None] * frequencies
    waves = th.cat([at.sin(), at.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return th.cat([rows, columns], dim=-1).reshape(1, side * side, width)


class Trainer:
    """Cross entropy of the action tokens, all other tokens together standing for one more.

    The vision towers keep their random weights: each patch's colours and place, mixed, are enough for these scenes, and their
    features have to be computed only once. Projector and language model are trained.
    """

    def __init__(self, data: Data, device: th.device, learning_rate: float, n_steps: int) -> None:
        self.data, self.device = data, device
        self.model = OpenVLAModel(DINO, SIGLIP, TEXT_DEFAULTS | TEXT).to(device)
        self.vision = self.model.vision_backbone.requires_grad_(False)
        for tower in (self.vision.featurizer, self.vision.fused_featurizer):
            tower.pos_embed.copy_(position_embedding(16, DINO.width))
        self.prompts = Prompts(HERE / "checkpoint" / "tokenizer.json")
        self.features = self.look(Preprocessor(read_normalization(HERE / "checkpoint"), device, th.float32))
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = th.optim.AdamW(trained, learning_rate, weight_decay=0.05)
        self.schedule = th.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, n_steps, pct_start=0.05)

    @th.no_grad()
    def look(self, preprocess: Preprocessor) -> th.Tensor:
        """Features of all frames, ``(n, 256, 128)``."""
        images = self.data.images
        parts = [self.vision(preprocess(images[at : at + 64])).half() for at in range(0, len(images), 64)]
        return th.cat(parts)

    def loss(self, rows: np.ndarray) -> tuple[th.Tensor, th.Tensor]:
        """Mean cross entropy in nats, and the share of tokens that would have been chosen."""
        data = self.data
        texts = batch_texts([self.prompts(data.texts[task]) for task in data.tasks[rows]], self.device)
        tokens = th.from_numpy(data.tokens[rows]).to(self.device)
        self.model.vision_backbone = th.nn.Identity()  # the features are there already
        hidden = self.model.hidden(Batch(self.features[rows].float(), *texts), tokens)
        # The action tokens, and the first of all others: when the model is saved, those get its row.
        head = self.model.language_model.lm_head.weight
        scores = F.linear(hidden, th.cat([head[LAST_ID + 1 - N_BINS : LAST_ID + 1], head[:1]]))
        wanted = tokens - (LAST_ID + 1 - N_BINS)
        return F.cross_entropy(scores.flatten(0, 1), wanted.flatten()), (scores.argmax(-1) == wanted).float().mean()

    def train(self, n_steps: int, batch_size: int, rng: np.random.Generator) -> None:
        """``n_steps`` minibatches; a line now and then."""
        rows = np.flatnonzero(~self.data.held_out)
        started = time.monotonic()
        for step in range(1, n_steps + 1):
            loss, _ = self.loss(rng.choice(rows, batch_size))
            self.optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()
            if step % max(n_steps // 20, 1) == 0:
                held, accuracy = self.held_out()
                line = f"step {step}: loss {loss.item():.3f}, held out {held:.3f}, tokens right {accuracy:.0%}"
                print(f"{line}, {time.monotonic() - started:.0f} s", flush=True)
        self.model.vision_backbone = self.vision

    @th.no_grad()
    def held_out(self) -> tuple[float, float]:
        """Loss and share of right tokens on frames that were not trained on."""
        rows = np.flatnonzero(self.data.held_out)[:256]
        loss, accuracy = self.loss(rows)
        return loss.item(), accuracy.item()


def save(model: OpenVLAModel, statistics: dict[str, Any], folder: Path) -> None:
    """Write the checkpoint, with the parts that OpenVLA has and never uses, so that its own code would load it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in model.state_dict().items()}
    head = weights["language_model.lm_head.weight"]
    first = LAST_ID + 1 - N_BINS
    head[1:first] = head[0]
    head[LAST_ID + 1 :] = head[0]
    for tower, shape in (("featurizer", DINO), ("fused_featurizer", SIGLIP)):
        prefix = f"vision_backbone.{tower}."
        block = f"{prefix}blocks.{shape.depth - 2}."
        copies = {
            name.replace(block, f"{prefix}blocks.{shape.depth - 1}."): w for name, w in weights.items() if block in name
        }
        weights |= {name: th.zeros_like(weight) for name, weight in copies.items()}
        weights |= {f"{prefix}norm.{name}": th.zeros(shape.width, dtype=th.bfloat16) for name in ("weight", "bias")}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "use_fused_vision_backbone": True,
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [224, 224],
        "n_action_bins": N_BINS,
        "pad_to_multiple_of": 64,
        "pad_token_id": 32000,
        "text_config": {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000, **TEXT},
        "torch_dtype": "bfloat16",
        "norm_stats": statistics,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    for name in (*FILES, "preprocessor_config.json"):
        if (folder / name).absolute() != (HERE / "checkpoint" / name).absolute():
            shutil.copy(HERE / "checkpoint" / name, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstrations", nargs="+", help="files of rpd_sb3.collect, with images of 224 x 224 pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    th.manual_seed(args.seed)
    data = load(args.demonstrations)
    trainer = Trainer(data, th.device(args.device), args.learning_rate, args.steps)
    n_parameters = sum(weight.numel() for weight in trainer.model.parameters())
    print(
        f"{len(data.tokens):,} frames of {len(data.texts)} tasks, {n_parameters:,} parameters, {args.device}",
        flush=True,
    )
    trainer.train(args.steps, args.batch_size, np.random.default_rng(args.seed))
    save(trainer.model, data.statistics, args.out)
    print(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
