"""When the reward takes the lead, and what the losses weigh then."""

from __future__ import annotations

from typing import Any

import pytest
import torch as th
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.algos.curriculum import CosineSchedule, Curriculum, HandOver
from rpd_sb3.labelling import VecTeacher
from tests.support.helpers import CountingEnv, EchoTeacher


def leads(hand_over: HandOver, *rollouts: tuple[int, float | None]) -> list[bool]:
    """Whether the reward leads in successive rollouts, given timesteps and success rate before each."""
    curriculum = Curriculum(1.0, 1.0)
    curriculum.set_hand_over(hand_over)
    result = []
    for timesteps, success_rate in rollouts:
        curriculum.update(timesteps, 0.5, success_rate)
        result.append(curriculum.reward_leads)
        assert curriculum.distill_coef == (0.0 if curriculum.reward_leads else 1.0)
    return result


def at_rates(hand_over: HandOver, *rates: float | None) -> list[bool]:
    return leads(hand_over, *((0, rate) for rate in rates))


def test_hand_over_at_a_number_of_timesteps() -> None:
    assert leads(HandOver("step", 100), (0, None), (99, 1.0), (100, 1.0), (132, 0.0)) == [False, False, True, True]


def test_hand_over_at_a_success_rate_is_for_good() -> None:
    assert at_rates(HandOver("success", 0.5), 0.0, 0.4, 0.5, 0.1, 0.0) == [False, False, True, True, True]


def test_hand_over_that_returns_does_so_below_half_of_the_rate() -> None:
    hand_over = HandOver("success", 0.4, returns=True)
    assert at_rates(hand_over, 0.0, 0.3, 0.4, 0.3, 0.2, 0.1, 0.3, 0.4) == [
        False,
        False,
        True,
        True,
        True,
        False,
        False,
        True,
    ]


def test_hand_over_at_a_plateau_of_the_success_rate() -> None:
    # Two rollouts after 0.3, neither of them 2 points above it.
    rates = (0.1, 0.2, 0.3, 0.29, 0.33, 0.31, 0.34, 0.9)
    assert at_rates(HandOver("plateau", 2), *rates) == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    "hand_over", [HandOver("step", 1), HandOver("success", 0.01), HandOver("plateau", 1), HandOver("plateau", 3)]
)
def test_nothing_is_handed_over_at_a_success_rate_of_zero(hand_over: HandOver) -> None:
    assert not any(leads(hand_over, *((timesteps, 0.0) for timesteps in range(1, 10))))


def test_a_plateau_counts_from_the_first_success() -> None:
    assert at_rates(HandOver("plateau", 2), 0.0, 0.0, 0.0, 0.1, 0.1, 0.1) == [False] * 5 + [True]


@pytest.mark.parametrize("on", ["success", "plateau"])
def test_no_hand_over_before_an_episode_has_ended(on: str) -> None:
    assert not any(at_rates(HandOver(on, 1.0), None, None, None))


def test_without_a_hand_over_the_schedule_is_followed() -> None:
    curriculum = Curriculum(lambda progress: 2 * progress, 0.3)
    for progress in (1.0, 0.25, 0.0):
        curriculum.update(10, progress, 1.0)
        assert (curriculum.distill_coef, curriculum.surrogate_coef) == (2 * progress, 0.3)
        assert curriculum.learning_rate(progress) is None


def test_residual_falls_linearly_from_the_hand_over_to_the_end() -> None:
    curriculum = Curriculum(1.0, 0.0, reward_learning_rate=1e-5)
    curriculum.set_hand_over(HandOver("step", 20), ppo_coef=1.0, residual_coef=0.5)
    coefs = []
    for timesteps, progress in ((0, 1.0), (20, 0.8), (60, 0.4), (80, 0.2), (100, 0.0)):
        curriculum.update(timesteps, progress, None)
        coefs.append(curriculum.distill_coef)
        leads = timesteps > 0
        assert (curriculum.surrogate_coef, curriculum.learning_rate(progress)) == (
            (1.0, 1e-5) if leads else (0.0, None)
        )
    assert coefs == [1.0, 0.5, 0.25, 0.125, 0.0]


def test_the_reward_learns_at_the_rate_of_its_schedule() -> None:
    curriculum = Curriculum(1.0, 0.0, reward_learning_rate=lambda progress: 4e-3 * progress)
    curriculum.set_hand_over(HandOver("step", 20))
    for timesteps, progress, learning_rate in ((0, 1.0, None), (50, 0.5, 2e-3), (75, 0.25, 1e-3)):
        curriculum.update(timesteps, progress, None)
        assert curriculum.learning_rate(progress) == learning_rate


def test_residual_starts_again_from_its_full_weight_when_training_is_extended() -> None:
    curriculum = Curriculum(1.0, 0.0)
    curriculum.set_hand_over(HandOver("step", 20), residual_coef=0.5)
    coefs = []
    for timesteps, progress in ((80, 0.2), (100, 0.6)):
        curriculum.update(timesteps, progress, None)
        coefs.append(curriculum.distill_coef)
    assert coefs == [0.5, 0.5]


