"""From a teacher's conventions to the environment's: gripper, rotation, and what tokens stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.contract.bins import Bounds, centres, to_actions, to_tokens
from rpd_sb3.contract.conventions import ActionAdapter, convert_token_bounds
from rpd_sb3.contract.teacher import GRIPPERS
from rpd_sb3.envs import ActionTokens, make_env
from rpd_sb3.labelling import TeacherWrapper, VecTeacher
from rpd_sb3.teachers import TeacherSpec
from tests.support.arm_env import ARM, GRIPPER_FROM_0, HIGH, LOW, UNIT_BOX, ArmEnv, ArmTeacher

TOKENS = spaces.MultiDiscrete([256] * 7)
ENVS = {"-1..1": UNIT_BOX, "0..1": GRIPPER_FROM_0, "tokens": TOKENS}
WANTED = {"-1..1": (-1.0, 1.0), "0..1": (0.0, 1.0), "tokens": (-1.0, 1.0)}
"""A closed and an open gripper of each kind of environment."""


def spec(space: spaces.Space = UNIT_BOX, **kwargs: Any) -> TeacherSpec:
    return TeacherSpec("arm", frozenset({"action"}), ("state",), space, **kwargs)


def moves(gripper: float = 0.5) -> np.ndarray:
    """One action, whose gripper is given."""
    return np.array([[0.1, -0.2, 0.3, -0.4, 0.5, 0.6, gripper]], np.float32)


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("gripper", GRIPPERS)
def test_a_gripper_is_closed_half_open_and_open_where_the_teacher_wants_it(gripper: str, env: str) -> None:
    adapter = ActionAdapter(spec(gripper=gripper), ENVS[env])
    closed, opened = GRIPPERS[gripper]
    wanted_closed, wanted_open = WANTED[env]
    for share in (0.0, 0.5, 1.0):
        label = adapter({"action": moves(closed + share * (opened - closed))})["action"]
        np.testing.assert_array_equal(label[:, :6], moves()[:, :6])
        assert label[0, 6] == wanted_closed + share * (wanted_open - wanted_closed)
        assert label.dtype == np.float32


@pytest.mark.parametrize("env", ENVS)
def test_without_a_convention_labels_are_the_very_same(env: str) -> None:
    labels = {"action": moves()}
    assert ActionAdapter(spec(), ENVS[env])(labels) is labels


def test_a_rotation_sign_negates_the_rotation_alone() -> None:
    label = ActionAdapter(spec(rotation_sign=-1), UNIT_BOX)({"action": moves()})["action"]
    np.testing.assert_array_equal(label, moves() * np.array([1, 1, 1, -1, -1, -1, 1], np.float32))


def test_stds_are_scaled_and_never_negative() -> None:
    adapter = ActionAdapter(spec(gripper="1..0", rotation_sign=-1), UNIT_BOX)
    std = np.full((2, 7), 0.25, np.float32)
    expected = [0.25] * 6 + [0.5]
    np.testing.assert_array_equal(adapter({"std": std})["std"], [expected, expected])


def test_logits_and_the_teachers_own_arrays_stay() -> None:
    action, logits = moves(), np.ones((1, 7, 256), np.float32)
    labels = ActionAdapter(spec(gripper="0..1"), TOKENS)({"action": action, "logits": logits})
    assert labels["logits"] is logits
    np.testing.assert_array_equal(action, moves())


def test_labels_are_not_clipped_but_actions_that_are_acted_with_are() -> None:
    adapter = ActionAdapter(spec(gripper="0..1"), UNIT_BOX)
    label = adapter({"action": moves(1.5)})["action"]
    assert label[0, 6] == 2.0
    assert adapter.clip(label)[0, 6] == 1.0
    assert np.isnan(adapter.clip(np.full((1, 7), np.nan))).all()


def test_tokens_of_a_teacher_that_acts_with_tokens_stay() -> None:
    adapter, tokens = ActionAdapter(spec(TOKENS, gripper="0..1"), TOKENS), np.full((1, 7), 200)
    assert adapter({"action": tokens})["action"] is tokens
    assert adapter.clip(tokens) is tokens


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (spec(gripper="open"), "'arm' has gripper='open'; choose one of -1..1"),
        (spec(rotation_sign=0), "'arm' has rotation_sign=0; choose 1 or -1"),
        (spec(spaces.Box(-1, 1, (4,)), rotation_sign=-1), "rotation_sign=-1, but its actions .* have no rotation"),
    ],
)
def test_conventions_that_do_not_exist_are_refused(wrong: TeacherSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ActionAdapter(wrong, UNIT_BOX)


# What tokens stand for


def bounds_of(**kwargs: Any) -> Bounds:
    bounds = convert_token_bounds(spec(n_bins=256, **kwargs))
    assert bounds is not None
    return bounds


def test_bounds_are_in_the_environments_conventions() -> None:
    low, high = bounds_of(token_bounds=(LOW, HIGH), gripper="0..1", rotation_sign=-1)
    np.testing.assert_array_equal(low, [-0.5, -2.0, 0.1, 0.3, 0.4, 0.5, -3.0])
    np.testing.assert_array_equal(high, [0.5, 1.5, 0.7, -0.2, -0.4, -1.5, 1.0])


@pytest.mark.parametrize("kwargs", [{}, {"gripper": "-1..1"}, {"gripper": None, "rotation_sign": 1}])
def test_a_teacher_with_the_environments_conventions_needs_no_bounds(kwargs: dict[str, Any]) -> None:
    assert convert_token_bounds(spec(n_bins=256, **kwargs)) is None


def test_a_teacher_without_tokens_has_no_bounds() -> None:
    assert convert_token_bounds(spec(token_bounds=(LOW, HIGH))) is None


@pytest.mark.parametrize("gripper", ["0..1", "1..0", "1..-1"])
def test_a_gripper_of_its_own_is_enough_for_bounds(gripper: str) -> None:
    closed, opened = GRIPPERS[gripper]
    decoded = to_actions(to_tokens(np.array([[0.0] * 6 + [closed], [0.0] * 6 + [opened]]), 256), 256)
    tokens = to_tokens(decoded, 256)
    acted = to_actions(tokens, 256, bounds_of(gripper=gripper))[:, 6]
    np.testing.assert_allclose(acted, [-1.0, 1.0], rtol=0, atol=2 / 255 + 1e-6)


def test_the_middle_token_of_a_gripper_that_is_not_normalized_is_closed() -> None:
    """Mask False: bins over [-1, 1], of which the data only ever used 0 (closed) to 1 (open)."""
    bounds = bounds_of(token_bounds=(LOW, HIGH), gripper="0..1")
    env = ActionTokens(ArmEnv(), bounds=bounds)
    middle = int(np.flatnonzero(centres(256) == 0.0)[0])
    assert [env.action(np.full(7, token))[6] for token in (0, middle, 254, 255)] == pytest.approx(
        [-1.0, -1.0, 0.992157, 0.992157], abs=1e-6
    )


def test_the_bounds_of_a_teacher_that_acts_with_tokens_are_converted_as_well() -> None:
    continuous, tokens = (
        convert_token_bounds(spec(space, n_bins=256, token_bounds=(LOW, HIGH), gripper="0..1", rotation_sign=-1))
        for space in (UNIT_BOX, TOKENS)
    )
    np.testing.assert_array_equal(continuous, tokens)


@pytest.mark.parametrize("wrong", [(LOW[:6], HIGH[:6]), (LOW, (np.inf,) * 7), ((-1.0,), (1.0,))])
def test_bounds_that_do_not_fit_the_actions_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="'arm' has token_bounds=.*: expected two rows of finite numbers"):
        convert_token_bounds(spec(n_bins=256, token_bounds=wrong))


def test_tokens_decode_to_scaled_centres_clipped_to_what_the_environment_takes() -> None:
    env = ActionTokens(ArmEnv(), 5, Bounds(np.full(7, -2.0), np.full(7, 0.4)))  # centres -1.7, -1.1, -0.5, 0.1, 0.1
    assert env.action_space == spaces.MultiDiscrete([5] * 7)
    np.testing.assert_allclose(env.action(np.array([0, 1, 2, 3, 4, 2, 2])), [-1, -1, -0.5, 0.1, 0.1, -0.5, -0.5])
    assert env.action(np.zeros(7, int)).dtype == np.float32


@pytest.mark.parametrize("wrong", [(LOW[:6], HIGH[:6]), (LOW, (np.nan,) * 7), (["a"] * 7, HIGH)])
def test_action_tokens_refuse_bounds_that_do_not_fit(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"(?s)bounds=.* must be two finite arrays of shape \(7,\)"):
        ActionTokens(ArmEnv(), bounds=Bounds(*wrong))


ends = st.lists(st.floats(-5, 5), min_size=3, max_size=3)
wide = st.tuples(ends, ends).filter(lambda two: all(abs(a - b) > 0.01 for a, b in zip(*two)))


def as_bounds(two: tuple[list[float], list[float]]) -> Bounds:
    return Bounds(*map(np.array, two))


@settings(max_examples=50, deadline=None)
@given(wide, st.integers(2, 300))
def test_tokens_survive_a_round_trip_through_any_bounds(two: tuple[list[float], list[float]], n_bins: int) -> None:
    tokens, bounds = np.repeat(np.arange(n_bins)[:, None], 3, axis=1), as_bounds(two)
    again = to_tokens(to_actions(tokens, n_bins, bounds), n_bins, bounds)
    np.testing.assert_array_equal(again, np.minimum(tokens, n_bins - 2))


@settings(max_examples=50, deadline=None)
@given(wide, st.integers(2, 300), st.floats(0, 1))
def test_actions_survive_a_round_trip_up_to_half_a_bin(two: Any, n_bins: int, share: float) -> None:
    bounds = as_bounds(two)
    actions = bounds.low + share * (bounds.high - bounds.low)
    again = to_actions(to_tokens(actions, n_bins, bounds), n_bins, bounds)
    assert (np.abs(again - actions) <= np.abs(bounds.high - bounds.low) / (n_bins - 1) / 2 * (1 + 1e-3) + 1e-6).all()


def test_a_dimension_that_never_moves_has_one_action() -> None:
    bounds = Bounds(np.array([0.3, -1.0]), np.array([0.3, 1.0]))
    assert to_tokens(np.array([[7.0, -1.0]]), 5, bounds).tolist() == [[2, 0]]
    np.testing.assert_array_equal(to_actions(np.array([[0, 0], [4, 0]]), 5, bounds)[:, 0], np.float32([0.3, 0.3]))


# Environments


@pytest.mark.parametrize("options", [{"tokens": True}, {"tokens": 256}])
def test_make_env_takes_the_teachers_bounds(options: dict[str, Any]) -> None:
    env = make_env(ARM, teacher=ArmTeacher().spec, **options)
    assert env.action_space == TOKENS
    np.testing.assert_array_equal(env.get_wrapper_attr("token_bounds"), convert_token_bounds(ArmTeacher().spec))


def test_make_env_takes_bounds_that_are_written_out() -> None:
    env = make_env(ARM, tokens={"low": [-0.5] * 7, "high": [0.5] * 7, "n_bins": 16}, teacher=ArmTeacher().spec)
    assert env.action_space == spaces.MultiDiscrete([16] * 7)
    np.testing.assert_array_equal(env.get_wrapper_attr("token_bounds"), [[-0.5] * 7, [0.5] * 7])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({}, "high, low: expected low, high and perhaps n_bins"),
        ({"low": [-1.0] * 7, "hihg": [1.0] * 7}, "hihg: expected low, high and perhaps n_bins"),
        ({"low": [-1.0] * 7, "high": [1.0] * 7, "n_bins": "16"}, "n_bins='16' must be at least 2"),
    ],
)
def test_make_env_refuses_bounds_that_cannot_be_used(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env(ARM, tokens=wrong)


OTHER = "a token of teacher 'arm' stands for another action than one of the environment"


@pytest.mark.parametrize("bounds", [None, Bounds(np.array(LOW), np.array(HIGH))])
def test_tokens_that_stand_for_other_actions_are_refused(bounds: Bounds | None) -> None:
    with pytest.raises(ValueError, match=OTHER):
        VecTeacher(DummyVecEnv([lambda: ActionTokens(ArmEnv(), bounds=bounds)]), ArmTeacher())
    with pytest.raises(ValueError, match=OTHER):
        TeacherWrapper(ActionTokens(ArmEnv(), bounds=bounds), ArmTeacher())


def test_bounds_are_refused_where_the_teacher_has_none() -> None:
    teacher = ArmTeacher()
    teacher.spec = replace(teacher.spec, gripper=None, rotation_sign=1, token_bounds=None)
    with pytest.raises(ValueError, match=OTHER):
        VecTeacher(DummyVecEnv([lambda: ActionTokens(ArmEnv(), bounds=Bounds(*map(np.array, (LOW, HIGH))))]), teacher)


@pytest.mark.parametrize("wrap", [VecTeacher, TeacherWrapper])
def test_minus_one_and_one_written_out_are_what_they_are_by_default(wrap: Callable[..., Any]) -> None:
    teacher = ArmTeacher()
    teacher.spec = replace(teacher.spec, gripper=None, rotation_sign=1, token_bounds=None)
    env = ActionTokens(ArmEnv(), bounds=Bounds(np.full(7, -1.0), np.full(7, 1.0)))
    wrap(env if wrap is TeacherWrapper else DummyVecEnv([lambda: env]), teacher)
