r"""Train a small model of OpenVLA's architecture on demonstrations, and save it as an OpenVLA checkpoint.

    for env in PushCube PullCube; do
        python -m rpd_sb3.collect --env $env-v1 --teacher scripted --noise 0.4 --env-kwargs obs:rgb image_size:224 \
            -n 250 --n-envs 2 --vec-env dummy --out $env.npz
    done
    python examples/tiny_openvla/train.py PushCube.npz PullCube.npz --out my_tiny_openvla

Same parts as the 7B model (two vision towers, projector, Llama, 256 action tokens, statistics of the data), a thousandth of
the size, from random weights. It takes minutes on two CPU cores. It knows its demonstrations' tasks and nothing else.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch as th
from safetensors.torch import save_file
from torch.nn import functional as F

from rpd_sb3.contract.bins import Bounds, to_tokens
from rpd_sb3.demos import files as demonstrations
from rpd_sb3.teachers.openvla.checkpoint import TEXT_DEFAULTS, read_normalization
from rpd_sb3.teachers.openvla.images import Preprocessor
from rpd_sb3.teachers.openvla.model import Batch, OpenVLAModel, batch_texts
from rpd_sb3.teachers.openvla.text import Prompts
from rpd_sb3.teachers.openvla.vision import N_HEADS, PATCH, Block, TowerShape, VisionTower

HERE = Path(__file__).parent
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
WIDTH = 64
DINO = TowerShape(WIDTH, 1, 256, 256, 4, has_cls=True, layer_scale=True)
SIGLIP = TowerShape(WIDTH, 2, 256, 256, 0, has_cls=False, layer_scale=False)
"""The last block of a tower is never used: DINO's features are its patches, SigLIP has one block."""
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
CONTENT = 28
"""Dimensions of a patch's colours."""
SMOOTHING = 4.0
"""Bins: a token's neighbours are almost as right."""


