"""``policy.json``: what the policy takes and gives, where it comes from, and how good it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.bins import Bounds
from rpd_sb3.episodes.play import EvalResult
from rpd_sb3.export import runtime
from rpd_sb3.export.deploy import input_specs
from rpd_sb3.export.observations import POSE_ACTION
from rpd_sb3.train import folder as runs


def package_name(env_id: str, algo: str) -> str:
    """A name for the export that Python can import: ``PushCube-v1`` and ``rpd_ppo`` give ``pushcube_v1_rpd_ppo``.

    :param env_id: environment of the run
    :param algo: its algorithm
    """
    name = re.sub(r"\W+", "_", f"{re.split(r'[/:]', env_id)[-1]}_{algo}".lower(), flags=re.ASCII)
    return name if name.isidentifier() else f"policy_{name}"


def token_spec(env_kwargs: Mapping[str, Any], space: spaces.Space) -> dict[str, Any] | None:
    """Which actions the policy's tokens stand for; None if it has none, or its tokens are the environment's own.

    :param env_kwargs: of the run, with the bounds written out
    :param space: of the policy's actions
    """
    tokens = env_kwargs.get("tokens", False)
    if tokens is False or not isinstance(space, spaces.MultiDiscrete):
        return None
    bounds = tokens if isinstance(tokens, Mapping) else {}
    return {"n_bins": int(space.nvec[0]), "low": bounds.get("low"), "high": bounds.get("high")}


def token_bounds(tokens: Mapping[str, Any] | None) -> Bounds | None:
    """The bounds in a manifest's ``tokens``."""
    if tokens is None or tokens["low"] is None:
        return None
    return Bounds(np.asarray(tokens["low"], np.float64), np.asarray(tokens["high"], np.float64))


def action_spec(space: spaces.Space, tokens: Mapping[str, Any] | None, control_mode: str | None) -> dict[str, Any]:
    """What the exported policy gives, ready for JSON.

    :param space: of the policy's actions
    :param tokens: of :func:`token_spec`: then the export gives the actions in [-1, 1] that they stand for
    :param control_mode: ManiSkill controller
    """
    shape = list(space.shape or ())
    names = POSE_ACTION if control_mode == "pd_ee_delta_pose" and shape == [len(POSE_ACTION)] else None
    if tokens is not None:
        return {"shape": shape, "dtype": "float32", "low": -1.0, "high": 1.0, "names": names}
    if isinstance(space, spaces.Box):
        box = input_specs(space)[0]
        return {"shape": shape, "dtype": "float32", "low": box["low"], "high": box["high"], "names": names}
    if isinstance(space, spaces.MultiBinary):
        return {"shape": shape, "dtype": "float32", "low": 0, "high": 1, "names": None}
    n = [space.n] if isinstance(space, spaces.Discrete) else space.nvec.flatten().tolist()  # type: ignore[attr-defined]
    high = [int(k) - 1 for k in n]
    return {"shape": shape, "dtype": "int64", "low": 0, "high": high if shape else high[0], "names": None}


def run_facts(run: runs.SavedRun, model_file: Path, which: str) -> dict[str, Any]:
    """What the manifest says of the run: ``teacher``, ``training`` and ``success``.

    :param run: its run
    :param model_file: the model exported
    :param which: ``best`` or ``last``
    :raises ValueError: if a file of the run is damaged
    """
    teacher = run.config.get("teacher")
    result = run.result
    versions = run.versions
    training = {
        "algorithm": run.args["algo"],
        "model": which,
        "env_steps": runs.timesteps(model_file),
        "run_env_steps": result.get("timesteps"),
        "run_teacher_labels": result.get("teacher_queries"),
        "labels_counted_from_step": result.get("resumed_at"),
        "demonstrations": run.config.get("demonstrations"),
        "seed": run.args.get("seed"),
        "git_commit": versions.get("git_commit"),
        "versions": {key: versions[key] for key in ("rpd_sb3", "torch", "stable-baselines3") if key in versions},
        "command": "\n".join(run.commands) or None,
    }
    return {
        "teacher": None if teacher is None else {"name": teacher, "kwargs": run.config.get("teacher_kwargs", {})},
        "training": training,
        "success": {"student": student_success(run.folder, model_file, which), "teacher": result.get("teacher")},
    }


def student_success(folder: Path, model_file: Path, which: str) -> dict[str, Any] | None:
    """How often the exported model succeeded when its run evaluated it; None if it did not.

    :param folder: of the run
    :param model_file: the model exported
    :param which: ``best`` or ``last``
    :raises ValueError: if a file of the run is damaged
    """
    evaluations = runs.read_evaluations(folder)
    timesteps = runs.timesteps(model_file)
    if evaluations is None or timesteps not in evaluations.timesteps:
        return None
    row = np.flatnonzero(evaluations.timesteps == timesteps)[-1]
    n = len(evaluations.timesteps)
    _, returns, lengths, once, at_end = evaluations
    episodes = EvalResult.of(
        returns[row], lengths[row], None if once is None else once[row], None if at_end is None else at_end[row]
    )
    student = episodes.summary() | {"timesteps": timesteps, "n_evaluations": n, "model": which}
    if which == "best" and n > 1:
        student["note"] = (
            f"the best of {n} evaluations, which is optimistic: a fresh evaluation is "
            "python -m rpd_sb3.evaluate --export"
        )
    return student


def versions() -> dict[str, str]:
    """Versions of what the export was made with; the machine's name is not among them."""
    found = runs.versions((*runs.PACKAGES, "onnx", "onnxruntime", "onnxscript"))
    return {key: value for key, value in found.items() if key != "platform"}


def file_facts(folder: Path) -> dict[str, Any]:
    """Size and hash of each file of an export, the manifest itself excepted."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != runtime.MANIFEST
    }
