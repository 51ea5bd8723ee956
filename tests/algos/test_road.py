"""ROAD-VLA: its weights, its teacher, what moves the student and what does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from torch.distributions import Categorical, kl_divergence

from rpd_sb3.algos import ROAD, road
from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.students import AutoregressivePolicy, TokenPolicy
from rpd_sb3.students.tokens import TokenDistribution
from tests.support.token_helpers import (
    LEARNING,
    SMALL,
    K,
    accuracy,
    collected,
    make_venv,
    peaked,
    same_parameters,
)

both = pytest.mark.parametrize("policy", [TokenPolicy, AutoregressivePolicy])


def make(policy: Any = TokenPolicy, **kwargs: Any) -> ROAD:
    venv = make_venv(reward=1.0, truncates=kwargs.pop("truncates", False))
    return ROAD(policy, venv, **{"alpha": 0.0, **SMALL, **kwargs})


class FirstCoordinate:
    """A critic that finds three times the first coordinate, plus 1."""

    def predict_values(self, obs: th.Tensor) -> th.Tensor:
        return 3 * obs[:, :1] + 1


def gae(rewards: np.ndarray, values: np.ndarray, last: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Generalised advantage estimation (n_steps, n_envs), as the sum of discounted TD errors."""
    n_steps, gamma, lam = len(rewards), 0.9, 0.8
    following = np.concatenate([values[1:], last[None]])
    goes_on = 1.0 - np.concatenate([starts[1:], ends[None]])
    errors = rewards + gamma * following * goes_on - values
    result = np.zeros_like(errors)
    for t in range(n_steps):
        weight = np.ones(errors.shape[1])
        for later in range(t, n_steps):
            result[t] += weight * errors[later]
            weight = weight * gamma * lam * goes_on[later]
    return result


def expected_weights(model: Any, alpha: float, gate: bool, positive_only: bool, clip: float) -> np.ndarray:
    """Eqs. 7 to 9 in NumPy, for the critic of :class:`FirstCoordinate`."""
    buffer = model.rollout_buffer
    internal = buffer.advantages.astype(np.float64)
    args = buffer.episode_starts, model._last_episode_starts.astype(float)
    reference = gae(buffer.rewards, 3.0 * buffer.observations[..., 0] + 1, 3.0 * model._last_obs[:, 0] + 1, *args)
    calibrated = internal.mean() + internal.std() / reference.std() * (reference - reference.mean())
    agrees = np.sign(internal) == np.sign(calibrated)
    assert 0 < agrees.mean() < 1
    mixed = internal + alpha * (agrees if gate else 1.0) * (calibrated - internal)
    weight = np.clip((mixed - mixed.mean()) / mixed.std(), -clip, clip)
    return np.maximum(weight, 0) if positive_only else weight


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(("positive_only", "clip"), [(False, 2.0), (False, 0.5), (True, 1.0)])
def test_weights_are_those_of_equations_7_to_9(alpha: float, gate: bool, positive_only: bool, clip: float) -> None:
    kwargs: Any = {"gate": gate, "positive_only": positive_only, "weight_clip": clip, "gamma": 0.9, "gae_lambda": 0.8}
    model: Any = make(**{**kwargs, "n_steps": 13, "batch_size": 13})
    if alpha > 0:  # no file for this critic
        model.alpha, model._critic = alpha, FirstCoordinate()
    expected = expected_weights(collected(model), alpha, gate, positive_only, clip)
    model.prepare_rollout()
    np.testing.assert_allclose(model.rollout_buffer.labels["weight"], expected, atol=1e-4)
    assert model.rollout_buffer.labelled.all()


def test_each_transition_gets_its_own_weight() -> None:
    model = collected(make())
    model.prepare_rollout()
    advantages = model.rollout_buffer.advantages
    mean, std = advantages.mean(), advantages.std()
    for batch in model.rollout_buffer.get(8):
        expected = ((batch.advantages - mean) / std).clamp(-2, 2)
        th.testing.assert_close(batch.labels["weight"], expected, rtol=1e-4, atol=1e-4)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    """A PPO run of the same architecture."""
    path = str(tmp_path / "reference.zip")
    PPO(TokenPolicy, make_venv(reward=1.0), **SMALL).learn(64).save(path)
    return path


