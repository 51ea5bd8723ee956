"""Policies whose actions are tokens, as those of vision-language-action models.

Shape letters: B batch, K tokens of an action, V bins of a token.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.torch_layers import CombinedExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch.nn import functional as F

from rpd_sb3.contract.bins import require_token_bins


def choose_tokens(logits: th.Tensor, temperature: float) -> th.Tensor:
    """A bin for each token: drawn from softmax(logits / temperature), or the most likely one at temperature 0.

    :param logits: ``(..., V)``
    :param temperature: 0 or above
    :return: ``(...)`` int
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Inverse transform: one random number per token, where th.multinomial draws V and takes half the time of an action.
    # The threshold rounds to less than the last value, so the index is V only for NaN, and indexing with it fails.
    cdf = F.softmax(logits.detach().float() / temperature, dim=-1).cumsum(dim=-1)
    threshold = th.rand(*logits.shape[:-1], 1, device=logits.device) * cdf[..., -1:]
    return th.searchsorted(cdf, threshold, right=True).squeeze(-1)


class TokenDistribution(MultiCategoricalDistribution):
    """K categorical distributions over V bins, in 32-bit floats.

    Those of an autoregressive policy are conditional on a prefix: token k's on tokens 0..k-1 of the actions that the
    logits were computed on. Then ``log_prob`` is the joint's for exactly those actions, and tokens from ``sample`` and
    ``mode`` are each given that prefix, not given one another: for whole actions ask the policy.

    :param n_tokens: K
    :param n_bins: V
    """

    logits: th.Tensor
    """``(B, K, V)`` log-probabilities: the policy's logits over its temperature, normalized."""

    def __init__(self, n_tokens: int, n_bins: int) -> None:
        super().__init__([n_bins] * n_tokens)
        self.n_tokens = n_tokens
        self.n_bins = n_bins

    def proba_distribution(self, action_logits: th.Tensor) -> TokenDistribution:
        """This distribution, with new logits.

        :param action_logits: ``(B, K, V)`` or ``(B, K * V)``, already divided by the temperature
        """
        self.logits = F.log_softmax(action_logits.float().reshape(-1, self.n_tokens, self.n_bins), dim=-1)
        return self

    def token_log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Log-probability of each token.

        :param actions: ``(B, K)`` bins
        :return: ``(B, K)``
        """
        return self.logits.gather(-1, actions.long().unsqueeze(-1)).squeeze(-1)

    def log_prob(self, actions: th.Tensor) -> th.Tensor:
        """Log-probability of the actions.

        :param actions: ``(B, K)`` bins
        :return: ``(B,)``, summed over tokens
        """
        return self.token_log_prob(actions).sum(dim=1)

    def entropy(self) -> th.Tensor:
        """Entropy in nats; of an autoregressive policy, the sum of the tokens' conditional entropies on the prefix.

        Over prefixes that the policy samples, the expectation of that sum is the joint entropy (chain rule).

        :return: ``(B,)``, summed over tokens
        """
        return -(self.logits.exp() * self.logits).sum(dim=(1, 2))

    def sample(self) -> th.Tensor:
        """Bins ``(B, K)``, each drawn from its token's distribution."""
        return choose_tokens(self.logits, temperature=1.0)

    def mode(self) -> th.Tensor:
        """Bins ``(B, K)``, each the most likely of its token's distribution."""
        return choose_tokens(self.logits, temperature=0.0)


def token_logits(distribution: Distribution) -> th.Tensor:
    """Log-probabilities of all bins of all tokens.

    :param distribution: over tokens of V bins each, ours or SB3's
    :return: ``(B, K, V)``
    :raises ValueError: if it is not a distribution over tokens of equal size
    """
    if isinstance(distribution, TokenDistribution):
        return distribution.logits
    if not isinstance(distribution, MultiCategoricalDistribution):
        raise ValueError(f"token_logits needs a distribution over tokens, got {type(distribution).__name__}")
    if len({*map(int, distribution.action_dims)}) != 1:
        raise ValueError(f"token_logits needs tokens of equal size, got sizes {list(distribution.action_dims)}")
    return th.stack([token.logits for token in distribution.distribution], dim=1)


