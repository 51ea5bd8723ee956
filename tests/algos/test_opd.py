"""OPD: what it minimises, what takes over and when, and learning where the baseline fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from torch.distributions import Categorical, kl_divergence

from rpd_sb3.algos import GRPO, OPD
from rpd_sb3.algos.losses import DIVERGENCES, clipped_surrogate
from rpd_sb3.students import AutoregressivePolicy, TokenPolicy
from tests.support.helpers import EchoTeacher
from tests.support.token_helpers import (
    LEARNING,
    SMALL,
    K,
    TokenTeacher,
    V,
    accuracy,
    collected,
    echo,
    gradients,
    make_venv,
    peaked,
    rough,
    same_parameters,
    whole_rollout,
)

both = pytest.mark.parametrize("policy", [TokenPolicy, AutoregressivePolicy])


def make(policy: Any = TokenPolicy, logits: Any = rough, reward: float = 0.0, **kwargs: Any) -> OPD:
    return OPD(policy, make_venv(TokenTeacher(logits), reward=reward), **{**SMALL, **kwargs})


def trained(steps: int = 64, **kwargs: Any) -> OPD:
    return make(**kwargs).learn(steps)


def expected_divergence(student: Categorical, teacher: Categorical, kind: str) -> th.Tensor:
    """Mean over transitions of the sum over tokens, by torch's own distributions."""
    middle = Categorical(probs=(student.probs + teacher.probs) / 2)
    per_token = {
        "reverse_kl": kl_divergence(student, teacher),
        "forward_kl": kl_divergence(teacher, student),
        "hard_ce": -student.log_prob(teacher.probs.argmax(-1)),
        "jsd": (kl_divergence(student, middle) + kl_divergence(teacher, middle)) / 2,
    }[kind]
    return per_token.sum(dim=1).mean()


@both
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_distill_loss_is_the_divergence_from_the_teacher_on_the_students_own_tokens(policy: Any, kind: str) -> None:
    model = collected(peaked(make(policy, divergence=kind, teacher_floor=0.0)))
    batch, student, _ = whole_rollout(model)
    teacher = Categorical(logits=th.as_tensor(rough(batch.observations.numpy(), batch.actions.numpy())))
    ours = Categorical(logits=model.policy.distribution_on(batch.observations, batch.actions).logits)
    loss, _ = model.distill_loss(batch, student)
    th.testing.assert_close(loss, expected_divergence(ours, teacher, kind))
    assert all(grad.abs().max() > 0 for grad in gradients(loss, model))


def test_teacher_is_softened_by_its_temperature_and_then_floored() -> None:
    model = collected(peaked(make(teacher_temperature=2.0, teacher_floor=0.2)))
    batch, student, _ = whole_rollout(model)
    softened = (th.as_tensor(rough(batch.observations.numpy(), batch.actions.numpy())) / 2).softmax(-1)
    teacher = Categorical(probs=0.8 * softened + 0.2 / V)
    ours = Categorical(logits=student.distribution.logits)
    loss, _ = model.distill_loss(batch, student)
    th.testing.assert_close(loss, expected_divergence(ours, teacher, "reverse_kl"))


def sampled_log_ratio(model: OPD) -> np.ndarray:
    """log T(a) - log S_old(a) of the rollout (n_steps, n_envs), the teacher without a floor."""
    buffer: Any = model.rollout_buffer
    obs, actions = buffer.observations.reshape(-1, K), buffer.actions.reshape(-1, K)
    teacher = Categorical(logits=th.as_tensor(rough(obs, actions)))
    return teacher.log_prob(th.as_tensor(actions)).sum(1).numpy().reshape(buffer.log_probs.shape) - buffer.log_probs


@both
@pytest.mark.parametrize("then", [None, "grpo"])
def test_sampled_advantage_is_the_log_ratio_and_nothing_else(policy: Any, then: str | None) -> None:
    kwargs: Any = {"estimator": "sampled", "teacher_floor": 0.0, "reward": 3.0, "then": then, "group_size": 2}
    model = collected(peaked(make(policy, **kwargs)))
    expected = sampled_log_ratio(model)
    model.prepare_rollout()
    np.testing.assert_allclose(model.rollout_buffer.advantages, expected, rtol=1e-5, atol=1e-5)
    batch, _, _ = whole_rollout(model)
    assert th.equal(model._advantages(batch), batch.advantages), "never normalised"


