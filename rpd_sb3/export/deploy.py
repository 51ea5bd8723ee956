"""A trained policy as one module, from raw observations to actions of the environment.

Shape letters: B batch, A action dimensions, K tokens of an action, V bins of a token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first, preprocess_obs
from torch import nn
from torch.nn import functional as F

from rpd_sb3.contract.bins import Bounds, to_clipped_actions
from rpd_sb3.students import AutoregressivePolicy, TokenPolicy


def check_exportable(model: BaseAlgorithm, name: str) -> ActorCriticPolicy:
    """The policy of a model, checked to be a deterministic function of one observation.

    :param model: a trained model
    :param name: shown in messages
    :raises ValueError: if it is not, or observes anything but images and vectors
    """
    policy: Any = model.policy
    if hasattr(policy, "lstm_actor"):
        raise ValueError(
            f"{name} is recurrent: its action depends on what it has seen before, and an export has no memory; "
            "train with ppo or rpd_ppo to export"
        )
    if not isinstance(policy, ActorCriticPolicy):
        raise ValueError(f"{name} has a {type(policy).__name__}, an export needs an actor-critic policy such as PPO's")
    if getattr(policy, "eval_temperature", 0) > 0:
        raise ValueError(
            f"{name} draws its tokens at random, eval_temperature={policy.eval_temperature}; "
            "an export decodes greedily: train with policy_kwargs.eval_temperature:0"
        )
    for key, space in input_spaces(policy.observation_space).items():
        if not isinstance(space, spaces.Box):
            raise ValueError(f"{name} observes {key!r} as {space}; an export takes images and vectors (Box) only")
    return policy


def input_spaces(space: spaces.Space) -> dict[str, spaces.Space]:
    """The parts of an observation by name; a single one is ``image`` or ``state``.

    :param space: observation space
    """
    if isinstance(space, spaces.Dict):
        return dict(space.spaces)
    return {"image" if is_image_space(space) else "state": space}


def is_channels_first(space: spaces.Space) -> bool:
    """True for images ``(C, H, W)``."""
    return is_image_space(space) and is_image_space_channels_first(space)  # type: ignore[arg-type]


def input_specs(space: spaces.Space) -> list[dict[str, Any]]:
    """A description of the inputs of the exported policy, ready for JSON.

    :param space: observation space of the policy; images are channels last in the result, as cameras give them
    :return: ``name``, ``shape``, ``dtype``, ``layout``, ``low`` and ``high`` (null: unbounded) of each input
    """
    specs = []
    for name, box in input_spaces(space).items():
        assert isinstance(box, spaces.Box)
        shape = list(box.shape)
        if is_channels_first(box):
            shape = [*shape[1:], shape[0]]
        layout = "HWC" if is_image_space(box) else "vector" if len(shape) == 1 else "array"
        specs.append(
            {
                "name": name,
                "shape": shape,
                "dtype": "uint8" if box.dtype == np.uint8 else "float32",
                "layout": layout,
                "low": _limit(box.low),
                "high": _limit(box.high),
            }
        )
    return specs


def _limit(bound: np.ndarray) -> Any:
    """A bound for JSON: one number if all are the same, null for infinity."""
    values = bound.astype(object)
    values[~np.isfinite(bound)] = None
    return values.flat[0] if len(np.unique(bound)) == 1 else values.tolist()


def camera_view(observation: Any, space: spaces.Space) -> Any:
    """Observations of an environment as the exported policy takes them: images channels last.

    :param observation: array or mapping, of one or more environments
    :param space: the environment's
    """
    if isinstance(space, spaces.Dict):
        return {name: camera_view(observation[name], inner) for name, inner in space.spaces.items()}
    return np.moveaxis(observation, -3, -1) if is_channels_first(space) else observation


class DeployablePolicy(nn.Module):
    """The deterministic action of a policy, with everything inside: preprocessing, decoding, un-squashing and clipping.

    Only the weights on that path are in it; they are the policy's own, not copies. The arithmetic is that of SB3's
    ``predict(deterministic=True)``.

    :param policy: on the CPU
    :param bounds: of the bins, if the policy's tokens stand for continuous actions (env option ``tokens``)
    :param acts_with_tokens: tokens stand for continuous actions
    """

    def __init__(self, policy: ActorCriticPolicy, acts_with_tokens: bool = False, bounds: Bounds | None = None) -> None:
        super().__init__()
        self.observation_space = policy.observation_space
        self.normalize_images = policy.normalize_images
        self.features_extractor = policy.pi_features_extractor
        self.latent = policy.mlp_extractor.policy_net
        self.head: nn.Module = _Greedy(policy)
        if acts_with_tokens:
            assert isinstance(policy.action_space, spaces.MultiDiscrete)
            self.head = _Detokenised(self.head, policy.action_space, bounds)
        self.eval()

    def forward(self, *inputs: th.Tensor) -> tuple[th.Tensor, ...]:
        """Actions for a batch of observations.

        :param inputs: in the order of :func:`input_specs`: uint8 images ``(B, H, W, C)``, others ``(B, ...)``. Not a mapping:
            PyTorch's archives go by its order, whatever its keys are
        :return: actions ``(B, ...)``; with tokens that stand for actions, also those, ``(B, K)``
        """
        space = self.observation_space
        several = isinstance(space, spaces.Dict)
        observation: Any = dict(zip(input_spaces(space), inputs)) if several else inputs[0]
        observation = _channels_first(observation, space)
        preprocessed: Any = preprocess_obs(observation, space, normalize_images=self.normalize_images)
        return self.head(self.latent(self.features_extractor(preprocessed)))


def _channels_first(observation: Any, space: spaces.Space) -> Any:
    if isinstance(space, spaces.Dict):
        return {name: _channels_first(observation[name], inner) for name, inner in space.spaces.items()}
    return observation.permute(0, 3, 1, 2) if is_channels_first(space) else observation


class _Greedy(nn.Module):
    """From the actor's latent to the most likely action, ``(B, *action_space.shape)``."""

    low: th.Tensor
    high: th.Tensor

    def __init__(self, policy: ActorCriticPolicy) -> None:
        super().__init__()
        self.action_net: Any = policy.action_net
        self.space = policy.action_space
        self.squashed = policy.squash_output
        self.tokens = (policy.n_tokens, policy.n_bins) if isinstance(policy, TokenPolicy) else None
        self.autoregressive = isinstance(policy, AutoregressivePolicy)
        if isinstance(self.space, spaces.Box):
            self.register_buffer("low", th.as_tensor(self.space.low))
            self.register_buffer("high", th.as_tensor(self.space.high))

    def forward(self, latent: th.Tensor) -> tuple[th.Tensor, ...]:
        return (self._action(latent),)

    def _action(self, latent: th.Tensor) -> th.Tensor:
        if self.autoregressive:
            tokens, _ = self.action_net.generate(latent, lambda logits: logits.argmax(dim=-1))
            return tokens
        out = self.action_net(latent)
        if self.tokens is not None:
            return out.view(-1, *self.tokens).argmax(dim=-1)
        if isinstance(self.space, spaces.Discrete):
            return out.argmax(dim=1)
        if isinstance(self.space, spaces.MultiDiscrete):
            parts = out.split(self.space.nvec.flatten().tolist(), dim=1)
            return th.stack([part.argmax(dim=1) for part in parts], dim=1).reshape(-1, *self.space.shape)
        if isinstance(self.space, spaces.MultiBinary):
            return (out > 0).float().reshape(-1, *self.space.shape)
        assert isinstance(self.space, spaces.Box)
        if len(self.space.shape) != 1:
            out = out.reshape(-1, *self.space.shape)
        if self.squashed:
            return self.low + 0.5 * (out.tanh() + 1.0) * (self.high - self.low)
        return th.minimum(th.maximum(out, self.low), self.high)


