"""The scripted experts and the teacher made of them. Success is measured on episodes with fixed seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rpd_sb3.contract.privileged import field_slices
from rpd_sb3.contract.teacher import Query
from rpd_sb3.teachers.scripted.experts import CUBE, EXPERTS
from rpd_sb3.teachers.scripted.motion import (
    METRES_PER_UNIT,
    REACH,
    multiply,
    pointing_down,
    rotate,
    turn_to,
    unpack,
)
from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher
from tests.support.privileged_states import random_states

FIRST_SEED = 10_000
DOWN = (0.0, 1.0, 0.0, 0.0)
LYING = (1.0, 0.0, 0.0, 0.0)

# Share of 100 episodes that must succeed within the time limit; measured: 100 % on every task.
FLOORS = {
    "LiftPegUpright-v1": 0.9,
    "PickCube-v1": 0.95,
    "PokeCube-v1": 0.8,
    "PullCube-v1": 0.95,
    "PullCubeTool-v1": 0.8,
    "PushCube-v1": 0.95,
    "RollBall-v1": 0.95,
    "StackCube-v1": 0.95,
}


def query(privileged: np.ndarray) -> Query:
    n = len(privileged)
    return Query({"privileged": privileged}, np.arange(n), np.zeros(n, bool))


def label(teacher: ScriptedTeacher, privileged: np.ndarray) -> np.ndarray:
    return teacher.label(query(privileged))["action"]


def state(
    tcp: tuple[float, float, float] = (0.6, 0.0, 0.02),
    opening: float = 0.04,
    thing: tuple[float, float, float] = (0.6, 0.0, 0.02),
    tool: tuple[float, float, float] = (0.0, 0.0, 0.0),
    goal: tuple[float, float, float] = (0.6, 0.0, 0.02),
) -> np.ndarray:
    """One state (1, S) with the hand pointing down and everything lying straight."""
    parts = [*tcp, *DOWN, opening, *thing, *LYING, 0.0, 0.0, 0.0, *tool, *LYING, *goal]
    return np.array([parts], np.float32)


HELD_AT_GOAL = state(opening=CUBE)
"""Nothing to do in PickCube but to keep hold: the answer is (0, 0, 0, 0, 0, 0, -1)."""


def success(env_id: str, seeds: range, random_steps: int = 0, blur: float = 0.0) -> float:
    """Share of episodes that succeed when the teacher acts, after some random steps.

    :param blur: std of how far off, in metres, the object lies each time for the teacher in x and in y
    """
    pytest.importorskip("mani_skill")
    from rpd_sb3.envs.factory import make_env

    teacher = ScriptedTeacher(env_id)
    env = make_env(env_id, teacher=teacher.spec)
    rng = np.random.default_rng(0)
    successes = 0
    for seed in seeds:
        obs, _ = env.reset(seed=seed)
        info: dict[str, Any] = {}
        for t in range(1000):
            seen = obs["teacher/privileged"].copy()
            seen[field_slices()["object_pose"]][:2] += rng.normal(0.0, blur, 2)
            action = label(teacher, seen[None])[0]
            if t < random_steps:
                action = rng.uniform(-1, 1, action.shape).astype(np.float32)
            obs, _, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
        successes += info["success_once"]
    env.close()
    teacher.close()
    return successes / len(seeds)


@pytest.mark.slow
@pytest.mark.parametrize("env_id", sorted(FLOORS))
def test_expert_reaches_its_success_floor(env_id: str) -> None:
    assert success(env_id, range(FIRST_SEED, FIRST_SEED + 100)) >= FLOORS[env_id]


@pytest.mark.parametrize("env_id", ["PickCube-v1", "PushCube-v1", "LiftPegUpright-v1"])
def test_expert_succeeds_on_a_few_episodes(env_id: str) -> None:
    assert success(env_id, range(FIRST_SEED, FIRST_SEED + 5)) == 1.0


def test_expert_recovers_after_fifteen_random_steps() -> None:
    assert success("PickCube-v1", range(FIRST_SEED, FIRST_SEED + 5), random_steps=15) >= 0.8


def test_the_ball_is_rolled_into_the_goal_also_by_who_sees_it_a_centimetre_aside() -> None:
    assert success("RollBall-v1", range(FIRST_SEED, FIRST_SEED + 10), blur=0.014) >= 0.8


def test_every_task_has_an_expert() -> None:
    tasks = pytest.importorskip("rpd_sb3.envs.tasks")
    assert set(EXPERTS) == set(tasks.TASKS) == set(FLOORS)


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_batch_equals_single_queries(env_id: str) -> None:
    teacher, states = ScriptedTeacher(env_id), random_states(37)
    singles = np.concatenate([label(teacher, states[i : i + 1]) for i in range(len(states))])
    np.testing.assert_array_equal(label(teacher, states), singles)


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_answer_does_not_depend_on_earlier_queries(env_id: str) -> None:
    teacher, states = ScriptedTeacher(env_id), random_states(8)
    before = label(teacher, states)
    label(teacher, random_states(5, seed=1))
    np.testing.assert_array_equal(label(teacher, states), before)
    np.testing.assert_array_equal(states, random_states(8), "the query is left alone")
    assert not teacher.spec.stateful


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_expert_acts_within_the_action_space(env_id: str) -> None:
    actions = EXPERTS[env_id](unpack(random_states(500)))
    assert actions.shape == (500, 7)
    assert np.abs(actions).max() <= 1.0


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_label_is_in_the_action_space_of_the_spec(env_id: str) -> None:
    teacher = ScriptedTeacher(env_id, noise=2.0, bias=0.5)
    for action in label(teacher, random_states(100)):
        assert teacher.spec.action_space.contains(action)


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_label_is_finite_where_directions_vanish(env_id: str) -> None:
    nowhere = state(thing=(0.6, 0.0, 0.02), tool=(0.6, 0.0, 0.02))
    assert np.isfinite(label(ScriptedTeacher(env_id), np.concatenate([nowhere, 0 * nowhere]))).all()


def test_spec_says_what_the_environment_must_provide() -> None:
    spec = ScriptedTeacher("PickCube-v1").spec
    assert (spec.name, spec.labels, spec.inputs) == ("scripted", frozenset({"action"}), ("privileged",))
    assert (spec.env_id, spec.control_mode) == ("PickCube-v1", "pd_ee_delta_pose")


@pytest.mark.parametrize(
    ("options", "stochastic"),
    [
        ({"noise": 0.1}, True),
        ({"dropout": 0.1}, True),
        ({"n_samples": 2}, True),
        ({"bias": 0.1, "n_bins": 8, "detour": 0.1, "seed": 1}, False),
    ],
)
def test_spec_says_whether_answers_are_drawn(options: dict[str, Any], stochastic: bool) -> None:
    teacher = ScriptedTeacher("PickCube-v1", **options)
    assert teacher.spec.stochastic == stochastic
    first, second = (label(teacher, random_states(8)) for _ in range(2))
    assert np.array_equal(first, second) != stochastic


def test_closed_hand_low_beside_the_cube_opens_and_rises_first() -> None:
    action = label(ScriptedTeacher("PickCube-v1"), state(tcp=(0.5, 0.0, 0.02), opening=0.0))[0]
    assert action[6] == 1.0
    assert action[2] == 1.0
    np.testing.assert_allclose(action[:2], 0.0, atol=1e-6)


def test_open_hand_above_the_cube_goes_straight_down() -> None:
    action = label(ScriptedTeacher("PickCube-v1"), state(tcp=(0.6, 0.0, 0.1)))[0]
    np.testing.assert_allclose(action, [0, 0, -1, 0, 0, 0, 1], atol=1e-6)


def test_fingers_close_around_the_cube_before_it_is_carried() -> None:
    reached, closed = (
        label(ScriptedTeacher("PickCube-v1"), state(opening=opening, goal=(0.6, 0.0, 0.3)))[0]
        for opening in (0.04, CUBE)
    )
    np.testing.assert_allclose(reached[[2, 6]], [0, -1], atol=1e-6)
    np.testing.assert_allclose(closed[[2, 6]], [1, -1], atol=1e-6)


def test_cube_that_slipped_aside_between_the_fingers_counts_as_held() -> None:
    slipped = state(tcp=(0.6, 0.0, 0.3), opening=CUBE, thing=(0.622, 0.0, 0.305), goal=(0.622, 0.0, 0.2))
    action = label(ScriptedTeacher("PickCube-v1"), slipped)[0]
    np.testing.assert_allclose(action[[0, 1, 2, 6]], [0, 0, -1, -1], atol=1e-6)


def test_fingers_closed_on_nothing_beside_the_cube_open() -> None:
    action = label(ScriptedTeacher("PickCube-v1"), state(tcp=(0.57, 0.0, 0.02), opening=0.0))[0]
    assert action[6] == 1.0


def test_stacked_cube_is_let_go() -> None:
    stacked = state(tcp=(0.6, 0.0, 0.06), opening=CUBE, thing=(0.6, 0.0, 0.06), tool=(0.6, 0.0, 0.02))
    assert label(ScriptedTeacher("StackCube-v1"), stacked)[0, 6] == 1.0


def test_arm_is_never_sent_beyond_its_reach() -> None:
    action = label(ScriptedTeacher("PickCube-v1"), state(tcp=(0.75, 0.0, 0.1), thing=(1.2, 0.0, 0.02)))[0]
    assert 0.75 + METRES_PER_UNIT * action[0] == pytest.approx(REACH)


def test_turn_leads_from_one_orientation_to_the_other() -> None:
    poses = unpack(random_states(50))
    turn = turn_to(poses.tcp_quat, poses.object_quat)
    angle = np.linalg.norm(turn, axis=-1, keepdims=True)
    rotation = np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * turn / angle], axis=-1)
    reached = multiply(rotation, poses.tcp_quat)
    np.testing.assert_allclose(np.abs(np.sum(reached * poses.object_quat, axis=-1)), 1.0, atol=1e-6)
    assert angle.max() <= np.pi + 1e-6


def test_tilt_leans_the_fingertips_outwards() -> None:
    fingers = rotate(pointing_down(np.array([0.3]), tilt=0.2), np.array([[0.0, 0.0, 1.0]]))
    np.testing.assert_allclose(fingers, [[np.sin(0.2), 0.0, -np.cos(0.2)]], atol=1e-12)


def test_bias_is_added_to_the_experts_action_and_one_number_to_its_translations() -> None:
    for bias, moved in (([0.1, -0.2, 0.3, 0.0, 0.05, 0.0, 0.5],) * 2, (0.25, [0.25, 0.25, 0.25, 0, 0, 0, 0])):
        action = label(ScriptedTeacher("PickCube-v1", bias=bias), HELD_AT_GOAL)
        np.testing.assert_allclose(action[0], np.add([0, 0, 0, 0, 0, 0, -1], moved), atol=1e-6)


def test_noise_has_the_mean_and_std_asked_for() -> None:
    noise = label(ScriptedTeacher("PickCube-v1", noise=0.2), HELD_AT_GOAL.repeat(20_000, axis=0))[:, :6]
    np.testing.assert_allclose(noise.mean(axis=0), 0.0, atol=0.006)  # 4 standard errors
    np.testing.assert_allclose(noise.std(axis=0), 0.2, atol=0.004)


def test_noise_follows_from_the_seed() -> None:
    same, again, other = (
        label(ScriptedTeacher("PickCube-v1", noise=0.2, seed=seed), HELD_AT_GOAL) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(same, again)
    assert not np.array_equal(same, other)


def test_dropout_holds_still_and_keeps_the_gripper() -> None:
    states = random_states(200)
    action = label(ScriptedTeacher("PickCube-v1", dropout=1.0, noise=0.0, bias=0.3), states)
    np.testing.assert_array_equal(action[:, :6], 0.0)
    np.testing.assert_array_equal(action[:, 6], label(ScriptedTeacher("PickCube-v1"), states)[:, 6])


def test_dropout_strikes_as_often_as_asked() -> None:
    action = label(ScriptedTeacher("PickCube-v1", dropout=0.3, bias=0.5), HELD_AT_GOAL.repeat(10_000, axis=0))
    assert np.mean(action[:, 0] == 0.0) == pytest.approx(0.3, abs=0.02)


def test_unknown_task_names_the_closest() -> None:
    with pytest.raises(ValueError, match="did you mean 'PickCube-v1'"):
        ScriptedTeacher("PickCub-v1")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"noise": -0.1}, "noise=-0.1 must be a finite std"),
        ({"noise": float("inf")}, "noise=inf must be a finite std"),
        ({"dropout": 1.1}, "dropout=1.1 must be a probability"),
        ({"dropout": float("nan")}, "dropout=nan must be a probability"),
        ({"bias": [0.1] * 3}, r"bias=.* must be one finite number .* or 7"),
        ({"bias": float("nan")}, r"bias=nan must be one finite number .* or 7"),
        ({"n_bins": 1}, "^n_bins=1 must be at least 2$"),
        ({"std": 0.0}, "^std=0.0 and std_floor=0.02 must be positive"),
        ({"std_floor": float("nan")}, "std_floor=nan must be positive"),
        ({"detour": float("inf")}, "detour=inf a finite number$"),
        ({"n_samples": 1}, "^n_samples=1 must be 0, or at least 2: one sample has no std$"),
        ({"n_samples": -2}, "^n_samples=-2 must be 0, or at least 2"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScriptedTeacher("PickCube-v1", **kwargs)
