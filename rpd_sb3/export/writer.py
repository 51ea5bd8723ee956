"""Writes an export. Its folder appears only if the exported policy acts as the model does."""

from __future__ import annotations

import datetime
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy

from rpd_sb3.cli.files import write_json
from rpd_sb3.contract.bins import to_clipped_actions
from rpd_sb3.export import manifest, runtime
from rpd_sb3.export.card import copy_figures, write_card, write_package
from rpd_sb3.export.deploy import DeployablePolicy, input_specs, numbers_of_parameters
from rpd_sb3.export.formats import FILES, write_onnx, write_torch
from rpd_sb3.export.loading import load_export
from rpd_sb3.train import folder as runs

TOLERANCE = 1e-5
"""Largest difference allowed between actions of the export and of the model, times the action's bound where that exceeds 1."""
N_CHECK = 16
"""Observations kept in the export, so that it can be checked on another machine."""


class ExportError(RuntimeError):
    """The exported policy does not act as the model does."""


@dataclass
class Export:
    """What to export."""

    run: runs.SavedRun
    model: BaseAlgorithm
    policy: ActorCriticPolicy
    facts: dict[str, Any]
    """Of :func:`rpd_sb3.export.manifest.run_facts`."""
    format: str
    tokens: dict[str, Any] | None
    """Of :func:`rpd_sb3.export.manifest.token_spec`."""
    command: str


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that an export may be written to a folder.

    :param folder: to write
    :param overwrite: replace an existing export
    :raises ValueError: if the folder is not empty, and not an export that may be replaced
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / runtime.MANIFEST).is_file():
        raise ValueError(f"output {str(folder)!r} exists and is not an export; name another folder with -o")
    if not overwrite:
        raise ValueError(
            f"output {str(folder)!r} holds an export already; name another folder with -o, or add --overwrite"
        )


def write_export(
    folder: Path, export: Export, observations: dict[str, np.ndarray], environment: dict[str, Any]
) -> dict[str, Any]:
    """Write an export and check that it acts as the model does.

    :param folder: to write; it appears when it is complete
    :param export: what to write
    :param observations: to compare on, input name to ``(n, ...)``
    :param environment: for the manifest
    :return: the manifest
    :raises ExportError: if an action differs
    """
    with _atomic_folder(folder) as temporary:
        deployable = DeployablePolicy(export.policy, export.tokens is not None, manifest.token_bounds(export.tokens))
        content = _content(export, deployable, environment)
        write = write_onnx if export.format == "onnx" else write_torch
        write(temporary / FILES[export.format], deployable, content["observation"])
        answers = _reference(export, observations)
        rows = {"obs/" + name: array[:N_CHECK] for name, array in observations.items()}
        np.savez_compressed(temporary / runtime.CHECK, **rows, **{k: v[:N_CHECK] for k, v in answers.items()})  # type: ignore[arg-type]
        _save_manifest(temporary, content)
        written = load_export(temporary)
        content["parity"] |= _parity(written, observations, answers, content["parity"]["tolerance"])
        latency = written.latency()
        content["latency_ms"] = {"median": round(latency.median_ms, 4), "p95": round(latency.p95_ms, 4), "batch": 1}
        content["latency_ms"] |= {"threads": 1, "cpu": runtime.cpu_name()}
        if export.format == "onnx":
            write_package(temporary, content)
        copy_figures(export.run.folder, temporary)
        write_card(temporary, content)
        _save_manifest(temporary, content)
        load_export(temporary).check()
    return content


def _content(export: Export, deployable: DeployablePolicy, environment: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what is measured."""
    run = export.run
    space = export.policy.action_space
    bounds = (
        np.concatenate([space.low.flatten(), space.high.flatten()]) if isinstance(space, spaces.Box) else np.ones(1)
    )
    scale = max(1.0, float(np.abs(bounds[np.isfinite(bounds)]).max(initial=1.0)))
    return {
        "format_version": runtime.FORMAT_VERSION,
        "format": export.format,
        "name": manifest.package_name(run.args["env"], run.args["algo"]),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": export.command,
        "observation": input_specs(export.policy.observation_space),
        "action": manifest.action_spec(space, export.tokens, environment["control_mode"]),
        "tokens": export.tokens,
        "environment": environment,
        **export.facts,
        "parameters": numbers_of_parameters(deployable, export.policy),
        "parity": {"tolerance": TOLERANCE * scale},
        "versions": manifest.versions(),
    }


def _reference(export: Export, observations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's own answers: ``action``, and ``tokens`` if they stand for actions."""
    single = not isinstance(export.policy.observation_space, spaces.Dict)
    predicted, _ = export.model.predict(
        next(iter(observations.values())) if single else observations, deterministic=True
    )
    if export.tokens is None:
        return {"action": predicted}
    bounds = manifest.token_bounds(export.tokens)
    actions = to_clipped_actions(predicted, export.tokens["n_bins"], bounds)
    return {"action": actions, "tokens": predicted}


def _parity(
    policy: runtime.Policy, observations: dict[str, np.ndarray], answers: dict[str, np.ndarray], tolerance: float
) -> dict[str, Any]:
    """Largest difference between the actions of export and model, in one batch and one by one."""
    difference, same = policy.compare(observations, answers)
    n = len(answers["action"])
    if not (same and difference <= tolerance):
        raise ExportError(
            f"the exported policy does not act as the model: on {n} observations its actions differ by up to {difference:.3g} "
            f"(at most {tolerance:.3g} is allowed){'' if same else ', and tokens differ'}; nothing was written"
        )
    return {"max_abs_error": difference, "n_observations": n, "tokens_equal": True if "tokens" in answers else None}


def _save_manifest(folder: Path, content: dict[str, Any]) -> None:
    write_json(folder / runtime.MANIFEST, content | {"files": manifest.file_facts(folder)})


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes this one at the end; if something fails, it is removed, and the old folder stays."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
        if folder.exists():
            folder.rename(old)
        try:
            temporary.rename(folder)
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
