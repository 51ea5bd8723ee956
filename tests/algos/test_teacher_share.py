"""Training where the teacher finishes a share of the episodes: what is learnt from whose transitions."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import GRPO, OPD, PPD, ROAD, RPD
from rpd_sb3.algos.buffers import LabelledRolloutBuffer
from rpd_sb3.algos.curriculum import Curriculum, HandOver
from rpd_sb3.contract.teacher import EXECUTED_ACTION, TEACHER_ACTED
from rpd_sb3.labelling import TeacherWrapper, VecTeacher
from rpd_sb3.students import TokenPolicy
from rpd_sb3.teachers import Query
from tests.support.helpers import ACTION_SPACE, CountingEnv, EchoTeacher
from tests.support.token_helpers import SMALL as TOKENS
from tests.support.token_helpers import (
    GaussianTeacher,
    TokenTeacher,
    collected,
    gradients,
    make_venv,
    peaked,
    rough,
    same_parameters,
    whole_rollout,
)

SMALL: dict[str, Any] = {"n_steps": 16, "batch_size": 16, "n_epochs": 2, "device": "cpu", "seed": 0}


def bent(query: Query) -> np.ndarray:
    """Beyond the bounds of actions in every episode."""
    return query.inputs["state"][:, 1:3] / 2


class Counted(CountingEnv):
    """Each step is rewarded by 1, and successful in environments of odd numbers."""

    def step(self, action: np.ndarray) -> Any:
        obs, _, terminated, truncated, info = super().step(action)
        return obs, 1.0, terminated, truncated, info | {"is_success": bool(self.number % 2)}


def counted(n: int = 4, **kwargs: Any) -> VecTeacher:
    envs = DummyVecEnv([lambda i=i: Monitor(Counted(number=i, length=3 + i)) for i in range(n)])
    return VecTeacher(envs, EchoTeacher(bent), **({"take_over_steps": 3} | kwargs))


def rpd(**kwargs: Any) -> Any:
    return RPD("MlpPolicy", counted(), **{**SMALL, "teacher_share": 0.5, **kwargs})


def test_actions_of_the_teacher_are_those_that_were_executed() -> None:
    model = collected(rpd(label_replay=100))
    buffer = model.rollout_buffer
    assert 0.2 < buffer.teacher_acted.mean() < 0.8
    labels = buffer.observations[..., 1:3] / 2
    np.testing.assert_array_equal(buffer.labels["action"], labels)
    acted = buffer.teacher_acted
    np.testing.assert_array_equal(buffer.actions[acted], labels[acted].clip(-1, 1))
    assert (buffer.actions[~acted] != labels[~acted].clip(-1, 1)).any(axis=1).all()
    assert model.logger.name_to_value["rollout/teacher_share"] == acted.mean()
    observations, replayed = model.label_replay_buffer.sample(50)
    np.testing.assert_array_equal(replayed["action"], observations[:, 1:3] / 2)
    for batch in buffer.get(16):
        assert th.equal(batch.labels["action"], batch.observations[:, 1:3] / 2)
        own = (batch.actions != batch.labels["action"].clamp(-1, 1)).any(dim=1)
        assert th.equal(batch.teacher_acted, ~own)


@pytest.mark.parametrize("clip_range_vf", [None, 0.01])
def test_losses_are_those_of_the_students_transitions_alone(clip_range_vf: float | None) -> None:
    model = collected(rpd(ent_coef=0.1, clip_range_vf=clip_range_vf))
    model._current_progress_remaining = 1.0
    with th.no_grad():  # a policy that has moved, so that the ratio is not 1 and the clip binds
        for parameter in model.policy.parameters():
            parameter += 0.1 * th.randn_like(parameter)
    batch = next(model.rollout_buffer.get(32))
    own = ~batch.teacher_acted
    assert 3 < own.sum() < 29
    alone = batch._replace(
        **{name: getattr(batch, name)[own] for name in batch._fields if name not in ("labels", "replayed")}
    )
    parameters = list(model.policy.parameters())
    found, expected = defaultdict(list), defaultdict(list)
    for loss, wanted in zip(model._ppo_losses(batch, found)[1:], model._ppo_losses(alone, expected)[1:]):
        assert th.as_tensor(loss).item() == pytest.approx(th.as_tensor(wanted).item(), rel=1e-5)
        if isinstance(loss, th.Tensor):
            ours, theirs = (
                th.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, wanted)
            )
            for a, b in zip(ours, theirs):
                assert (a is None) == (b is None)
                if a is not None:
                    th.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert found.keys() == expected.keys()
    assert found == {name: pytest.approx(values, rel=1e-5) for name, values in expected.items()}


def test_a_minibatch_of_the_teachers_alone_has_losses_of_zero() -> None:
    model = collected(rpd())
    batch = next(model.rollout_buffer.get(16))
    batch = batch._replace(teacher_acted=th.ones(16, dtype=th.bool))
    student, surrogate, value_loss, approx_kl = model._ppo_losses(batch, defaultdict(list))
    assert (surrogate.item(), value_loss.item(), approx_kl) == (0.0, 0.0, 0.0)
    (surrogate + value_loss).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.policy.parameters())
    loss, _ = model.distill_loss(batch, student)
    assert loss.item() > 0


def test_when_the_teacher_does_everything_nothing_but_imitation_is_learnt() -> None:
    venv = counted(take_over_at_start=1.0)
    model = RPD("MlpPolicy", venv, teacher_share=1.0, **SMALL).learn(128)
    assert model.rollout_buffer.teacher_acted.all()
    logged = model.logger.name_to_value
    assert "train/policy_gradient_loss" not in logged
    assert logged["train/distill_loss"] > 0
    assert np.isfinite(list(logged.values())).all()
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())
    critic = model.policy.value_net.state_dict()
    untrained = RPD("MlpPolicy", venv, **SMALL).policy.value_net.state_dict()
    assert all(th.equal(value, untrained[name]) for name, value in critic.items())


def test_gae_of_the_student_ends_at_the_take_over_with_the_value_there() -> None:
    """By hand: gamma 0.5, lambda 0.5; the episode of the first environment ends with step 3, the teacher acts in 2 and 3."""
    box = spaces.Box(-1, 1, (1,))
    buffer = LabelledRolloutBuffer(5, box, box, gamma=0.5, gae_lambda=0.5, n_envs=2)
    values = [[1, 1], [2, 2], [4, 4], [8, 8], [16, 16]]
    acted = [[False] * 2] * 2 + [[True, False]] * 2 + [[False, True]]
    starts = [[True, True], [False] * 2, [False] * 2, [False] * 2, [True, False]]
    for value, here, start in zip(values, acted, starts):
        buffer.add_labels([{TEACHER_ACTED: a, EXECUTED_ACTION: np.ones(1)} for a in here], frozenset())
        tensor = th.tensor(value, dtype=th.float32)
        buffer.add(np.zeros((2, 1)), np.zeros((2, 1)), np.ones(2), np.array(start), tensor, th.zeros(2))
    buffer.compute_returns_and_advantage(th.tensor([32.0, 32.0]), np.zeros(2, dtype=bool))
    # delta_t = 1 + v_{t+1} / 2 - v_t, A_t = delta_t + A_{t+1} / 4
    first = [1 + 1 - 1 + (1 + 2 - 2) / 4, 1 + 2 - 2, 0, 0, 1 + 16 - 16]
    a3 = 1 + 8 - 8  # the take-over is at step 4
    a2 = 1 + 4 - 4 + a3 / 4
    a1 = 1 + 2 - 2 + a2 / 4
    second = [1 + 1 - 1 + a1 / 4, a1, a2, a3, 0]
    np.testing.assert_allclose(buffer.advantages, np.array([first, second]).T, rtol=1e-6)
    np.testing.assert_allclose(buffer.returns, buffer.advantages + np.array(values), rtol=1e-6)
    np.testing.assert_array_equal(buffer.rewards, np.ones((5, 2)))
    np.testing.assert_array_equal(buffer.episode_starts, starts)


def test_episodes_that_the_teacher_helped_with_do_not_count_as_the_students() -> None:
    ends: list[tuple[bool, bool]] = []

    class Watched(RPD):
        def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
            super()._update_info_buffer(infos, dones)
            ends.extend((info["teachers_episode"], info["is_success"]) for info in infos if "episode" in info)

    model = Watched("MlpPolicy", counted(), teacher_share=0.5, **SMALL)
    model.learn(256)
    own = [success for teachers, success in ends if not teachers]
    assert 5 < len(own) < len(ends) - 5
    assert list(model.ep_success_buffer) == own
    assert len(model.ep_info_buffer) == len(own)


def test_the_reward_that_leads_lets_the_student_act_alone() -> None:
    model = rpd(success_cutoff=0.4, teacher_share=0.3)
    model.learn(256)
    assert model.curriculum.reward_leads
    assert model.env.teacher_share == model.curriculum.teacher_share == 0.0
    assert not model.rollout_buffer.teacher_acted.any()


def test_the_share_follows_its_schedule_while_imitation_leads() -> None:
    curriculum = Curriculum(1.0, 1.0, teacher_share=LinearSchedule(1.0, 0.0, 0.6))
    curriculum.set_hand_over(HandOver("success", 0.5, returns=True))
    shares = []
    for progress, rate in ((1.0, None), (0.7, 0.1), (0.7, 0.6), (0.7, 0.1), (0.4, 0.1), (0.1, 0.1)):
        curriculum.update(0, progress, rate)
        shares.append(curriculum.teacher_share)
    assert shares == pytest.approx([1.0, 0.5, 0.0, 0.5, 0.0, 0.0])


def test_without_imitation_the_teacher_does_not_act() -> None:
    curriculum = Curriculum(LinearSchedule(1.0, 0.0, 0.5), 1.0, teacher_share=0.5)
    shares = []
    for progress in (1.0, 0.6, 0.5):
        curriculum.update(0, progress, None)
        shares.append(curriculum.teacher_share)
    assert shares == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), LinearSchedule(2.0, 0.0, 1.0)])
def test_a_share_lies_between_0_and_1(share: Any) -> None:
    with pytest.raises(ValueError, match=r"teacher_share=.* must lie between 0 and 1"):
        rpd(teacher_share=share)


def test_a_curriculum_saved_before_there_was_a_share_has_none(tmp_path: Path) -> None:
    model = rpd(teacher_share=0.5)
    for name in ("shares", "teacher_share"):
        vars(model.curriculum).pop(name, None)
    model.save(tmp_path / "model")
    loaded = RPD.load(tmp_path / "model", env=counted()).learn(64)
    assert not loaded.rollout_buffer.teacher_acted.any()


def test_a_share_is_saved_with_the_model(tmp_path: Path) -> None:
    rpd(teacher_share=LinearSchedule(1.0, 0.0, 0.6)).save(tmp_path / "model")
    loaded = RPD.load(tmp_path / "model", env=counted())
    assert loaded.curriculum.shares(0.7) == pytest.approx(0.5)
    assert loaded.learn(64).rollout_buffer.teacher_acted.any()


def test_a_wrapper_of_one_environment_does_not_act() -> None:
    venv = DummyVecEnv([lambda: TeacherWrapper(CountingEnv(), EchoTeacher())])
    with pytest.raises(ValueError, match="RPD: teacher_share needs a VecTeacher around the VecEnv"):
        RPD("MlpPolicy", venv, teacher_share=0.5, **SMALL)


def test_a_teacher_that_cannot_act_is_refused_before_training() -> None:
    venv = make_venv(TokenTeacher(labels=frozenset({"logits"})))
    with pytest.raises(ValueError, match=r"teacher .* cannot act: it gives the labels \['logits'\] and no 'action'"):
        OPD(TokenPolicy, venv, teacher_share=0.5, **TOKENS)
    with pytest.raises(ValueError, match="no time limit"):
        RPD("MlpPolicy", counted(take_over_steps=None), teacher_share=0.5, **SMALL)


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "message"),
    [
        (
            GRPO,
            {"group_size": 2, "teacher_share": 0.5},
            r"GRPO: teacher_share=0\.5 is for a teacher's labels, and GRPO asks none",
        ),
        (GRPO, {"group_size": 2, "label_replay": 10}, "GRPO: label_replay=10 is for a teacher's labels"),
        (GRPO, {"group_size": 2, "label_fraction": 0.5}, r"GRPO: label_fraction=0\.5 is for a teacher's labels"),
        (ROAD, {"alpha": 0.0, "teacher_share": 0.5}, r"ROAD: teacher_share=0\.5 is for a teacher's labels"),
        (GRPO, {"group_size": 2, "image_shift": 2}, "GRPO: image_shift=2 is for a teacher's labels"),
        (ROAD, {"alpha": 0.0, "image_shift": 2}, "ROAD: image_shift=2 is for a teacher's labels"),
    ],
)
def test_algorithms_that_ask_no_teacher_refuse_what_is_for_one(
    algorithm: Any, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(TokenPolicy, make_venv(), **kwargs, **TOKENS)


def acting(teacher: Any, **kwargs: Any) -> VecTeacher:
    """A venv of :func:`make_venv` whose teacher takes over at once, or within two steps."""
    return VecTeacher(make_venv(**kwargs), teacher, take_over_steps=2)


TOKEN_LABELS = frozenset({"action", "logits"})


def opd(**kwargs: Any) -> Any:
    venv = acting(TokenTeacher(rough, labels=TOKEN_LABELS), reward=1.0)
    return OPD(TokenPolicy, venv, **{**TOKENS, "teacher_share": 0.5, "teacher_floor": 0.0, **kwargs})


def test_opd_imitates_the_teachers_tokens_on_its_own_tokens() -> None:
    model = collected(peaked(opd()))
    batch, student, surrogate = whole_rollout(model)
    acted = batch.teacher_acted
    assert 4 < acted.sum() < 28
    greedy = th.as_tensor(rough(batch.observations.numpy())).argmax(2)
    assert th.equal(batch.actions[acted].long(), greedy[acted])
    loss, logs = model.distill_loss(batch, student)
    _, without = model.distill_loss(batch._replace(labelled=batch.labelled & ~acted), student)
    assert loss.item() == pytest.approx(logs["reverse_kl"] * 2, rel=1e-4)
    assert logs["reverse_kl"] != without["reverse_kl"], "the teacher's states are imitated"
    assert logs["k3"] == without["k3"], "an estimate from the student's samples"
    assert surrogate.item() == 0.0


def test_a_sampled_estimate_is_of_the_students_transitions_alone() -> None:
    model = collected(peaked(opd(estimator="sampled")))
    model.prepare_rollout()
    batch, student, surrogate = whole_rollout(model)
    own = ~batch.teacher_acted
    policy_gradient = -(batch.advantages * student.log_prob)[own].mean()
    for ours, expected in zip(gradients(surrogate, model), gradients(policy_gradient, model)):
        th.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kwargs", [{}, {"estimator": "sampled"}, {"group_size": 2, "then": "grpo"}])
def test_opd_trains_while_the_teacher_acts(kwargs: dict[str, Any]) -> None:
    model = opd(**kwargs).learn(96)
    assert model.rollout_buffer.teacher_acted.any()
    assert not same_parameters(model, opd(**kwargs))
    assert all(th.isfinite(parameter).all() for parameter in model.policy.parameters())


def test_ppd_weighs_the_kl_once_where_the_teacher_acted() -> None:
    teacher = GaussianTeacher(lambda points: (0.5 * points, np.full_like(points, 0.3)))
    model: Any = PPD("MlpPolicy", acting(teacher, tokens=False), teacher_share=0.5, **TOKENS)
    batch, student, _ = whole_rollout(collected(model))
    moved = student._replace(log_prob=student.log_prob + 1.0)
    acted = batch.teacher_acted
    assert 4 < acted.sum() < 28
    ratio = th.where(acted, 1.0, np.e)
    ones, _ = model.distill_loss(batch._replace(old_log_prob=student.log_prob.detach()), student)
    kl = [
        model.distill_loss(
            batch._replace(old_log_prob=student.log_prob.detach(), labelled=th.arange(len(acted)) == i), student
        )[0].item()
        for i in range(len(acted))
    ]
    assert ones.item() == pytest.approx(np.mean(kl), rel=1e-5)
    loss, _ = model.distill_loss(batch._replace(old_log_prob=student.log_prob.detach()), moved)
    assert loss.item() == pytest.approx((ratio * th.tensor(kl)).mean().item(), rel=1e-4)


ROOMS = 12
HALF = ROOMS // 2


def right_actions(obs: np.ndarray) -> np.ndarray:
    """In the first half the target itself, in the second half its negative with swapped coordinates.

    :param obs: ``(n, 3)``
    """
    return np.where(obs[:, :1] < 0, obs[:, 1:], -obs[:, :0:-1])


class Corridor(gym.Env):
    """Twelve rooms in 20 steps: an action within 0.2 of the right one opens the next room, another one in the first half
    leads back to the first. Observation: -1 in the first half, 1 in the second, and the room's target, drawn anew at each step.
    """

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        self.action_space = ACTION_SPACE

    def _observe(self) -> np.ndarray:
        half = -1.0 if self.room < HALF else 1.0
        self.obs = np.array([half, *self.np_random.uniform(-0.8, 0.8, 2)], np.float32)
        return self.obs

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.room = self.t = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        right = np.abs(action - right_actions(self.obs[None])[0]).max() < 0.2
        self.room = self.room + 1 if right else 0 if self.room < HALF else self.room
        self.t += 1
        through = self.room == ROOMS
        return self._observe(), 0.0, through, self.t == 20, {"is_success": through}


def success(model: RPD, n_episodes: int = 50) -> float:
    """Share of episodes in which the deterministic policy gets through."""
    env, n = Corridor(), 0
    for seed in range(n_episodes):
        obs, _ = env.reset(seed=1000 + seed)
        over = False
        while not over:
            obs, _, terminated, truncated, _ = env.step(model.predict(obs, deterministic=True)[0])
            over = terminated or truncated
            n += terminated
    return n / n_episodes


@pytest.mark.parametrize(
    ("share", "learns"), [(LinearSchedule(1.0, 0.0, 0.6), True), (0.0, False)], ids=["acting", "labels alone"]
)
def test_what_the_student_does_not_reach_is_learnt_only_if_the_teacher_acts(share: Any, learns: bool) -> None:
    """The baseline is RPD with the same labels on the student's own transitions alone: its exploration noise does not get
    through the first half, six right actions in a row, so that nothing of the second half is ever labelled.
    """
    envs = DummyVecEnv([Corridor] * 8)
    venv = VecTeacher(envs, EchoTeacher(lambda query: right_actions(query.inputs["state"])), take_over_steps=8)
    model = RPD(
        "MlpPolicy",
        venv,
        teacher_share=share,
        label_replay=10_000,
        replay_batch_size=128,
        n_steps=32,
        batch_size=64,
        n_epochs=4,
        learning_rate=LinearSchedule(3e-3, 3e-4, 1.0),
        advantage_std_floor=1.0,
        policy_kwargs={"log_std_init": -1.0},
        seed=0,
        device="cpu",
    ).learn(4096)
    assert success(model) > 0.8 if learns else success(model) < 0.2
