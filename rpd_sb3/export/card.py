"""The files next to an exported policy: model card, figures, and what makes the folder a Python package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from rpd_sb3.export import runtime
from rpd_sb3.export.formats import FILES

FIGURES = {"learning_curve.png": "learning_curve.png", "video.mp4": "replay.mp4"}
"""Files of a run to their names in the export; Hugging Face shows ``replay.mp4`` next to the card."""

PYPROJECT = """\
[build-system]
requires = ["setuptools>=64"]
build-backend = "setuptools.build_meta"

[project]
name = "{distribution}"
version = "{version}"
description = "{description}"
requires-python = ">=3.8"
dependencies = ["numpy", "onnxruntime"]

[tool.setuptools]
packages = ["{name}"]
package-dir = {{ "{name}" = "." }}
package-data = {{ "{name}" = ["policy.json", "policy.onnx", "check.npz"] }}
"""
INIT = '''\
"""The policy {name}: ``policy = load_policy()``, then ``action = policy(observation)``."""

from pathlib import Path

from .runtime import Policy, load

__all__ = ["Policy", "load_policy"]


def load_policy(threads: int = 1) -> Policy:
    """The policy.

    :param threads: of onnxruntime
    """
    return load(Path(__file__).parent, threads)
'''
SNIPPETS = {
    "onnx": """\
# pip install numpy onnxruntime
import numpy as np

from runtime import load  # runtime.py of this folder; after `pip install .`: from {name} import load_policy

policy = load(".")
action = policy({example})
""",
    "torch": """\
# pip install numpy torch=={torch}
import torch

policy = torch.export.load("policy.pt2").module()
with torch.no_grad():
    {outputs} = policy({batch})