class _Detokenised(nn.Module):
    """Gives tokens ``(B, K)``, and the actions that they stand for in the environment.

    :param greedy: gives the tokens
    :param space: MultiDiscrete([V] * K)
    :param bounds: of the bins
    """

    table: th.Tensor
    offset: th.Tensor

    def __init__(self, greedy: nn.Module, space: spaces.MultiDiscrete, bounds: Bounds | None) -> None:
        super().__init__()
        self.greedy = greedy
        n_tokens = len(space.nvec)
        n_bins = int(space.nvec[0])
        every = np.repeat(np.arange(n_bins)[:, None], n_tokens, axis=1)
        actions = to_clipped_actions(every, n_bins, bounds)  # (V, K)
        self.register_buffer("table", th.from_numpy(actions.T.reshape(-1, 1).copy()))
        self.register_buffer("offset", th.arange(n_tokens) * n_bins)

    def forward(self, latent: th.Tensor) -> tuple[th.Tensor, ...]:
        (tokens,) = self.greedy(latent)
        return F.embedding(tokens + self.offset, self.table).squeeze(-1), tokens


def numbers_of_parameters(deployable: nn.Module, policy: nn.Module) -> dict[str, int]:
    """Weights on the path from observation to action, and of the whole policy with its value function."""
    return {
        "policy": sum(parameter.numel() for parameter in deployable.parameters()),
        "total": sum(parameter.numel() for parameter in policy.parameters()),
    }
