"""How many observations a second OpenVLA answers: batches through OpenVLATeacher against one at a time through ``generate``.

    python benchmarks/openvla_speed.py --size 7b --folder /tmp/openvla    # a GPU; writes 15 GB of random weights
    python benchmarks/openvla_speed.py --size small --batches 1 4 16      # any CPU

The weights are random: that costs as much as trained ones. A checkpoint of the published layout is written to the folder
unless it is there. Results go to benchmarks/results/openvla_speed_<size>.json, the table to standard output.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import transformers
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from rpd_sb3.contract.teacher import Query
from rpd_sb3.teachers.openvla.checkpoint import TEXT_DEFAULTS, open_checkpoint
from rpd_sb3.teachers.openvla.loading import load_model
from rpd_sb3.teachers.openvla.model import Batch, OpenVLAModel, batch_texts
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from rpd_sb3.teachers.openvla.text import Prompts
from rpd_sb3.teachers.openvla.vision import TowerShape

ROOT = Path(__file__).parent.parent
FILES = ROOT / "tests" / "data" / "openvla_tiny"
INSTRUCTIONS = ("push the cube", "pull the cube to the goal region behind it")
SIZES: dict[str, tuple[TowerShape, TowerShape, dict[str, int]]] = {
    "7b": (
        TowerShape(1024, 24, 4096, 256, 4, True, True),
        TowerShape(1152, 27, 4304, 256, 0, False, False),
        {},
    ),
    "small": (
        TowerShape(256, 6, 1024, 256, 4, True, True),
        TowerShape(288, 6, 1152, 256, 0, False, False),
        {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
        | {"num_key_value_heads": 8},
    ),
}


def make_checkpoint(folder: Path, size: str, device: str) -> None:
    """Random bfloat16 weights in shards of at most 7 GB, as the published ones."""
    if (folder / "model.safetensors.index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in FILES.glob("*.json"):
        shutil.copy(path, folder)
    dino, siglip, text = SIZES[size]
    config = json.loads((FILES / "config.json").read_text())
    config["text_config"] = {"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000, **text}
    (folder / "config.json").write_text(json.dumps(config))
    with th.device("meta"):
        model = OpenVLAModel(dino, siglip, TEXT_DEFAULTS | text)
    shards: list[dict[str, th.Tensor]] = [{}]
    filled = 0
    for name, weight in model.named_parameters():
        n_bytes = 2 * weight.numel()
        if filled + n_bytes > 7e9:
            shards.append({})
            filled = 0
        std = 0.7 / math.sqrt(max(weight[0].numel(), 1)) if weight.ndim > 1 else 0.02
        values = th.randn(weight.shape, device=device) * std + (1.0 if "norm" in name and weight.ndim == 1 else 0.0)
        shards[-1][name] = values.bfloat16().cpu()
        filled += n_bytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        shard.clear()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def flops(size: str) -> float:
    """Of one observation, with 28 ids of text and 7 action tokens."""
    dino, siglip, text = SIZES[size]
    with th.device("meta"):
        model = OpenVLAModel(dino, siglip, TEXT_DEFAULTS | text)
        batch = Batch(th.zeros(1, 6, 224, 224), th.zeros(1, 1, dtype=th.long), th.zeros(1, 27, dtype=th.long), None)
        with FlopCounterMode(display=False) as counter, th.no_grad():
            model.generate(model.read(batch, 6), 7)
    return float(counter.get_total_flops())


def matrix_rate(device: str, dtype: th.dtype) -> float:
    """FLOP/s of a large matrix product: what the chip gives in practice."""
    n = 8192 if device == "cuda" else 2048
    a, b = (th.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, 20 if device == "cuda" else 3)


def seconds(function: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        function()
        if device == "cuda":
            th.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return float(np.median(times[2:]))


def make_query(n: int, side: int, mixed: bool, tokens: bool = False) -> Query:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    texts = np.array([INSTRUCTIONS[i % 2 if mixed else 0] for i in range(n)])
    actions = rng.integers(0, 256, (n, 7)) if tokens else None
    return Query({"images.human": images, "instruction": texts}, np.arange(n), np.zeros(n, bool), actions)


def baseline(folder: Path, device: str, dtype: th.dtype) -> Callable[[], Any]:
    """One observation through transformers' ``generate``, as upstream's ``predict_action`` does it."""
    checkpoint = open_checkpoint(str(folder))
    model = load_model(checkpoint, th.device(device), dtype)
    prompts = Prompts(folder / "tokenizer.json")
    bos, text, _ = batch_texts([prompts(INSTRUCTIONS[0])], th.device(device))
    pixels = th.randn(1, 6, 224, 224, device=device, dtype=dtype)
    model.language_model.generation_config.pad_token_id = 32000

    @th.inference_mode()
    def act() -> th.Tensor:
        embed = model.language_model.model.embed_tokens
        patches = model.projector(model.vision_backbone(pixels))
        embeddings = th.cat([embed(bos), patches, embed(text)], dim=1)
        mask = th.ones(embeddings.shape[:2], device=device, dtype=th.long)
        return model.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=7, min_new_tokens=7, do_sample=False
        ).cpu()

    return act


def load_in_another_process(folder: Path, device: str, dtype: str) -> dict[str, float]:
    """Seconds, and host memory in GB at its peak above that of the imports, while the weights are loaded."""
    code = (
        "import re, sys, time, torch as th, transformers\n"
        "from rpd_sb3.teachers.openvla.checkpoint import open_checkpoint\n"
        "from rpd_sb3.teachers.openvla.loading import DTYPES, load_model\n"
        "folder, device, dtype = sys.argv[1:]\n"
        "th.zeros(1, device=device)\n"
        "status = lambda key: int(re.search(key + r':\\s*(\\d+) kB', open('/proc/self/status').read())[1]) / 1e6\n"
        "before, started = status('VmRSS'), time.perf_counter()\n"
        "load_model(open_checkpoint(folder), th.device(device), DTYPES[dtype])\n"
        "print(time.perf_counter() - started, status('VmHWM') - before)\n"
    )
    command = [sys.executable, "-c", code, str(folder), device, dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    taken, peak = map(float, done.stdout.split())
    return {"seconds": taken, "peak_gb": peak}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = "cuda" if th.cuda.is_available() else "cpu"
    name = "bf16" if device == "cuda" else "fp32"
    dtype = th.bfloat16 if device == "cuda" else th.float32
    make_checkpoint(args.folder, args.size, device)
    shards = [path.stat().st_size / 1e9 for path in sorted(args.folder.glob("*.safetensors"))]
    result: dict[str, Any] = {
        "size": args.size,
        "device": th.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": th.get_num_threads(),
        "dtype": name,
        "versions": {
            "torch": th.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "flops_per_observation": flops(args.size),
        "matrix_flops_per_second": matrix_rate(device, dtype),
        "shards_gb": shards,
        "loading": load_in_another_process(args.folder, device, name),
        "rows": [],
    }
    print(json.dumps(result), flush=True)
    taken = seconds(baseline(args.folder, device, dtype), device, args.repeats)
    add(result, "one at a time through generate", 1, taken)
    free()
    variants: list[tuple[str, dict[str, Any], dict[str, Any], list[int]]] = [
        ("224 px", {}, {"side": 224}, args.batches),
        ("256 px, PIL", {}, {"side": 256}, args.more),
        ("256 px, resize tensor", {"resize": "tensor"}, {"side": 256}, args.more),
        ("224 px, two instructions", {}, {"side": 224, "mixed": True}, args.more),
        ("224 px, scores given tokens", {}, {"side": 224, "tokens": True}, args.more),
        ("224 px, 10 samples", {"n_samples": 10}, {"side": 224}, args.more),
        ("224 px, no CUDA graphs", {"cuda_graphs": False}, {"side": 224}, args.batches if device == "cuda" else []),
    ]
    for label, options, question, batches in variants:
        if not batches:
            continue
        teacher = OpenVLATeacher(str(args.folder), image_size=None, **options)
        for n in batches:
            query = make_query(n, question["side"], question.get("mixed", False), question.get("tokens", False))
            if device == "cuda":
                th.cuda.reset_peak_memory_stats()
            taken = seconds(lambda query=query, teacher=teacher: teacher.label(query), device, args.repeats)
            add(result, label, n, taken)
        teacher.close()
        del teacher
        free()
    return result


def free() -> None:
    gc.collect()
    if th.cuda.is_available():
        th.cuda.empty_cache()


def add(result: dict[str, Any], label: str, n: int, taken: float) -> None:
    """A row of the table."""
    rate = n / taken
    row = {"what": label, "batch": n, "seconds": taken, "observations_per_second": rate}
    row["share_of_matrix_rate"] = rate * result["flops_per_observation"] / result["matrix_flops_per_second"]
    row["gpu_memory_gb"] = th.cuda.max_memory_reserved() / 1e9 if th.cuda.is_available() else None
    result["rows"].append(row)
    print(json.dumps(row), flush=True)


def table(result: dict[str, Any]) -> str:
    one = result["rows"][0]["observations_per_second"]
    lines = [
        "| what | batch | observations/s | to one at a time | ms per batch | share of the matrix rate | GPU memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        memory = "-" if row["gpu_memory_gb"] is None else f"{row['gpu_memory_gb']:.0f} GB"
        lines.append(
            f"| {row['what']} | {row['batch']} | {row['observations_per_second']:.1f} "
            f"| {row['observations_per_second'] / one:.1f} | {1000 * row['seconds']:.0f} "
            f"| {row['share_of_matrix_rate']:.0%} | {memory} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--folder", type=Path, help="of the checkpoint [logs/openvla-<size>]")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--more", type=int, nargs="*", default=[32], help="batches of the other rows")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    args.folder = args.folder or Path(f"logs/openvla-{args.size}")
    result = measure(args)
    (args.out / f"openvla_speed_{args.size}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