@pytest.mark.parametrize(
    ("on", "value", "word"),
    [
        ("epoch", 1, "unknown"),
        ("success", 1.5, "rate"),
        ("success", 0, "rate"),
        ("plateau", 0.8, "rollouts"),
        ("step", 0, "timesteps"),
    ],
)
def test_a_hand_over_that_cannot_be_is_refused(on: str, value: float, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        HandOver(on, value)


@pytest.mark.parametrize("key", ["distill_coef", "ppo_coef"])
def test_negative_weights_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}=-1 must not be negative"):
        RPD("MlpPolicy", None, **{key: -1}, _init_setup_model=False)


def test_the_surrogate_may_wait_for_the_reward() -> None:
    curriculum = RPD(
        "MlpPolicy", None, ppo_coef=0.0, success_cutoff=0.5, reward_ppo_coef=0.7, _init_setup_model=False
    ).curriculum
    for success_rate, coef in ((0.4, 0.0), (0.6, 0.7), (0.3, 0.7), (0.2, 0.0)):
        curriculum.update(0, 1.0, success_rate)
        assert curriculum.surrogate_coef == coef
    with pytest.raises(ValueError, match=r"reward_ppo_coef=1.0 needs success_cutoff"):
        RPD("MlpPolicy", None, reward_ppo_coef=1.0, _init_setup_model=False)
    with pytest.raises(ValueError, match="reward_ppo_coef=-1 must not be negative"):
        RPD("MlpPolicy", None, success_cutoff=0.5, reward_ppo_coef=-1, _init_setup_model=False)


def make_rpd(**kwargs: Any) -> RPD:
    venv = VecTeacher(DummyVecEnv([lambda: CountingEnv(reward=lambda action: action[0])]), EchoTeacher())
    decay = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.5}}
    settings: dict[str, Any] = {"n_steps": 8, "batch_size": 4, "n_epochs": 1, "policy_kwargs": decay, "device": "cpu"}
    return RPD("MlpPolicy", venv, seed=0, **settings, **kwargs)


def test_the_reward_waits_for_its_time_also_at_a_high_success_rate() -> None:
    curriculum = Curriculum(1.0, 0.0, reward_from=100)
    curriculum.set_hand_over(HandOver("success", 0.5, returns=True))
    for timesteps, leads in ((0, False), (99, False), (100, True), (101, True)):
        curriculum.update(timesteps, 0.5, 0.9)
        assert curriculum.reward_leads == leads
    with pytest.raises(ValueError, match="reward_from=-1 must not be negative"):
        make_rpd(reward_from=-1)
    with pytest.raises(ValueError, match=r"RPD: reward_from=8 needs a hand-over"):
        make_rpd(reward_from=8).learn(8)


def test_frozen_modules_learn_from_imitation_alone() -> None:
    model = make_rpd(reward_freezes=["mlp_extractor.policy_net"])
    model.curriculum.set_hand_over(HandOver("step", 8))

    def changed() -> set[str]:
        before = {name: values.clone() for name, values in model.policy.named_parameters()}
        model.learn(8, reset_num_timesteps=False)
        after = dict(model.policy.named_parameters())
        return {name.rpartition(".")[0] or name for name in before if not th.equal(before[name], after[name])}

    everything = changed()
    assert not model.curriculum.reward_leads
    frozen = {"mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2"}
    assert frozen | {"action_net"} < everything
    rest = changed()
    assert model.curriculum.reward_leads
    assert rest == everything - frozen
    model.curriculum.reward_leads = False
    model.curriculum.hand_over = HandOver("success", 0.5)
    assert changed() == everything


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"RPD: reward_freezes names 'cnn', .* are features_extractor, .*action_net"):
        make_rpd(reward_freezes=["cnn"])
    with pytest.raises(ValueError, match=r"RPD: reward_freezes=\('action_net',\) needs a hand-over"):
        make_rpd(reward_freezes=["action_net"]).learn(8)


def test_the_reward_explores_in_its_own_way() -> None:
    model = make_rpd(reward_log_std=-3.0, learning_rate=1e-9)
    model.policy.optimizer.param_groups[0]["weight_decay"] = 0.0
    model.curriculum.set_hand_over(HandOver("step", 8))
    for log_std in (0.0, -3.0):
        model.learn(8, reset_num_timesteps=False)
        assert model.policy.log_std.tolist() == pytest.approx([log_std, log_std], abs=1e-6)
    model.curriculum.hand_over = HandOver("success", 0.5, returns=True)
    model.ep_success_buffer.extend([0.0] * 100)  # type: ignore[union-attr]
    model.learn(8, reset_num_timesteps=False)
    assert model.policy.log_std.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    with pytest.raises(ValueError, match=r"RPD: reward_log_std=-1.0 needs a hand-over"):
        make_rpd(reward_log_std=-1.0).learn(8)


@pytest.mark.parametrize(
    "key", ["reward_learning_rate", "clip_range_high", "success_cutoff", "label_fraction", "replay_batch_size"]
)
@pytest.mark.parametrize("value", [0, -1])
def test_what_must_be_positive_may_not_be_zero_either(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{key}.*{value}"):
        RPD("MlpPolicy", None, **{key: value}, _init_setup_model=False)


def test_cosine_schedule_falls_from_its_start_to_zero() -> None:
    schedule = CosineSchedule(2.0)
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([2.0, 1.0, 0.0])