def test_sampled_advantage_is_weighed_by_the_coefficient() -> None:
    model = collected(make(estimator="sampled", teacher_floor=0.0, distill_coef=0.25))
    expected = 0.25 * sampled_log_ratio(model)
    model.prepare_rollout()
    np.testing.assert_allclose(model.rollout_buffer.advantages, expected, rtol=1e-5, atol=1e-5)


@both
def test_sampled_estimate_is_a_policy_gradient_in_the_first_minibatch(policy: Any) -> None:
    model = collected(peaked(make(policy, estimator="sampled")))
    model.prepare_rollout()
    batch, student, surrogate = whole_rollout(model)
    policy_gradient = -(batch.advantages * student.log_prob).mean()
    for ours, expected in zip(gradients(surrogate, model), gradients(policy_gradient, model)):
        th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    loss, _ = model.distill_loss(batch, student)
    assert not loss.requires_grad, "it would count twice"


def test_sampled_advantage_is_zero_where_there_is_no_label() -> None:
    model = collected(make(estimator="sampled", label_fraction=0.5))
    model.prepare_rollout()
    buffer = model.rollout_buffer
    assert 0 < buffer.labelled.sum() < buffer.labelled.size
    assert ((buffer.advantages != 0) == buffer.labelled).all()


def test_ppo_coef_is_the_share_of_the_rewards_surrogate() -> None:
    model = collected(peaked(make(ppo_coef=0.5, reward=1.0)))
    model.prepare_rollout()
    batch, student, surrogate = whole_rollout(model)
    expected, _ = clipped_surrogate(student.log_prob, batch.old_log_prob, batch.advantages, 0.2)
    assert th.equal(surrogate, 0.5 * expected)
    assert batch.advantages.std() > 0


def test_ppo_coef_is_the_share_of_the_rewards_advantage_beside_a_sampled_estimate() -> None:
    model = collected(make(ppo_coef=0.5, reward=1.0, estimator="sampled", teacher_floor=0.0))
    rewards = model.rollout_buffer.advantages.copy()
    expected = sampled_log_ratio(model) + 0.5 * rewards
    model.prepare_rollout()
    np.testing.assert_allclose(model.rollout_buffer.advantages, expected, rtol=1e-5, atol=1e-5)
    assert model.curriculum.surrogate_coef == 1


@pytest.mark.parametrize("estimator", ["full", "sampled"])
def test_by_default_rewards_change_nothing(estimator: str) -> None:
    without, rewarded = (trained(estimator=estimator, reward=reward) for reward in (0.0, 5.0))
    assert rewarded.rollout_buffer.rewards.max() > 0
    assert same_parameters(without, rewarded)
    assert not same_parameters(trained(estimator=estimator, reward=5.0, ppo_coef=0.5), without)


def test_rollouts_of_a_group_start_alike() -> None:
    first = collected(make(group_size=2)).rollout_buffer.observations[0]
    np.testing.assert_array_equal(first[0], first[1])
    np.testing.assert_array_equal(first[2], first[3])
    assert (first[0] != first[2]).all()
    alone = collected(make(group_size=1)).rollout_buffer.observations[0]
    assert len(np.unique(alone, axis=0)) == 4


@both
def test_replayed_labels_come_with_the_tokens_that_they_were_given_for(policy: Any) -> None:
    model = collected(peaked(make(policy, label_replay=100)))
    batch, student, _ = whole_rollout(model)
    np.random.seed(1)  # noqa: NPY002
    drawn = model.imitation(batch, student)
    np.random.seed(1)  # noqa: NPY002
    obs, labels = model.label_replay_buffer.sample(len(batch.actions))
    np.testing.assert_array_equal(rough(obs.numpy(), labels["taken_action"].numpy()), drawn.labels["logits"])
    expected = model.policy.distribution_on(obs, labels["taken_action"])
    assert th.equal(drawn.distribution.logits, expected.logits)


def test_sb3s_own_policy_replays_labels_too() -> None:
    assert accuracy(train("MlpPolicy", label_replay=5000)) > 0.9


def handed_over(then: str, **kwargs: Any) -> OPD:
    model = make(TokenPolicy, reward=1.0, then=then, group_size=2, **kwargs)
    model.curriculum.reward_leads = True
    return model


def test_after_the_hand_over_grpo_goes_on_as_it_would_alone() -> None:
    alone = GRPO(TokenPolicy, make_venv(reward=1.0), group_size=2, **SMALL).learn(64)
    assert same_parameters(handed_over("grpo").learn(64), alone)
    assert same_parameters(handed_over("grpo", estimator="sampled").learn(64), alone)


