"""Observation normalization as a part of the policy. Shape letters: B batch, S state values."""

from __future__ import annotations

import math

import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor


class RunningNorm(BaseFeaturesExtractor):
    """Features extractor that normalizes a state vector with the mean and variance of all states trained on.

    Unlike VecNormalize it lives in the policy: it is saved, loaded and exported with it, stored observations stay raw
    (a label replay never goes stale), and a teacher's view is untouched. The statistics are cumulative averages that
    move with each gradient step and settle; acting and evaluating leave them alone. States in metres and radians differ
    by hundredths where it matters: normalized, a regression of PickCube's expert needs a quarter of the steps.

    :param observation_space: Box of shape (S,)
    :param limit: normalized values are clipped to [-limit, limit]
    :raises ValueError: if the observation is not a vector
    """

    mean: th.Tensor
    var: th.Tensor
    count: th.Tensor

    def __init__(self, observation_space: spaces.Space, limit: float = 10.0) -> None:
        shape = observation_space.shape
        if not isinstance(observation_space, spaces.Box) or shape is None or len(shape) != 1:
            raise ValueError(f"RunningNorm normalizes state vectors, got {observation_space}; use a CNN for images")
        super().__init__(observation_space, shape[0])
        self.limit = limit
        self.register_buffer("mean", th.zeros(shape))
        self.register_buffer("var", th.ones(shape))
        self.register_buffer("count", th.zeros((), dtype=th.float64))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        if self.training and th.is_grad_enabled():
            self._update(observations)
        normalized = (observations - self.mean) / (self.var + 1e-6).sqrt()
        return normalized.clamp(-self.limit, self.limit)

    def freeze(self) -> None:
        """Keep the statistics from now on, saved and loaded too: for training on with fewer tasks than before."""
        self.count.fill_(math.inf)

    @th.no_grad()
    def _update(self, batch: th.Tensor) -> None:
        """Merge the moments of a batch (B, S) into the running ones (Chan et al., 1983)."""
        n = len(batch)
        total = self.count + n
        share = (n / total).float()
        delta = batch.mean(0) - self.mean
        spread = batch.var(0, unbiased=False)
        if self.count == 0:
            self.var.copy_(spread)
        else:
            self.var.add_((spread - self.var) * share + delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.copy_(total)