class TokenPolicy(ActorCriticPolicy):
    """Independent tokens: one linear layer from the latent to the logits of all of them.

    For PPO and the like on a MultiDiscrete([V] * K) action space, with any observation.

    :param observation_space: vector, image, or Dict of them
    :param action_space: MultiDiscrete([V] * K)
    :param lr_schedule: learning rate as a function of the remaining progress
    :param temperature: of the logits while training, in sampling and scoring alike
    :param eval_temperature: of ``predict(deterministic=True)``; 0 is greedy, above 0 it samples
    :param kwargs: ActorCriticPolicy's arguments; the features extractor is chosen by the observation if not given
    :raises ValueError: if the action space is another one, or a temperature is out of range
    """

    autoregressive: ClassVar[bool] = False
    """Whether a token's distribution depends on the tokens before it."""
    action_dist: TokenDistribution

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        temperature: float = 1.0,
        eval_temperature: float = 0.0,
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        if not temperature > 0:
            raise ValueError(f"{name}: temperature={temperature} must be positive")
        if not eval_temperature >= 0:
            raise ValueError(f"{name}: eval_temperature={eval_temperature} must not be negative")
        self.n_bins = require_token_bins(name, action_space)
        (self.n_tokens,) = action_space.shape  # type: ignore[misc]
        self.temperature = temperature
        self.eval_temperature = eval_temperature
        if isinstance(observation_space, spaces.Dict):
            kwargs.setdefault("features_extractor_class", CombinedExtractor)
        elif is_image_space(observation_space, normalized_image=not kwargs.get("normalize_images", True)):
            kwargs.setdefault("features_extractor_class", NatureCNN)  # otherwise SB3's default, which flattens
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        # SB3 always builds its own distribution for MultiDiscrete; the layer that comes with it has the size of ours.
        super()._build(lr_schedule)
        self.action_dist = TokenDistribution(self.n_tokens, self.n_bins)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            **super()._get_constructor_parameters(),
            "share_features_extractor": self.share_features_extractor,  # SB3 2.9 leaves it out: separate ones load as shared
            "temperature": self.temperature,
            "eval_temperature": self.eval_temperature,
        }

    def _latents(self, obs: PyTorchObs) -> tuple[th.Tensor, th.Tensor]:
        """Latents of the actor and of the critic, ``(B, latent_dim_pi)`` and ``(B, latent_dim_vf)``."""
        features = self.extract_features(obs)
        if isinstance(features, th.Tensor):
            return self.mlp_extractor(features)
        return self.mlp_extractor.forward_actor(features[0]), self.mlp_extractor.forward_critic(features[1])

    def _actor_latent(self, obs: PyTorchObs) -> th.Tensor:
        features = BasePolicy.extract_features(self, obs, self.pi_features_extractor)
        return self.mlp_extractor.forward_actor(features)

    def _logits(self, latent_pi: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """Logits ``(B, K, V)`` at temperature 1 for given tokens ``(B, K)``."""
        return self.action_net(latent_pi).view(-1, self.n_tokens, self.n_bins)

    def _choose(self, latent_pi: th.Tensor, temperature: float) -> tuple[th.Tensor, th.Tensor]:
        """Tokens ``(B, K)`` chosen at a temperature, and their logits ``(B, K, V)`` at temperature 1."""
        logits = self.action_net(latent_pi).view(-1, self.n_tokens, self.n_bins)
        return choose_tokens(logits, temperature), logits

    def _distribution(self, logits: th.Tensor) -> TokenDistribution:
        # A new object each time: SB3 overwrites one and the same, which a caller may still hold.
        return TokenDistribution(self.n_tokens, self.n_bins).proba_distribution(logits / self.temperature)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Actions, values and log-probabilities.

        :param obs: observations
        :param deterministic: greedy tokens instead of a sample at ``temperature``
        :return: ``(B, K)``, ``(B, 1)``, ``(B,)``
        """
        latent_pi, latent_vf = self._latents(obs)
        actions, logits = self._choose(latent_pi, 0.0 if deterministic else self.temperature)
        self.action_dist = self._distribution(logits)
        return actions, self.value_net(latent_vf), self.action_dist.log_prob(actions)

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Values, log-probabilities and entropies; ``action_dist`` is then the distribution that they come from.

        :param obs: observations
        :param actions: ``(B, K)`` bins
        :return: ``(B, 1)``, ``(B,)``, ``(B,)``
        """
        actions = actions.long()
        latent_pi, latent_vf = self._latents(obs)
        self.action_dist = self._distribution(self._logits(latent_pi, actions))
        return self.value_net(latent_vf), self.action_dist.log_prob(actions), self.action_dist.entropy()

    def distribution_on(self, obs: PyTorchObs, actions: th.Tensor) -> TokenDistribution:
        """Each token's distribution, given the tokens before it in ``actions``; independent tokens ignore those.

        :param obs: observations
        :param actions: ``(B, K)`` bins
        """
        return self._distribution(self._logits(self._actor_latent(obs), actions.long()))

    def get_distribution(self, obs: PyTorchObs) -> TokenDistribution:
        """Distribution over tokens; of an autoregressive policy, each token's given the greedy tokens before it.

        Its mode is the greedy action of either policy. For other prefixes there is :meth:`distribution_on`.

        :param obs: observations
        """
        return self._distribution(self._choose(self._actor_latent(obs), temperature=0.0)[1])

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        temperature = self.eval_temperature if deterministic else self.temperature
        return self._choose(self._actor_latent(observation), temperature)[0]
