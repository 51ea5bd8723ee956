"""Loading the weights of a saved model into a new one."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import torch as th
from stable_baselines3.common.policies import BasePolicy


def load_weights(policy: BasePolicy, path: str | Path) -> None:
    """Give a policy the weights of a saved model; nothing of the file is executed.

    :param policy: of the same architecture; left as it is if the file is refused
    :param path: ``.zip`` of an SB3 model, e.g. the ``best_model.zip`` of a run
    :raises ValueError: if there is no such file, or it is not a saved model of the same architecture
    """
    weights = _read(path, policy.device)
    there, here = _shapes(weights), _shapes(policy.state_dict())
    different = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if different:
        name = different[0]
        raise ValueError(
            f"warm_start={str(path)!r} is a model of another architecture: {name!r} has the shape {there.get(name)} "
            f"there and {here.get(name)} here; give both the same policy and policy_kwargs"
        )
    policy.load_state_dict(weights)


def _read(path: str | Path, device: th.device) -> dict[str, th.Tensor]:
    refused = f"warm_start={str(path)!r} cannot be read as a saved SB3 model"
    try:
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("policy.pth"))
    except Exception as error:  # zlib has its own for damaged bytes
        raise ValueError(f"{refused}: {error}") from error
    try:
        weights = th.load(content, map_location=device, weights_only=True)
    except Exception as error:  # 6 kinds for damaged bytes; for code, the advice to trust the file
        raise ValueError(f"{refused}: its policy.pth is damaged, or holds more than weights") from error
    if not (isinstance(weights, dict) and all(isinstance(value, th.Tensor) for value in weights.values())):
        raise ValueError(f"{refused}: its policy.pth is not a mapping of names to weights")
    return weights


def _shapes(weights: dict[str, th.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in weights.items()}