@pytest.mark.parametrize("truncates", [False, True])
def test_reference_advantages_of_the_same_critic_are_sb3s(reference: str, truncates: bool) -> None:
    model: Any = make(alpha=0.5, reference=reference, truncates=truncates, n_steps=9, batch_size=9)
    model.policy.load_state_dict(PPO.load(reference).policy.state_dict())
    collected(model)
    with th.no_grad():
        advantages = model._reference_advantages()
    np.testing.assert_allclose(advantages, model.rollout_buffer.advantages, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_the_same_critic_as_a_reference_agrees_and_changes_nothing(reference: str, alpha: float) -> None:
    weights = []
    for kwargs in ({"alpha": alpha, "reference": reference}, {"alpha": 0.0}):
        model = make(**kwargs)
        model.policy.load_state_dict(PPO.load(reference).policy.state_dict())
        collected(model).prepare_rollout()
        weights.append(model.rollout_buffer.labels["weight"])
        agreement = model.logger.name_to_value.get("train/critic_agreement")
        assert agreement == (1.0 if kwargs["alpha"] else None)
    np.testing.assert_allclose(*weights, atol=1e-4)


def test_the_reference_has_an_effect_and_stays_as_it_is(reference: str) -> None:
    model: Any = make(alpha=1.0, reference=reference)
    before = [value.clone() for value in model._critic.state_dict().values()]
    model.learn(64)
    assert all(th.equal(*pair) for pair in zip(before, model._critic.state_dict().values()))
    assert not same_parameters(model, make().learn(64))


def test_reference_advantages_leave_the_rollout_alone(reference: str) -> None:
    model: Any = collected(make(alpha=0.5, reference=reference))
    buffer = model.rollout_buffer
    before = {name: getattr(buffer, name).copy() for name in ("advantages", "returns", "values", "rewards")}
    model.prepare_rollout()
    for name, values in before.items():
        np.testing.assert_array_equal(getattr(buffer, name), values)


def handmade(logits: th.Tensor, actions: th.Tensor, weight: th.Tensor) -> tuple[LabelledSamples, Student]:
    """A minibatch of nothing but tokens and weights, and the student's logits (B, K, V) on it."""
    none = th.zeros(len(actions))
    batch = LabelledSamples(none, actions, none, none, none, none, {"weight": weight}, none == 0, none != 0)
    return batch, Student(TokenDistribution(*logits.shape[1:]).proba_distribution(logits), none, none, None)


def test_loss_of_two_equal_tokens_at_weight_2() -> None:
    loss, values = make().distill_loss(*handmade(th.zeros(1, 1, 2), th.tensor([[0.0]]), th.tensor([2.0])))
    assert loss.item() == pytest.approx(0.3278, abs=5e-5)
    assert values == {"distill_kl": loss.item(), "entropy": pytest.approx(math.log(2))}


LOGITS = 2 * th.randn(6, K, 5, generator=th.Generator().manual_seed(0))
ACTIONS = th.tensor([[0, 1], [2, 3], [4, 4], [1, 0], [3, 2], [0, 0]])
WEIGHTS = th.tensor([2.0, 0.7, 0.0, -0.3, -1.0, -2.0])


def tilted(eta: float) -> Categorical:
    """softmax(z + eta w onehot(a))"""
    onehot = th.nn.functional.one_hot(ACTIONS, 5)
    return Categorical(logits=LOGITS + eta * WEIGHTS[:, None, None] * onehot)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_loss_is_the_kl_of_the_tilted_distribution_from_the_students(reduction: str, eta: float) -> None:
    model = make(token_reduction=reduction, eta=eta)
    loss, _ = model.distill_loss(*handmade(LOGITS, ACTIONS, WEIGHTS))
    per_token = kl_divergence(tilted(eta), Categorical(logits=LOGITS))
    th.testing.assert_close(loss, (per_token.mean(1) if reduction == "mean" else per_token.sum(1)).mean())


def test_jsd_is_the_mean_kl_to_the_middle() -> None:
    loss, _ = make(divergence="jsd").distill_loss(*handmade(LOGITS, ACTIONS, WEIGHTS))
    q, p = tilted(1.0), Categorical(logits=LOGITS)
    middle = Categorical(probs=(q.probs + p.probs) / 2)
    th.testing.assert_close(loss, ((kl_divergence(q, middle) + kl_divergence(p, middle)) / 2).mean())


def gradient(model: ROAD, anchor: th.Tensor | None = None) -> th.Tensor:
    """Of the loss to the student's logits (B, K, V), times B, with the tokens summed."""
    logits = LOGITS.clone().requires_grad_()
    batch, student = handmade(logits, ACTIONS, WEIGHTS)
    if anchor is not None:
        batch.labels["logits"] = anchor
    loss, _ = model.distill_loss(batch, student)
    return th.autograd.grad(len(LOGITS) * loss, logits)[0]


def test_anchored_at_the_current_policy_it_is_a_policy_gradient_per_token() -> None:
    p = Categorical(logits=LOGITS)
    taken = p.log_prob(ACTIONS).exp()
    w = WEIGHTS[:, None].expand(6, K)
    factor = taken * w.expm1() / (1 - taken + taken * w.exp())
    expected = -factor[..., None] * (th.nn.functional.one_hot(ACTIONS, 5) - p.probs)
    th.testing.assert_close(gradient(make(token_reduction="sum")), expected)


def test_anchored_at_the_rollout_it_begins_with_the_same_gradient() -> None:
    model = make(token_reduction="sum", teacher_anchor="rollout")
    first = gradient(model, anchor=LOGITS)
    th.testing.assert_close(first, gradient(make(token_reduction="sum")))
    still = (first.abs() < 1e-6).flatten(1).all(1)
    assert th.equal(still, WEIGHTS == 0)


def test_the_rollouts_logits_are_those_of_evaluation_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout would add noise to what is tilted, and BatchNorm's statistics would move."""
    model = make(teacher_anchor="rollout")
    modes: dict[str, set[bool]] = {"rollout": set(), "update": set()}
    logits, loss = model._rollout_logits, model.distill_loss
    monkeypatch.setattr(model, "_rollout_logits", lambda: (modes["rollout"].add(model.policy.training), logits())[1])
    monkeypatch.setattr(
        model, "distill_loss", lambda *args: (modes["update"].add(model.policy.training), loss(*args))[1]
    )
    model.learn(64)
    assert modes == {"rollout": {False}, "update": {True}}


def test_only_the_rollouts_anchor_restores_what_has_moved() -> None:
    """Where the weight is 0 the gradient is p - p_rollout; anchored at the current policy there is none."""
    before = LOGITS + th.randn(LOGITS.shape)
    restored = gradient(make(token_reduction="sum", teacher_anchor="rollout"), anchor=before)[2]
    th.testing.assert_close(restored, LOGITS[2].softmax(-1) - before[2].softmax(-1))
    th.testing.assert_close(gradient(make())[2], th.zeros(K, 5), atol=1e-7, rtol=0)


@both
@pytest.mark.parametrize("chunk", [5, 2048])
def test_the_rollouts_logits_stay_with_their_transitions(
    policy: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(road, "CHUNK", chunk)
    model = collected(peaked(make(policy, teacher_anchor="rollout")))
    model.prepare_rollout()
    for batch in model.rollout_buffer.get(8):
        with th.no_grad():
            expected = model.policy.distribution_on(batch.observations, batch.actions).logits
        th.testing.assert_close(batch.labels["logits"], expected)


def test_anchored_at_the_current_policy_no_logits_are_stored() -> None:
    model = collected(make())
    model.prepare_rollout()
    assert model.rollout_buffer.labels.keys() == {"weight"}


class OtherRatios(ROAD):
    """Believes that the rollout's actions had other probabilities, which only the surrogate looks at."""

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        self.rollout_buffer.log_probs += np.linspace(-1, 1, self.n_steps, dtype=np.float32)[:, None]


@pytest.mark.parametrize(("ppo_coef", "same"), [(0.0, True), (1.0, False)])
def test_without_ppo_coef_the_surrogate_moves_nothing(ppo_coef: float, same: bool) -> None:
    kwargs: Any = {"alpha": 0.0, "ppo_coef": ppo_coef, **SMALL}
    with_it, without = (algo(TokenPolicy, make_venv(reward=1.0), **kwargs).learn(64) for algo in (ROAD, OtherRatios))
    assert same_parameters(with_it, without) is same


def test_without_distill_coef_it_is_ppo() -> None:
    alone = PPO(TokenPolicy, make_venv(reward=1.0), **SMALL).learn(64)
    assert same_parameters(make(distill_coef=0.0).learn(64), alone)
    assert not same_parameters(make().learn(64), alone)


def test_distill_coef_weighs_the_term() -> None:
    """With plain gradient descent and one minibatch, twice the weight moves the actor twice as far."""
    optimizer: Any = {**SMALL["policy_kwargs"], "optimizer_class": th.optim.SGD}
    kwargs: Any = {"ppo_coef": 0.0, "max_grad_norm": 1e9, "n_epochs": 1, "batch_size": 32, "policy_kwargs": optimizer}
    start = make(**kwargs).policy.action_net.weight
    moved = [make(distill_coef=c, **kwargs).learn(32).policy.action_net.weight - start for c in (0.5, 1.0)]
    assert moved[0].abs().max() > 0
    th.testing.assert_close(2 * moved[0], moved[1], rtol=1e-2, atol=1e-7)


def test_weights_agreement_divergence_and_entropy_are_logged(reference: str) -> None:
    logs = make(alpha=0.5, reference=reference).learn(32).logger.name_to_value
    names = {
        "critic_agreement",
        "clipped_weights",
        "mean_weight",
        "mean_abs_weight",
        "distill_kl",
        "distill_loss",
        "entropy",
    }
    assert {f"train/{name}" for name in names | {"distill_coef"}} <= logs.keys()


def test_logged_weights_are_those_used() -> None:
    model = collected(make(weight_clip=0.5, positive_only=True))
    advantages = model.rollout_buffer.advantages
    model.prepare_rollout()
    standardised = (advantages - advantages.mean()) / advantages.std()
    weight, logs = model.rollout_buffer.labels["weight"], model.logger.name_to_value
    assert logs["train/clipped_weights"] == pytest.approx((np.abs(standardised) > 0.5).mean())
    assert logs["train/mean_weight"] == logs["train/mean_abs_weight"] == pytest.approx(weight.mean())
    assert weight.min() == 0
    assert weight.max() == 0.5


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.5}, r"ROAD: alpha=0\.5 needs the critic of a PPO run: give reference=FILE\.zip, or alpha=0"),
        ({"alpha": 1.5}, r"ROAD: alpha=1\.5 must lie in \[0, 1\]"),
        ({"eta": 0.0}, r"ROAD: eta=0\.0 and weight_clip=2\.0 must be positive"),
        ({"weight_clip": 0.0}, r"ROAD: eta=1\.0 and weight_clip=0\.0 must be positive"),
        ({"divergence": "reverse_kl"}, "divergence='reverse_kl' is unknown; choose one of forward_kl, jsd"),
        ({"teacher_anchor": "start"}, "teacher_anchor='start' is unknown; choose one of current, rollout"),
        ({"token_reduction": "max"}, "token_reduction='max' is unknown; choose one of mean, sum"),
        ({"label_replay": 10}, "ROAD: label_replay=10 is for a teacher's labels, and ROAD asks none"),
        ({"label_fraction": 0.5}, r"ROAD: label_fraction=0\.5 is for a teacher's labels"),
    ],
)
def test_arguments_that_do_not_go_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_continuous_actions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"ROAD needs action tokens.* got Box\(.*; wrap the env in ActionTokens"):
        ROAD("MlpPolicy", make_venv(tokens=False), alpha=0.0, **SMALL)