def test_after_the_hand_over_ppo_goes_on_as_it_would_alone() -> None:
    alone = PPO(TokenPolicy, make_venv(reward=1.0), normalize_advantage=False, **SMALL).learn(64)
    model = OPD(TokenPolicy, make_venv(TokenTeacher(rough), reward=1.0), then="ppo", **SMALL)
    model.curriculum.reward_leads = True
    assert same_parameters(model.learn(64), alone)


@pytest.mark.parametrize("then", ["grpo", "ppo"])
@pytest.mark.parametrize(("residual", "asked"), [(0.0, 64), (0.1, 128)])
def test_teacher_is_asked_after_the_hand_over_for_a_residual_only(then: str, residual: float, asked: int) -> None:
    teacher = TokenTeacher()
    kwargs: Any = {"then": then, "group_size": 2, "then_on": "step", "then_value": 64, "residual_coef": residual}
    model = OPD(TokenPolicy, make_venv(teacher), **kwargs, **SMALL).learn(128)
    assert teacher.n_asked == asked
    assert model.logger.name_to_value["train/distill_coef"] == residual / 2, "of the last rollout"


def test_residual_of_a_sampled_estimate_is_the_full_divergence() -> None:
    model = handed_over("grpo", residual_coef=0.1, estimator="sampled")
    batch, student, _ = whole_rollout(collected(model))
    loss, _ = model.distill_loss(batch, student)
    assert loss.requires_grad


def test_without_a_coefficient_the_sampled_estimate_asks_and_changes_nothing() -> None:
    teacher = TokenTeacher()
    kwargs: Any = {"estimator": "sampled", "distill_coef": lambda progress: 0.0}
    model = OPD(TokenPolicy, make_venv(teacher, reward=1.0), **kwargs, **SMALL).learn(64)
    assert teacher.n_asked == 0
    assert same_parameters(model, make())


LOGGED = ("reverse_kl", "forward_kl", "top1_agreement", "student_entropy", "teacher_entropy")


@both
def test_logs_divergences_agreement_and_entropies_for_each_token(policy: Any) -> None:
    model = collected(peaked(make(policy, teacher_floor=0.0)))
    batch, student, _ = whole_rollout(model)
    _, values = model.distill_loss(batch, student)
    teacher = Categorical(logits=batch.labels["logits"])
    ours = Categorical(logits=student.distribution.logits)
    expected = {
        "reverse_kl": kl_divergence(ours, teacher),
        "forward_kl": kl_divergence(teacher, ours),
        "top1_agreement": (ours.probs.argmax(-1) == teacher.probs.argmax(-1)).float(),
        "student_entropy": ours.entropy(),
        "teacher_entropy": teacher.entropy(),
    }
    for name, per_token in expected.items():
        assert values[name] == pytest.approx(per_token.mean().item(), rel=1e-4)
        assert [values[f"{name}/{k}"] for k in range(K)] == pytest.approx(per_token.mean(0).tolist(), rel=1e-4)
    log_ratio = (teacher.log_prob(batch.actions) - ours.log_prob(batch.actions)).sum(1)
    assert values["k3"] == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
    assert set(values) == {*LOGGED, *(f"{name}/{k}" for name in LOGGED for k in range(K)), "k3"}


@pytest.mark.parametrize("label_replay", [0, 100])
def test_everything_measured_goes_to_the_log(label_replay: int) -> None:
    keys = trained(label_replay=label_replay).logger.name_to_value.keys()
    names = {*LOGGED, *(f"{name}/{k}" for name in LOGGED for k in range(K)), "k3", "distill_loss", "distill_coef"}
    assert {f"train/{name}" for name in names} <= keys