class Data(NamedTuple):
    """Frames of all tasks; the last episodes of each are held out."""

    images: np.ndarray
    """``(n, 224, 224, 3)`` uint8."""
    actions: np.ndarray
    """``(n, 7)`` as demonstrated."""
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
        np.concatenate([demos.actions for demos in found]),
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
    frequencies = 2.0 ** th.arange(width // 4) * math.pi / side / 2
    at = th.arange(side)[:, None] * frequencies
    waves = th.cat([at.sin(), at.cos()], dim=1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return th.cat([rows, columns], dim=-1).reshape(1, side * side, width)


def cosine_filters() -> th.Tensor:
    """The lowest frequencies of a patch's cosine transform, for each colour: ``(CONTENT, 3, 14, 14)``."""
    frequencies = [(u, total - u) for total in range(PATCH) for u in range(total + 1)]
    at = (th.arange(PATCH) + 0.5) * math.pi / PATCH
    filters = th.zeros(CONTENT, 3, PATCH, PATCH)
    for i in range(CONTENT):
        u, v = frequencies[i // 3]
        wave = th.outer((u * at).cos(), (v * at).cos())
        filters[i, i % 3] = wave / wave.norm() / PATCH * (3.0 if i >= 3 else 1.0)
    return filters


class Keypoints(th.nn.Module):
    """Where in the image something of a colour is: sixteen spatial softmaxes, learned with a regression of the actions.

    They are the sixteen heads of SigLIP's block. Its stream holds, of each patch, CONTENT colours, column and row, and two
    constants that keep the LayerNorm from changing with the content; what the heads find is written behind them.
    """

    COLUMN, CONSTANT, FOUND = CONTENT, CONTENT + 2, CONTENT + 4
    SCALE = 20.0

    def __init__(self, tower: VisionTower, n_tasks: int) -> None:
        super().__init__()
        self.tower = tower
        self.keys = th.nn.Parameter(3.0 * th.randn(N_HEADS, self.CONSTANT))
        layers = th.nn.Linear(2 * N_HEADS + n_tasks, 128), th.nn.ReLU(), th.nn.Linear(128, 128), th.nn.ReLU()
        self.regression = th.nn.Sequential(*layers, th.nn.Linear(128, 7))
        with th.no_grad():
            tower.patch_embed.proj.weight.zero_()[:CONTENT] = cosine_filters()
            tower.patch_embed.proj.bias.zero_()
            at = th.linspace(-1.0, 1.0, 16)
            tower.pos_embed.zero_()[0, :, self.COLUMN] = at.repeat(16)
            tower.pos_embed[0, :, self.COLUMN + 1] = at.repeat_interleave(16)
            tower.pos_embed[0, :, self.CONSTANT] = self.SCALE
            tower.pos_embed[0, :, self.CONSTANT + 1] = -self.SCALE

    @property
    def norm(self) -> float:
        """What the LayerNorm divides by."""
        return self.SCALE * math.sqrt(2 / WIDTH)

    def forward(self, patches: th.Tensor, tasks: th.Tensor) -> th.Tensor:
        """Actions ``(B, 7)`` of normalised patches ``(B, 256, WIDTH)`` and tasks ``(B, n_tasks)``, one-hot."""
        shares = (patches[..., : self.CONSTANT] @ self.keys.T).softmax(dim=1)
        places = patches[..., self.COLUMN : self.CONSTANT] * self.norm
        found = th.einsum("bph,bpc->bhc", shares, places)
        return self.regression(th.cat([found.flatten(1), tasks], dim=1))

    def fit(self, patches: th.Tensor, tasks: th.Tensor, actions: th.Tensor, n_steps: int) -> None:
        """Train for ``n_steps`` minibatches of 256 frames."""
        optimizer = th.optim.AdamW([self.keys, *self.regression.parameters()], 5e-3)
        schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, n_steps)
        for _ in range(n_steps):
            rows = th.randint(len(patches), (256,))
            loss = F.mse_loss(self(patches[rows], tasks[rows]), actions[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"keypoints: mean squared error {loss.item():.3f} of {actions.var(0).mean():.3f}", flush=True)

    @th.no_grad()
    def install(self) -> None:
        """Write them into the block: the same query everywhere, the key's first entry, column and row as values."""
        block = self.tower.blocks[0]
        for weight in (*block.attn.parameters(), *block.mlp.parameters()):
            weight.zero_()
        dim = WIDTH // N_HEADS
        for head in range(N_HEADS):
            q, k, v = (part * WIDTH + head * dim for part in range(3))
            block.attn.qkv.bias[q] = 1.0
            block.attn.qkv.weight[k, : self.CONSTANT] = self.keys[head] * math.sqrt(dim)
            for i in range(2):
                block.attn.qkv.weight[v + i, self.COLUMN + i] = 1.0
                block.attn.proj.weight[self.FOUND + 2 * head + i, head * dim + i] = self.norm


class Trainer:
    """Cross entropy of the action tokens, all other tokens together standing for one more.

    First the vision towers: what they see of a frame is then computed once. Projector and language model follow.
    """

    def __init__(self, data: Data, device: th.device, learning_rate: float, n_steps: int, n_vision_steps: int) -> None:
        self.data, self.device = data, device
        self.model = OpenVLAModel(DINO, SIGLIP, TEXT_DEFAULTS | TEXT)
        self.vision = self.model.vision_backbone.requires_grad_(False)
        self.prompts = Prompts(HERE / "checkpoint" / "tokenizer.json")
        self.preprocess = Preprocessor(read_normalization(HERE / "checkpoint"), th.device("cpu"), th.float32)
        self.features = self.look(n_vision_steps).to(device)
        self.standardize()
        self.model.to(device)
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = th.optim.AdamW(trained, learning_rate, weight_decay=0.05)
        self.schedule = th.optim.lr_scheduler.OneCycleLR(self.optimizer, learning_rate, n_steps, pct_start=0.05)

    def look(self, n_steps: int) -> th.Tensor:
        """Train the towers; features of all frames, ``(n, 256, 2 * WIDTH)``."""
        dino, siglip = self.vision.featurizer, self.vision.fused_featurizer
        keypoints = Keypoints(siglip, len(self.data.texts))
        with th.no_grad():
            dino.patch_embed.proj.weight.copy_(siglip.patch_embed.proj.weight)
            dino.patch_embed.proj.bias.zero_()
            dino.pos_embed.zero_()[..., -32:] = position_embedding(16, 32)
        if n_steps:
            rows = np.flatnonzero(~self.data.held_out)
            patches = self.all_frames(lambda x: siglip.blocks[0].norm1(siglip.patch_embed(x[:, 3:]) + siglip.pos_embed))
            tasks = F.one_hot(th.from_numpy(self.data.tasks), len(self.data.texts)).float()
            with th.enable_grad():
                keypoints.fit(patches[rows], tasks[rows], th.from_numpy(self.data.actions[rows]), n_steps)
        keypoints.install()
        return self.all_frames(self.vision)

    @th.no_grad()
    def standardize(self) -> None:
        """Begin with a projector to whose first layer all features are of mean 0 and std 1; constants count for nothing."""
        sample = self.features[:: max(len(self.features) // 500, 1)].flatten(0, 1)
        mean, std = sample.mean(0), sample.std(0)
        layer = self.model.projector.fc1
        layer.weight.mul_(th.where(std > 1e-3, 1.0 / std.clamp(min=1e-3), 0.0))
        layer.bias.sub_(layer.weight @ mean)

    @th.no_grad()
    def all_frames(self, function: Callable[[th.Tensor], th.Tensor]) -> th.Tensor:
        """A function of the pixels of all frames."""
        images = self.data.images
        return th.cat([function(self.preprocess(images[at : at + 64])) for at in range(0, len(images), 64)])

    def loss(self, rows: np.ndarray) -> tuple[th.Tensor, th.Tensor]:
        """Mean cross entropy in nats, and the mean distance of the most probable tokens in bins."""
        data = self.data
        texts = batch_texts([self.prompts(data.texts[task]) for task in data.tasks[rows]], self.device)
        tokens = th.from_numpy(data.tokens[rows]).to(self.device)
        self.model.vision_backbone = th.nn.Identity()  # the features are there already
        hidden = self.model.hidden(Batch(self.features[rows], *texts), tokens)
        # The action tokens, and the first of all others: when the model is saved, those get its row.
        head = self.model.language_model.lm_head.weight
        scores = F.linear(hidden, th.cat([head[LAST_ID + 1 - N_BINS : LAST_ID + 1], head[:1]]))
        distances = th.arange(N_BINS, device=self.device) - (tokens - (LAST_ID + 1 - N_BINS))[..., None]
        wanted = F.pad((-0.5 * (distances / SMOOTHING) ** 2).softmax(-1), (0, 1))
        error = distances.gather(-1, scores[..., :N_BINS].argmax(-1, keepdim=True)).abs().float().mean()
        return -(wanted * scores.log_softmax(-1)).sum(-1).mean(), error

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
                held, error = self.held_out()
                line = f"step {step}: loss {loss.item():.3f}, held out {held:.3f}, {error:.1f} bins off"
                print(f"{line}, {time.monotonic() - started:.0f} s", flush=True)
        self.model.vision_backbone = self.vision

    @th.no_grad()
    def held_out(self) -> tuple[float, float]:
        """Loss and error on frames that were not trained on."""
        rows = np.flatnonzero(self.data.held_out)[:256]
        loss, error = self.loss(rows)
        return loss.item(), error.item()


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
        last = Block(shape).state_dict()
        weights |= {f"{prefix}blocks.{shape.depth - 1}.{name}": th.zeros_like(w).bfloat16() for name, w in last.items()}
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
    parser.add_argument("--vision-steps", type=int, default=4000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if th.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    th.manual_seed(args.seed)
    data = load(args.demonstrations)
    trainer = Trainer(data, th.device(args.device), args.learning_rate, args.steps, args.vision_steps)
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
