"""Policies of every kind, untrained but far from zero, and a run folder to export from."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import (
    ActorCriticCnnPolicy,
    ActorCriticPolicy,
    MultiInputActorCriticPolicy,
)
from torch import nn

from rpd_sb3.students import AutoregressivePolicy, RunningNorm, TokenPolicy
from rpd_sb3.students.cnn import CompactCNN
from rpd_sb3.train import __main__ as train
from tests.support.tiny_env import TINY

STATE = spaces.Box(-np.inf, np.inf, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 40), np.uint8)
BOTH = spaces.Dict({"rgb": IMAGE, "state": STATE})
ACTION = spaces.Box(np.array([-1.0, -2.0, 0.0], np.float32), np.array([1.0, 0.5, 3.0], np.float32))
TOKENS = spaces.MultiDiscrete([8] * 3)
SMALL: dict[str, Any] = {"net_arch": [16]}
QUICK = ["--n-envs", "2", "--vec-env", "dummy", "--eval-episodes", "3", "--no-video"]


def make_policy(policy_class: Any, observation: spaces.Space, action: spaces.Space, **kwargs: Any) -> ActorCriticPolicy:
    """A policy whose actions leave their bounds now and then, and whose every weight differs."""
    th.manual_seed(1)
    policy = policy_class(observation, action, lambda _: 1e-3, **SMALL, **kwargs)
    with th.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + 0.5 * th.randn_like(parameter)).add_(
                0.05 * th.randn_like(parameter) / parameter.shape[-1] ** 0.5
            )
        if isinstance(policy.action_net, nn.Linear):
            policy.action_net.weight.mul_(30.0)
    policy.set_training_mode(False)
    return policy


def _normed() -> ActorCriticPolicy:
    policy = make_policy(ActorCriticPolicy, STATE, ACTION, features_extractor_class=RunningNorm)
    norm: Any = policy.features_extractor
    norm.mean += 0.5
    norm.var *= 4.0
    return policy


POLICIES: dict[str, Callable[[], ActorCriticPolicy]] = {
    "vector": lambda: make_policy(ActorCriticPolicy, STATE, ACTION),
    "normalised": _normed,
    "image": lambda: make_policy(ActorCriticCnnPolicy, IMAGE, ACTION),
    "both": lambda: make_policy(MultiInputActorCriticPolicy, BOTH, ACTION),
    "compact": lambda: make_policy(MultiInputActorCriticPolicy, BOTH, ACTION, features_extractor_class=CompactCNN),
    "separate extractors": lambda: make_policy(ActorCriticPolicy, STATE, ACTION, share_features_extractor=False),
    "squashed": lambda: make_policy(ActorCriticPolicy, STATE, ACTION, use_sde=True, squash_output=True),
    "discrete": lambda: make_policy(ActorCriticPolicy, STATE, spaces.Discrete(4)),
    "multi-discrete": lambda: make_policy(ActorCriticPolicy, STATE, spaces.MultiDiscrete([3, 5])),
    "binary": lambda: make_policy(ActorCriticPolicy, STATE, spaces.MultiBinary(4)),
    "tokens": lambda: make_policy(TokenPolicy, STATE, TOKENS),
    "image tokens": lambda: make_policy(TokenPolicy, IMAGE, TOKENS),
    "autoregressive": lambda: make_policy(AutoregressivePolicy, STATE, TOKENS, d_model=8, n_heads=2, n_layers=1),
}


def observations(specs: list[dict[str, Any]], n: int = 9) -> dict[str, np.ndarray]:
    """Random inputs ``(n, ...)``, images channels last."""
    rng = np.random.default_rng(2)
    return {
        spec["name"]: rng.integers(0, 256, (n, *spec["shape"]), np.uint8)
        if spec["dtype"] == "uint8"
        else rng.normal(0, 2, (n, *spec["shape"])).astype(np.float32)
        for spec in specs
    }


def make_run(logs: Path, *more: str, params: Sequence[str] = (), algo: str = "ppo", n: int = 96) -> Path:
    """The folder of a short run on the tiny environment."""
    small = ["-params", "n_steps:16", "batch_size:16", "n_epochs:1", "policy_kwargs.net_arch:[8]"]
    argv = ["--algo", algo, "--env", TINY, "-n", str(n), "-f", str(logs), "--eval-freq", "32", *QUICK]
    assert train.main([*argv, *more, *small, *params]) == 0
    return logs / algo / "tests.support.tiny_env-Tiny-v0_1"


def manifest_of(folder: Path) -> dict[str, Any]:
    """``policy.json``."""
    return json.loads((folder / "policy.json").read_text())


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite ``policy.json``."""
    manifest = manifest_of(folder)
    change(manifest)
    (folder / "policy.json").write_text(json.dumps(manifest))
