"""Beginning with the weights of another student."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch as th
from stable_baselines3.common.policies import BasePolicy


def load_weights(policy: BasePolicy, path: str | Path) -> None:
    """Give a policy the weights of a saved model; nothing of the file is executed.

    :param policy: of the same architecture
    :param path: ``.zip`` of an SB3 model, e.g. the ``best_model.zip`` of a run
    :raises ValueError: if there is no such file, it is no model, or one of another architecture
    """
    try:
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("policy.pth"))
        weights = th.load(content, map_location=policy.device, weights_only=True)
    except (OSError, KeyError, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"warm_start={str(path)!r} cannot be read as a saved SB3 model: {error}") from error
    try:
        policy.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"warm_start={str(path)!r} is a model of another architecture; give both the same policy and policy_kwargs: {error}"
        ) from error
