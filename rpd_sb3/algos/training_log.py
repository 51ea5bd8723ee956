"""What PPO logs of an update."""

from __future__ import annotations

from collections.abc import Mapping

import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance, safe_mean


def log_update(model: PPO, values: Mapping[str, list[float]]) -> None:
    """Record the means of what was measured in the minibatches, and SB3's own entries, under ``train/``.

    :param model: whose rollout buffer and schedules they are
    :param values: name to one number per minibatch
    """
    record, buffer = model.logger.record, model.rollout_buffer
    for name, numbers in values.items():
        record(f"train/{name}", safe_mean(numbers))
    record("train/explained_variance", explained_variance(buffer.values.flatten(), buffer.returns.flatten()))
    if hasattr(model.policy, "log_std"):
        record("train/std", th.exp(model.policy.log_std).mean().item())
    record("train/n_updates", model._n_updates, exclude="tensorboard")
    for name in ("clip_range", "clip_range_vf"):
        if (schedule := getattr(model, name)) is not None:
            record(f"train/{name}", schedule(model._current_progress_remaining))
