"""Students whose action is a row of tokens."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import DiagGaussianDistribution, MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor, NatureCNN

from rpd_sb3.students import AutoregressivePolicy, RunningNorm, TokenPolicy
from rpd_sb3.students.tokens import TokenDistribution, choose_tokens, token_logits

STATE = spaces.Box(-1.0, 1.0, (5,), np.float32)
IMAGE = spaces.Box(0, 255, (3, 36, 36), np.uint8)
both = pytest.mark.parametrize("policy_class", [TokenPolicy, AutoregressivePolicy])


def make_policy(
    policy_class: type[TokenPolicy], n_tokens: int = 4, n_bins: int = 8, peaked: bool = True, **kwargs: Any
) -> TokenPolicy:
    """A policy for state observations; a peaked one is far from the uniform distribution that training starts from."""
    action_space = spaces.MultiDiscrete([n_bins] * n_tokens)
    policy = policy_class(STATE, action_space, lambda _: 3e-3, **kwargs)
    if peaked:
        head = policy.action_net.head if policy.autoregressive else policy.action_net
        head.weight.data *= 100
    return policy


class TokenEnv(gym.Env):
    """One-step episodes with random observations of any kind; the reward is the number of tokens that are 0."""

    def __init__(self, observation_space: spaces.Space = STATE) -> None:
        self.observation_space, self.action_space = observation_space, spaces.MultiDiscrete([4] * 3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.observation_space.sample(), float((action == 0).sum()), True, False, {}


@both
def test_sampling_and_evaluating_agree(policy_class: type[TokenPolicy]) -> None:
    policy, obs = make_policy(policy_class, n_tokens=7, n_bins=256, temperature=1.5), th.randn(64, 5)
    actions, values, log_prob = policy(obs)
    evaluated_values, evaluated_log_prob, _ = policy.evaluate_actions(obs, actions.float())
    th.testing.assert_close(evaluated_log_prob, log_prob, atol=1e-5, rtol=0)
    assert th.equal(evaluated_values, values)
    assert th.equal(policy.predict_values(obs), values)


@both
def test_evaluating_leaves_the_distribution_on_these_actions(policy_class: type[TokenPolicy]) -> None:
    policy, obs, actions = make_policy(policy_class), th.randn(16, 5), th.randint(8, (16, 4))
    _, log_prob, entropy = policy.evaluate_actions(obs, actions)
    assert policy.action_dist.logits.shape == (16, 4, 8)
    assert th.equal(policy.action_dist.logits, policy.distribution_on(obs, actions).logits)
    assert th.equal(policy.action_dist.token_log_prob(actions).sum(1), log_prob)
    assert th.equal(policy.action_dist.entropy(), entropy)


def test_cached_and_uncached_sampling_give_the_same_tokens() -> None:
    policy, obs = make_policy(AutoregressivePolicy, n_tokens=7, temperature=0.7), th.randn(64, 5)
    th.manual_seed(1)
    cached, _, _ = policy(obs)
    th.manual_seed(1)
    uncached = th.zeros(64, 7, dtype=th.int64)
    for k in range(7):
        uncached[:, k] = choose_tokens(policy.distribution_on(obs, uncached).logits[:, k], temperature=1.0)
    assert th.equal(cached, uncached)
    assert len(cached.unique(dim=0)) > 32, "they are no constant"


def test_probabilities_of_all_sequences_sum_to_one_and_entropies_obey_the_chain_rule() -> None:
    policy = make_policy(AutoregressivePolicy, n_tokens=2, n_bins=3)
    sequences = th.tensor(list(product(range(3), repeat=2)))
    _, log_prob, conditional_entropies = policy.evaluate_actions(th.randn(1, 5).expand(9, 5), sequences)
    probs = log_prob.exp()
    th.testing.assert_close(probs.sum(), th.tensor(1.0))
    th.testing.assert_close((probs * conditional_entropies).sum(), -(probs * log_prob).sum())
    assert probs.max() > 2 / 9, "far from uniform"


@pytest.mark.parametrize("changed", range(4))
def test_a_token_is_read_by_later_tokens_only(changed: int) -> None:
    policy, obs, actions = make_policy(AutoregressivePolicy), th.randn(16, 5), th.randint(8, (16, 4))
    others = actions.clone()
    others[:, changed] = (others[:, changed] + 1) % 8
    here, there = policy.distribution_on(obs, actions).logits, policy.distribution_on(obs, others).logits
    assert th.equal(here[:, : changed + 1], there[:, : changed + 1])
    assert bool((here[:, changed + 1 :] != there[:, changed + 1 :]).any(-1).all()), "and by each of them"


def test_independent_tokens_ignore_the_prefix() -> None:
    policy, obs = make_policy(TokenPolicy), th.randn(16, 5)
    given = [policy.distribution_on(obs, th.full((16, 4), token)).logits for token in (0, 7)]
    assert th.equal(given[0], given[1])
    assert th.equal(given[0], policy.get_distribution(obs).logits)


@both
def test_deterministic_actions_are_the_likeliest_token_after_token(policy_class: type[TokenPolicy]) -> None:
    policy, obs = make_policy(policy_class), th.randn(16, 5)
    actions = th.as_tensor(policy.predict(obs.numpy(), deterministic=True)[0])
    assert th.equal(policy.distribution_on(obs, actions).logits.argmax(-1), actions)
    assert th.equal(policy.get_distribution(obs).mode(), actions)
    assert th.equal(policy(obs, deterministic=True)[0], actions)


@both
@pytest.mark.parametrize(("deterministic", "temperature"), [(True, 0.6), (False, 2.0)])
def test_actions_are_drawn_at_their_temperature(
    policy_class: type[TokenPolicy], deterministic: bool, temperature: float
) -> None:
    policy = make_policy(policy_class, n_tokens=2, n_bins=3, temperature=2.0, eval_temperature=0.6)
    obs = th.randn(1, 5).expand(20_000, 5)
    actions, _ = policy.predict(obs.numpy(), deterministic=deterministic)
    policy.temperature = temperature
    sequences = th.tensor(list(product(range(3), repeat=2)))
    expected = policy.distribution_on(obs[:9], sequences).log_prob(sequences).exp()
    counts = np.bincount(actions[:, 0] * 3 + actions[:, 1], minlength=9)
    np.testing.assert_allclose(counts / 20_000, expected.detach(), atol=0.015)


@both
def test_temperature_divides_the_logits_that_are_trained(policy_class: type[TokenPolicy]) -> None:
    policy, obs, actions = make_policy(policy_class), th.randn(16, 5), th.randint(8, (16, 4))
    logits = policy.distribution_on(obs, actions).logits
    policy.temperature = 2.5
    th.testing.assert_close(policy.distribution_on(obs, actions).logits, (logits / 2.5).log_softmax(-1))


@pytest.mark.parametrize(("random", "bin_drawn"), [(0.0, 1), (1 - 2**-24, 3)])
def test_impossible_bins_are_never_drawn(random: float, bin_drawn: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(th, "rand", lambda *shape, device: th.full(shape, random, device=device))
    peaks = th.linspace(-10.0, 10.0, 1000)
    logits = th.full((1000, 5), -math.inf)
    logits[:, 1], logits[:, 3] = 0.0, peaks
    assert choose_tokens(logits, temperature=1.0).unique().tolist() == [bin_drawn]


def test_independent_tokens_are_sb3s_policy_for_the_same_weights() -> None:
    policy, obs, actions = make_policy(TokenPolicy), th.randn(16, 5), th.randint(8, (16, 4))
    sb3 = ActorCriticPolicy(STATE, policy.action_space, lambda _: 3e-3)
    sb3.load_state_dict(policy.state_dict())
    for ours, theirs in zip(policy.evaluate_actions(obs, actions), sb3.evaluate_actions(obs, actions)):
        th.testing.assert_close(ours, theirs)
    th.testing.assert_close(token_logits(policy.action_dist), token_logits(sb3.action_dist))


def test_token_logits_of_sb3s_distribution_are_its_log_probabilities() -> None:
    distribution = MultiCategoricalDistribution([5, 5, 5]).proba_distribution(th.randn(16, 15))
    actions = distribution.sample()
    log_prob = token_logits(distribution).gather(-1, actions[..., None])[..., 0].sum(1)
    assert th.equal(log_prob, distribution.log_prob(actions))


def test_token_logits_refuses_other_distributions() -> None:
    with pytest.raises(ValueError, match="token_logits needs a distribution over tokens, got DiagGaussian"):
        token_logits(DiagGaussianDistribution(3))
    with pytest.raises(ValueError, match=r"token_logits needs tokens of equal size, got sizes \[3, 4\]"):
        token_logits(MultiCategoricalDistribution([3, 4]).proba_distribution(th.randn(2, 7)))


def test_distribution_has_sb3s_interface() -> None:
    distribution = TokenDistribution(n_tokens=3, n_bins=5)
    logits = distribution.proba_distribution_net(latent_dim=6)(th.randn(16, 6))
    actions, log_prob = distribution.log_prob_from_params(logits)
    assert actions.shape == (16, 3)
    assert th.equal(distribution.log_prob(actions), log_prob)
    greedy = distribution.actions_from_params(logits, deterministic=True)
    assert th.equal(greedy, logits.view(16, 3, 5).argmax(-1))
    assert distribution.log_prob(greedy).ge(log_prob).all()


@both
def test_saved_policy_is_the_same_policy(policy_class: type[TokenPolicy], tmp_path: Path) -> None:
    sizes = {"d_model": 24, "n_layers": 1, "n_heads": 3} if policy_class.autoregressive else {}
    settings = {"temperature": 0.7, "eval_temperature": 0.6, "share_features_extractor": False, **sizes}
    policy = make_policy(policy_class, **settings)
    policy.save(tmp_path / "policy.pt")
    loaded = policy_class.load(tmp_path / "policy.pt", device="cpu")
    assert {name: getattr(loaded, name) for name in settings} == settings
    obs, actions = th.randn(16, 5), th.randint(8, (16, 4))
    for before, after in zip(policy.evaluate_actions(obs, actions), loaded.evaluate_actions(obs, actions)):
        assert th.equal(before, after)


@both
@pytest.mark.parametrize("kind", ["state", "normalized state", "image", "dict"])
def test_ppo_trains_saves_and_loads(policy_class: type[TokenPolicy], kind: str, tmp_path: Path) -> None:
    space: dict[str, Any] = {"image": IMAGE, "dict": spaces.Dict({"state": STATE, "rgb": IMAGE})}
    policy_kwargs = {"features_extractor_class": RunningNorm} if kind == "normalized state" else {}
    env = TokenEnv(space.get(kind, STATE))
    model = PPO(policy_class, env, n_steps=16, batch_size=8, n_epochs=2, policy_kwargs=policy_kwargs, device="cpu")
    model.learn(16)
    model.save(tmp_path / "model.zip")
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    obs, _ = env.reset()
    actions = [each.predict(obs, deterministic=True)[0] for each in (model, loaded)]
    np.testing.assert_array_equal(*actions)
    assert env.action_space.contains(actions[0])


@pytest.mark.parametrize(
    ("space", "expected"),
    [(STATE, FlattenExtractor), (IMAGE, NatureCNN), (spaces.Dict({"state": STATE}), CombinedExtractor)],
)
def test_features_extractor_suits_the_observation(space: spaces.Space, expected: type) -> None:
    policy = TokenPolicy(space, spaces.MultiDiscrete([4, 4]), lambda _: 1e-3)
    assert type(policy.features_extractor) is expected


@both
@pytest.mark.parametrize(
    "space",
    [
        STATE,
        spaces.Discrete(3),
        spaces.MultiDiscrete([3, 4]),
        spaces.MultiDiscrete([[3, 3], [3, 3]]),
        spaces.MultiDiscrete([3, 3], start=[0, 1]),
    ],
)
def test_other_action_spaces_are_refused(policy_class: type[TokenPolicy], space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="(?s)Policy needs action tokens.*ActionTokens"):
        policy_class(STATE, space, lambda _: 1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0.0}, "AutoregressivePolicy: temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "temperature=nan must be positive"),
        ({"eval_temperature": -0.1}, "AutoregressivePolicy: eval_temperature=-0.1 must not be negative"),
        ({"d_model": 64, "n_heads": 5}, "n_heads=5 must divide d_model=64"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(AutoregressivePolicy, peaked=False, **kwargs)


def test_only_autoregressive_tokens_learn_to_agree() -> None:
    """Maximum likelihood of a token drawn uniformly, twice: log V nats; independent tokens cannot do better than 2 log V."""
    nats = {}
    for policy_class in (TokenPolicy, AutoregressivePolicy):
        policy = make_policy(policy_class, n_tokens=2, peaked=False)
        for _ in range(150):
            _, log_prob, _ = policy.evaluate_actions(th.zeros(64, 5), th.randint(8, (64, 1)).expand(64, 2))
            policy.optimizer.zero_grad()
            (-log_prob.mean()).backward()
            policy.optimizer.step()
        with th.no_grad():
            pairs = th.arange(8)[:, None].expand(8, 2)
            nats[policy_class] = -policy.evaluate_actions(th.zeros(8, 5), pairs)[1].mean().item()
            actions, _, _ = policy(th.zeros(100, 5))
        agreement = (actions[:, 0] == actions[:, 1]).float().mean()
        assert agreement == 1 if policy.autoregressive else agreement < 0.3
    assert nats[AutoregressivePolicy] < math.log(8) + 0.1
    assert nats[TokenPolicy] > 2 * math.log(8) - 0.01
