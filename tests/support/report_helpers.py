"""Run folders with known numbers in them, as training leaves them behind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

K = 10
"""Episodes of an evaluation."""
CONFIG: dict[str, Any] = {"n_timesteps": 200, "gamma": 0.99, "policy_kwargs": {"net_arch": [8]}}
AGREEMENT: dict[str, Any] = {
    "n_episodes": 8,
    "control_mode": "pd_ee_delta_pose",
    "n_observations": 100,
    "mean_abs_difference": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    "bias": [0.0, -0.1, 0.1, 0.0, 0.0, 0.0, 0.0],
    "teacher_std": [0.5] * 7,
    "student_std": [0.5] * 7,
    "correlation": [1.0, 0.5, 0.25, -0.5, 0.0, 0.0, None],
    "teacher_label_std": None,
}


def outcome(success: float, n: int = K) -> dict[str, Any]:
    """Of an evaluation, as in ``result.json``."""
    return {
        "success_once": success,
        "success_at_end": success / 2,
        "n_episodes": n,
        "ci95": [0.0, 1.0],
        "mean_return": 100 * success,
        "mean_length": 50.0,
    }


def result(algo: str = "rpd_ppo", **changes: Any) -> dict[str, Any]:
    """Of a run that has ended."""
    taught = algo != "ppo"
    content = {
        "complete": True,
        "resumed_at": None,
        "wall_s": 100.0,
        "evaluation_s": 40.0,
        "teacher": outcome(0.4) if taught else None,
        "student_parameters": 1000,
        "student_bytes": 4000,
        "teacher_parameters": 7_500_000_000 if taught else None,
        "teacher_bytes": 15_000_000_000 if taught else None,
        "latency_ms": {"median": 0.5, "p95": 0.8, "device": "cpu", "n_calls": 200},
        "teacher_latency_ms": {"median": 300.0, "batch": 16} if taught else None,
        "agreement": AGREEMENT if taught else None,
    }
    return content | changes


def make_run(
    folder: Path,
    algo: str = "rpd_ppo",
    *,
    env: str = "PickCube-v1",
    seed: int = 0,
    steps: Sequence[int] = (0, 100, 200),
    successes: Sequence[int] | None = (0, 5, 9),
    config: Mapping[str, Any] | None = None,
    content: Mapping[str, Any] | None = None,
    videos: Sequence[str] = (),
) -> str:
    """A run folder; returns its name.

    :param successes: successful episodes of each evaluation, of :data:`K`; None: the environment does not report it
    :param config: changes to :data:`CONFIG`
    :param content: of ``result.json``; None: that of a run that has ended, empty: there is no such file
    :param videos: files to write
    """
    folder.mkdir(parents=True)
    teacher = {"teacher": "scripted", "teacher_kwargs": {"noise": 0.3}} if algo != "ppo" else {}
    (folder / "args.yml").write_text(yaml.safe_dump({"algo": algo, "env": env, "seed": seed}))
    (folder / "config.yml").write_text(yaml.safe_dump(CONFIG | teacher | dict(config or {})))
    (folder / "command.txt").write_text(f"python -m rpd_sb3.train --algo {algo} --env {env} --seed {seed}\n")
    arrays: dict[str, Any] = {"timesteps": steps, "ep_lengths": np.full((len(steps), K), 50)}
    arrays["results"] = np.tile(np.arange(K, dtype=float), (len(steps), 1)) + np.arange(len(steps))[:, None]
    if successes is not None:
        once = np.arange(K) < np.array(successes)[:, None]
        arrays |= {"successes": once, "successes_at_end": once & (np.arange(K) % 2 == 0)}
    np.savez(folder / "evaluations.npz", **arrays)
    (folder / "progress.csv").write_text(
        "time/total_timesteps,train/entropy_loss,train/approx_kl,train/distill_loss\n0,,,\n100,-3.0,0.01,0.5\n200,-2.0,0.02,"
    )
    if content is None or content:
        (folder / "result.json").write_text(json.dumps(result(algo) if content is None else dict(content)))
    for name in videos:
        (folder / name).write_bytes(f"film {name}".encode())
    return str(folder)