def test_a_reference_of_other_observations_is_refused(reference: str) -> None:
    venv = make_venv()
    venv.observation_space = spaces.Box(-1.0, 1.0, (K + 1,), np.float32)
    with pytest.raises(ValueError, match=r"reference\.zip' saw Box\(-1\.0, 1\.0, \(2,\), float32\), but the env"):
        ROAD(TokenPolicy, venv, alpha=0.5, reference=reference, **SMALL)


def learned(reward: float = 1.0, **kwargs: Any) -> float:
    settings = {**LEARNING, "alpha": 0.0, "ppo_coef": 0.0, "token_reduction": "sum", "distill_coef": 1.0}
    return accuracy(ROAD(TokenPolicy, make_venv(reward=reward), **{**settings, **kwargs}).learn(3072))


@pytest.mark.parametrize("anchor", ["current", "rollout"])
def test_the_distillation_term_alone_learns_from_reward(anchor: str) -> None:
    assert learned(teacher_anchor=anchor) > 0.7


def test_without_reward_it_learns_nothing() -> None:
    assert learned(reward=0.0) < 0.4


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_loaded_model_goes_on_as_the_saved_one(reference: str, alpha: float, tmp_path: Path) -> None:
    kwargs: Any = {"alpha": alpha, "reference": reference, "eta": 0.5, "teacher_anchor": "rollout"}
    model: Any = make(**kwargs).learn(32)
    model.save(tmp_path / "model")
    loaded: Any = ROAD.load(tmp_path / "model", env=make_venv(reward=1.0))
    assert {key: getattr(loaded, key) for key in kwargs} == kwargs
    assert same_parameters(model, loaded)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 64
    if alpha:
        theirs = PPO.load(reference).policy.state_dict()
        assert all(th.equal(value, theirs[name]) for name, value in loaded._critic.state_dict().items())


def test_the_reference_is_read_again_and_not_saved(reference: str, tmp_path: Path) -> None:
    with_it, without = tmp_path / "with.zip", tmp_path / "without.zip"
    make(alpha=0.5, reference=reference).save(with_it)
    make().save(without)
    assert abs(with_it.stat().st_size - without.stat().st_size) < 1000
    Path(reference).unlink()
    with pytest.raises(FileNotFoundError, match=r"reference\.zip"):
        ROAD.load(with_it)