""",
}


def write_package(folder: Path, manifest: dict[str, Any]) -> None:
    """The files that let the export act, and be installed, without this library.

    :param folder: of the export
    :param manifest: with ``name`` and ``environment``
    """
    name = manifest["name"]
    shutil.copyfile(runtime.__file__, folder / "runtime.py")
    (folder / "__init__.py").write_text(INIT.format(name=name), encoding="utf-8")
    text = PYPROJECT.format(
        name=name,
        distribution=name.replace("_", "-").strip("-"),
        version=manifest["versions"]["rpd_sb3"],
        description=f"A policy for {manifest['environment']['id']}, distilled with rpd_sb3",
    )
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def copy_figures(run: Path, folder: Path) -> None:
    """Copy the run's learning curve and video, if it has them.

    :param run: folder of the run
    :param folder: of the export
    """
    for source, name in FIGURES.items():
        if (run / source).is_file():
            shutil.copyfile(run / source, folder / name)


def write_card(folder: Path, manifest: dict[str, Any]) -> None:
    """Write ``README.md`` as a model card of Hugging Face; needs no network.

    :param folder: of the export
    :param manifest: all but ``files``
    """
    front = yaml.safe_dump(_front_matter(manifest), sort_keys=False, allow_unicode=True)
    environment = manifest["environment"]
    instruction = environment.get("instruction")
    latency = manifest["latency_ms"]
    teacher = manifest["teacher"]
    parts = [
        f"---\n{front}---",
        f"# {manifest['name']}",
        f"A compact policy for **{environment['id']}**"
        + (f", “{instruction}”" if instruction else "")
        + (f", distilled from the teacher `{teacher['name']}`" if teacher else "")
        + f" with `{manifest['training']['algorithm']}`"
        " of rpd_sb3 ([Refined Policy Distillation](https://arxiv.org/abs/2503.05833))."
        f" {manifest['parameters']['policy']:,} parameters; {latency['median']:.2g} ms for one observation on one thread "
        f"of {latency['cpu']}.",
        "## Use",
        f"```python\n{snippet(manifest)}```",
        _USAGE[manifest["format"]],
        "## Inputs and outputs",
        _inputs(manifest),
        "## Success",
        _success(manifest),
    ]
    if (folder / "learning_curve.png").is_file():
        parts.append("![Success of the student over environment steps](learning_curve.png)")
    parts += ["## Training and export", _origin(manifest)]
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def snippet(manifest: dict[str, Any]) -> str:
    """Python that loads the policy from its own folder and acts once, on an observation of zeros."""
    specs = manifest["observation"]
    zeros = {spec["name"]: f"np.zeros({tuple(spec['shape'])}, np.{spec['dtype']})" for spec in specs}
    several = ", ".join(f'"{name}": {value}' for name, value in zeros.items())
    batch = [f"torch.zeros({(1, *spec['shape'])}, dtype=torch.{spec['dtype']})" for spec in specs]
    return SNIPPETS[manifest["format"]].format(
        name=manifest["name"],
        example=f"{{{several}}}" if len(zeros) > 1 else next(iter(zeros.values())),
        batch=", ".join(batch),  # in the order of the manifest
        outputs="action, tokens" if manifest["tokens"] else "(action,)",
        torch=manifest["versions"]["torch"].partition("+")[0],
    )


_USAGE = {
    "onnx": "One observation or a batch `(n, ...)`; images are uint8, channels last, as a camera gives them. "
    "`python runtime.py` checks the policy on your machine against recorded observations and times it; "
    "`policy.json` says all of this in JSON.",
    "torch": "Batches `(n, ...)` of each input, in this order; images are uint8, channels last, as a camera gives them. "
    "`policy.json` says all of this in JSON.",
}


def _front_matter(manifest: dict[str, Any]) -> dict[str, Any]:
    front: dict[str, Any] = {
        "license": "mit",
        "library_name": "rpd_sb3",
        "pipeline_tag": "reinforcement-learning",
        "tags": ["reinforcement-learning", "robotics", "policy-distillation", manifest["format"]],
    }
    student = manifest["success"]["student"]
    if student is None:
        return front
    if student["success_once"] is None:
        metric = {"type": "mean_reward", "name": "mean return", "value": round(student["mean_return"], 4)}
    else:
        metric = {"type": "success_rate", "name": "success rate", "value": round(student["success_once"], 4)}
    result = {
        "task": {"type": "reinforcement-learning", "name": "reinforcement-learning"},
        "dataset": {"name": manifest["environment"]["id"], "type": manifest["environment"]["id"]},
        "metrics": [metric | {"verified": False}],
    }
    return front | {"model-index": [{"name": manifest["name"], "results": [result]}]}


def _inputs(manifest: dict[str, Any]) -> str:
    environment = manifest["environment"]
    action = manifest["action"]
    lines = ["| | name | shape | dtype | |", "|---|---|---|---|---|"]
    for spec in manifest["observation"]:
        meaning = environment.get("state") if spec["name"] == "state" else None
        lines.append(
            f"| in | `{spec['name']}` | {tuple(spec['shape'])} | {spec['dtype']} | {meaning or spec['layout']} |"
        )
    names = " ".join(action["names"] or ())
    lines.append(
        f"| out | `action` | {tuple(action['shape'])} | {action['dtype']} | {names or 'clipped to its bounds'} |"
    )
    facts = []
    if environment["control_mode"]:
        scale = environment.get("action_scale")
        units = f", 1 is {scale['metres']:g} m or {scale['radians']:g} rad" if scale else ""
        rate = f" at {environment['control_freq']} Hz" if environment["control_freq"] else ""
        facts.append(f"Controller: `{environment['control_mode']}`{rate}{units}.")
    if environment["gripper"]:
        facts.append(f"Gripper: {environment['gripper']['closed']:g} closes, {environment['gripper']['open']:g} opens.")
    if camera := environment["camera"]:
        facts.append(
            f"Camera `{camera['name']}`, {camera['width']}x{camera['height']}, field of view {camera['fov']:.3f} rad, pose "
            f"{camera['pose']} ({camera['pose_layout']})."
        )
        if crop := camera["crop"]:
            facts.append(f"Crop: {crop} ({camera['crop_layout']}).")
    return "\n".join(lines) + ("\n\n" + " ".join(facts) if facts else "")


def _success(manifest: dict[str, Any]) -> str:
    rows = []
    for who, result in manifest["success"].items():
        if result is not None:
            rate = runtime.rate_text(result) or "-"
            rows.append(f"| {who} | {rate} | {result['mean_return']:.2f} | {result['n_episodes']} |")
    if not rows:
        return "This model has not been evaluated in its run."
    table = "\n".join(["| | success, 95 % interval | return | episodes |", "|---|---|---|---|", *rows])
    note = (manifest["success"]["student"] or {}).get("note")
    return f"{table}\n\n" + (f"The student's number is {note}." if note else "")


def _origin(manifest: dict[str, Any]) -> str:
    training = manifest["training"]
    parity = manifest["parity"]
    lines = [
        f"- {training['env_steps']:,} environment steps, seed {training['seed']}, the {training['model']} model of its run",
        *([f"- trained with: `{training['command']}`"] if training["command"] else []),
        f"- exported with: `{manifest['command']}`",
        f"- on {parity['n_observations']} observations its actions differ by at most {parity['max_abs_error']:.1e} from "
        "those of the trained model",
        f"- `{FILES[manifest['format']]}`, made with "
        + ", ".join(f"{name} {version}" for name, version in manifest["versions"].items()),
    ]
    return "\n".join(lines)