def test_logs_are_of_the_transitions_that_have_a_label() -> None:
    model = collected(peaked(make(label_fraction=0.5, teacher_floor=0.0)))
    batch, student, _ = whole_rollout(model)
    loss, values = model.distill_loss(batch, student)
    assert values["reverse_kl"] * K == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"estimator": "k3"}, "estimator='k3' is unknown"),
        ({"then": "trpo"}, "then='trpo' is unknown"),
        ({"then_on": "epoch"}, "then_on='epoch' is unknown"),
        ({"estimator": "sampled", "divergence": "jsd"}, "needs divergence='reverse_kl'"),
        ({"estimator": "sampled", "normalize_advantage": True}, "normalize_advantage=False"),
        ({"teacher_temperature": 0.0}, "teacher_temperature=0.0"),
        ({"teacher_floor": 1.0}, "teacher_floor=1.0"),
        ({"then": "grpo"}, "group_size=1 must be at least 2"),
        ({"then": "ppo", "residual_coef": -1.0}, "residual_coef=-1.0"),
        ({"group_size": 3}, "group_size=3 must divide n_envs=4"),
        ({"group_size": 0}, "group_size=0 must be at least 1"),
        ({"then": "ppo", "success_cutoff": 0.5}, "one hand-over"),
        ({"distill_coef": -1.0}, "distill_coef=-1.0"),
    ],
)
def test_arguments_that_do_not_go_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_continuous_actions_are_refused() -> None:
    teacher = EchoTeacher()
    object.__setattr__(teacher.spec, "labels", frozenset({"logits"}))
    object.__setattr__(teacher.spec, "n_bins", V)
    with pytest.raises(ValueError, match=r"OPD needs action tokens.* got Box\(.*; wrap the env in ActionTokens"):
        OPD("MlpPolicy", make_venv(teacher, tokens=False), **SMALL)


def test_a_teacher_without_logits_is_refused() -> None:
    venv = make_venv(TokenTeacher(labels=frozenset({"action"})))
    with pytest.raises(ValueError, match=r"OPD needs the labels \['logits'\]; the teacher does not give \['logits'\]"):
        OPD(TokenPolicy, venv, **SMALL)


def train(policy: Any = TokenPolicy, logits: Any = None, steps: int = 2048, **kwargs: Any) -> OPD:
    teacher = TokenTeacher() if logits is None else TokenTeacher(logits)
    return OPD(policy, make_venv(teacher), **{**LEARNING, **kwargs}).learn(steps)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_without_reward_opd_reaches_the_teacher(kind: str) -> None:
    assert accuracy(train(divergence=kind)) > 0.9


def test_without_reward_the_sampled_estimate_reaches_the_teacher_too() -> None:
    assert accuracy(train(estimator="sampled", steps=4096, learning_rate=1e-2)) > 0.85


def test_without_reward_ppo_does_not_reach_the_teacher() -> None:
    assert accuracy(PPO(TokenPolicy, make_venv(), **LEARNING).learn(4096)) < 0.4


@pytest.mark.parametrize(("policy", "learns"), [(AutoregressivePolicy, True), (TokenPolicy, False)])
def test_only_an_autoregressive_student_learns_a_token_that_repeats_its_own(policy: Any, learns: bool) -> None:
    model = train(policy, echo, divergence="forward_kl", learning_rate=5e-3, n_epochs=4)
    actions, _ = model.predict(np.zeros((500, K), np.float32))
    assert np.bincount(actions[:, 0], minlength=V)[:4].min() > 80, "the first token stays random"
    repeated = (actions[:, 0] == actions[:, 1]).mean()
    assert repeated > 0.9 if learns else repeated < 0.4


def test_sb3s_own_policy_is_distilled_too() -> None:
    model = train("MlpPolicy")
    assert isinstance(model.action_space, spaces.MultiDiscrete)
    assert accuracy(model) > 0.9


@both
def test_a_loaded_model_goes_on_as_the_saved_one(policy: Any, tmp_path: Path) -> None:
    kwargs: Any = {
        "divergence": "jsd",
        "teacher_floor": 0.1,
        "group_size": 2,
        "then": "grpo",
        "then_on": "step",
        "then_value": 32,
        "residual_coef": 0.5,
    }
    model = trained(policy=policy, **kwargs)
    model.curriculum.reward_leads = True
    model.save(tmp_path / "model")
    loaded = OPD.load(tmp_path / "model", env=make_venv(TokenTeacher(rough)))
    assert (loaded.divergence, loaded.teacher_floor, loaded.group_size, loaded.then) == ("jsd", 0.1, 2, "grpo")
    assert vars(loaded.curriculum.hand_over) == vars(model.curriculum.hand_over)
    assert loaded.curriculum.reward_leads
    assert same_parameters(model, loaded)
    loaded.learn(32, reset_num_timesteps=False)
    assert loaded.num_timesteps == 96
    OPD.load(tmp_path / "model").predict(np.zeros(K, np.float32))


def test_extended_training_goes_by_its_own_end_from_the_first_rollout_on() -> None:
    remaining: list[float] = []

    def schedule(progress_remaining: float) -> float:
        remaining.append(progress_remaining)
        return 1.0

    model = trained(64, distill_coef=schedule)
    remaining.clear()
    model.learn(64, reset_num_timesteps=False)
    assert remaining[0] == pytest.approx(0.5)
