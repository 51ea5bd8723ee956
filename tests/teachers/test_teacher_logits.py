"""A scripted teacher's token distributions and fitted Gaussians, against enumeration and closed forms."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from rpd_sb3.contract.bins import centres, to_actions, to_tokens
from rpd_sb3.teachers import Query
from rpd_sb3.teachers.scripted.experts import EXPERTS
from rpd_sb3.teachers.scripted.mixture import bin_log_probs, conditional_logits, fit_gaussian
from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher
from tests.support.privileged_states import SLICES, random_states

N_BINS = 256


def test_bins_are_gaussian_in_their_distance_to_the_mean() -> None:
    # 4 tokens: centres -2/3, 0, 2/3, 2/3. A mean of 0 and a std of 2/3: distances of 1, 0, 1 and 1 std.
    weights = np.exp([-0.5, 0.0, -0.5, -0.5])
    log_probs = bin_log_probs(np.array([[0.0]]), 2 / 3, 4)
    np.testing.assert_allclose(log_probs, np.log(weights / weights.sum())[None, None], rtol=1e-12)


@pytest.mark.parametrize("std", [1e-3, 0.1, 10.0])
def test_bins_are_normalised_and_finite(std: float) -> None:
    log_probs = bin_log_probs(np.linspace(-1.0, 1.0, 77).reshape(7, 11), std, N_BINS)
    assert log_probs.shape == (7, 11, N_BINS)
    assert log_probs.dtype == np.float64
    assert np.isfinite(log_probs).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(-1), 1.0, rtol=1e-12)


def test_means_beyond_the_action_space_count_as_its_border() -> None:
    beyond, border = np.array([-3.0, 1.5]), np.array([-1.0, 1.0])
    np.testing.assert_array_equal(bin_log_probs(beyond, 0.1, N_BINS), bin_log_probs(border, 0.1, N_BINS))


def random_modes(n_modes: int, n_tokens: int, n: int = 5, n_bins: int = 3) -> np.ndarray:
    """Log-probabilities ``(n, n_modes, n_tokens, n_bins)``, far from uniform."""
    probs = np.random.default_rng(0).dirichlet([0.5] * n_bins, (n, n_modes, n_tokens))
    return np.log(np.maximum(probs, 1e-12) / np.maximum(probs, 1e-12).sum(-1, keepdims=True))


def joint_of(log_probs: np.ndarray) -> np.ndarray:
    """p(a) of all actions ``(n, V, ..., V)``: modes are equally likely, tokens of a mode independent."""
    n, n_modes, n_tokens, n_bins = log_probs.shape
    joint = np.zeros((n, *[n_bins] * n_tokens))
    for action in product(range(n_bins), repeat=n_tokens):
        for mode in range(n_modes):
            joint[(slice(None), *action)] += (
                np.exp(sum(log_probs[:, mode, k, a] for k, a in enumerate(action))) / n_modes
            )
    return joint


@pytest.mark.parametrize(("n_modes", "n_tokens"), [(1, 2), (2, 1), (2, 2), (3, 3)])
def test_conditionals_are_those_of_the_enumerated_joint(n_modes: int, n_tokens: int) -> None:
    log_probs = random_modes(n_modes, n_tokens)
    joint = joint_of(log_probs)
    np.testing.assert_allclose(joint.reshape(5, -1).sum(1), 1.0)
    for action in product(range(3), repeat=n_tokens):
        logits = conditional_logits(log_probs, np.tile(action, (5, 1)))
        assert logits.shape == (5, n_tokens, 3)
        assert logits.dtype == np.float32
        for k in range(n_tokens):
            before = joint[(slice(None), *action[:k])]  # (5, V, ..., V): token k and those after it
            unnormalised = before.reshape(5, 3, -1).sum(-1)
            expected = unnormalised / unnormalised.sum(1, keepdims=True)
            np.testing.assert_allclose(np.exp(logits[:, k]), expected, rtol=1e-5)


def test_each_row_is_conditioned_on_its_own_prefix() -> None:
    log_probs, prefix = random_modes(2, 3), np.random.default_rng(1).integers(3, size=(5, 3))
    together = conditional_logits(log_probs, prefix)
    for i in range(5):
        np.testing.assert_array_equal(conditional_logits(log_probs[i : i + 1], prefix[i : i + 1])[0], together[i])


def test_without_a_prefix_they_are_the_marginals_of_the_enumerated_joint() -> None:
    log_probs = random_modes(2, 2)
    joint, logits = joint_of(log_probs), conditional_logits(log_probs, None)
    np.testing.assert_allclose(np.exp(logits), np.stack([joint.sum(2), joint.sum(1)], axis=1), rtol=1e-5)
    conditional = conditional_logits(log_probs, np.zeros((5, 2), int))
    assert np.abs(np.exp(conditional) - np.exp(logits)).max() > 0.1, "the prefix tells something"


def test_a_prefix_that_only_one_mode_gives_leaves_that_mode() -> None:
    log_probs = bin_log_probs(np.array([[[-0.8, -0.8], [0.8, 0.8]]]), 0.01, N_BINS)  # thousands of nats apart
    for mode, side in enumerate([-0.8, 0.8]):
        prefix = to_tokens(np.array([[side, -side]]), N_BINS)
        logits = conditional_logits(log_probs, prefix)
        assert np.isfinite(logits).all()
        np.testing.assert_allclose(np.exp(logits[0, 1]), np.exp(log_probs[0, mode, 1]), rtol=1e-4, atol=1e-12)


def test_fitted_gaussian_has_the_sample_mean_and_std_but_no_less_than_the_floor() -> None:
    samples = np.array([[[0.0, 0.5]], [[0.2, 0.5]], [[0.7, 0.5]]])
    mean, std = fit_gaussian(samples, std_floor=0.02)
    # mean 0.3, squared distances 0.09 + 0.01 + 0.16 over n - 1 = 2
    np.testing.assert_allclose(mean, [[0.3, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(std, [[np.sqrt(0.13), 0.02]], rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32


# ---- the scripted teacher


def far_states(n: int) -> np.ndarray:
    """The hand 0.2 m above and 0.3 m beside the object: far enough for the whole detour."""
    states = random_states(n)
    states[:, SLICES["object_pose"]][:, :3] = [0.6, 0.0, 0.02]
    states[:, SLICES["tcp_pose"]][:, :3] = [0.3, 0.0, 0.22]
    return states


def near_states(n: int) -> np.ndarray:
    """The hand right above the object."""
    states = far_states(n)
    states[:, SLICES["tcp_pose"]][:, :2] = [0.6, 0.0]
    return states


def ask(
    teacher: ScriptedTeacher, states: np.ndarray, actions: np.ndarray | None = None, env_ids: Any = None
) -> dict[str, np.ndarray]:
    n = len(states)
    env_ids = np.arange(n) if env_ids is None else np.asarray(env_ids)
    return teacher.label(Query({"privileged": states}, env_ids, np.zeros(n, bool), actions))


def make(env_id: str = "PickCube-v1", **kwargs: Any) -> ScriptedTeacher:
    return ScriptedTeacher(env_id, **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "shapes"),
    [
        ({}, {"action": (5, 7)}),
        ({"n_bins": 16}, {"action": (5, 7), "logits": (5, 7, 16)}),
        ({"n_samples": 4}, {"action": (5, 7), "std": (5, 7)}),
        ({"n_bins": 16, "n_samples": 4}, {"action": (5, 7), "logits": (5, 7, 16), "std": (5, 7)}),
    ],
)
@pytest.mark.parametrize("detour", [0.0, 0.5])
def test_it_gives_the_labels_that_it_promises(
    kwargs: dict[str, Any], shapes: dict[str, tuple[int, ...]], detour: float
) -> None:
    teacher = make(detour=detour, **kwargs)
    labels = ask(teacher, random_states(5))
    assert {name: label.shape for name, label in labels.items()} == shapes
    assert {label.dtype for label in labels.values()} == {np.dtype(np.float32)}
    assert teacher.spec.labels == shapes.keys()
    assert teacher.spec.n_bins == kwargs.get("n_bins")


@pytest.mark.parametrize("env_id", sorted(EXPERTS))
def test_likeliest_tokens_are_those_of_the_action(env_id: str) -> None:
    labels = ask(make(env_id, n_bins=N_BINS, noise=0.3), random_states(200))
    likeliest = to_actions(labels["logits"].argmax(-1), N_BINS)
    # As actions: the last two tokens are the same one, and equally likely.
    np.testing.assert_array_equal(likeliest, to_actions(to_tokens(labels["action"], N_BINS), N_BINS))
    assert len(np.unique(likeliest)) > 200


def test_logits_are_the_gaussian_around_the_action() -> None:
    labels = ask(make(n_bins=16, std=0.2, noise=0.3), random_states(20))
    np.testing.assert_allclose(labels["logits"], bin_log_probs(labels["action"], 0.2, 16), rtol=1e-4)


def test_asking_for_logits_does_not_change_the_action() -> None:
    states = random_states(20)
    plain, tokens = (ask(make(noise=0.3, dropout=0.3, **kwargs), states)["action"] for kwargs in ({}, {"n_bins": 16}))
    np.testing.assert_array_equal(plain, tokens)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_environment_keeps_to_one_side(seed: int) -> None:
    teacher, straight = make(detour=0.25, seed=seed), ask(make(), far_states(1))["action"][0]
    env_ids = [0, 7, 1, 4, 0]
    for _ in range(3):
        actions = ask(teacher, far_states(1).repeat(5, axis=0), env_ids=env_ids)["action"]
        for env_id, action in zip(env_ids, actions):
            side = 0.25 if env_id % 2 == 0 else -0.25
            expected = np.clip(straight + side * np.array([1, 1, 0, 0, 0, 0, 0]), -1.0, 1.0)
            np.testing.assert_allclose(action, expected, atol=1e-6)


def test_near_the_object_there_is_one_way() -> None:
    two, one = (ask(make(detour=detour, n_bins=16), near_states(6)) for detour in (0.5, 0.0))
    np.testing.assert_array_equal(two["action"], one["action"])
    np.testing.assert_allclose(two["logits"], one["logits"], rtol=1e-6)


def tokens_of_both_sides() -> tuple[np.ndarray, np.ndarray]:
    """States of one far hand, and the tokens of a student that goes to the one side in one and to the other in another."""
    states = far_states(1).repeat(2, axis=0)
    return states, to_tokens(ask(make(detour=0.5), states, env_ids=[0, 1])["action"], N_BINS)


def likeliest_y(logits: np.ndarray) -> np.ndarray:
    return centres(N_BINS)[logits[:, 1].argmax(-1)]


def test_an_autoregressive_teacher_goes_on_to_the_side_that_the_student_has_taken() -> None:
    states, tokens = tokens_of_both_sides()
    teacher = make(detour=0.5, n_bins=N_BINS)
    for env_ids in ([0, 1], [1, 0], [0, 0]):  # whoever asks
        logits = ask(teacher, states, tokens, env_ids)["logits"]
        np.testing.assert_allclose(likeliest_y(logits), [0.5, -0.5], atol=1 / 255)
        assert np.exp(logits[0, 1, : N_BINS // 2].astype(float)).sum() < 1e-3, "none of the other side"


def test_a_teacher_that_decodes_in_parallel_has_both_sides_in_mind() -> None:
    states, tokens = tokens_of_both_sides()
    teacher = make(detour=0.5, n_bins=N_BINS, autoregressive=False)
    logits = ask(teacher, states, tokens)["logits"]
    halves = np.exp(logits[:, 1].astype(float))
    np.testing.assert_allclose(halves[:, : N_BINS // 2].sum(-1), 0.5, atol=1e-3)
    np.testing.assert_array_equal(logits, ask(teacher, states)["logits"])


def test_where_nobody_has_acted_it_scores_its_own_tokens() -> None:
    states, tokens = tokens_of_both_sides()
    teacher = make(detour=0.5, n_bins=N_BINS)
    alone = ask(teacher, states, None, env_ids=[0, 1])["logits"]
    np.testing.assert_array_equal(alone, ask(teacher, states, tokens, env_ids=[0, 1])["logits"])
    np.testing.assert_allclose(likeliest_y(alone), [0.5, -0.5], atol=1 / 255)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_of_a_student_count_as_their_tokens(dtype: type) -> None:
    states, tokens = tokens_of_both_sides()
    teacher = make(detour=0.5, n_bins=N_BINS)
    actions = to_actions(tokens, N_BINS).astype(dtype)
    np.testing.assert_array_equal(ask(teacher, states, actions)["logits"], ask(teacher, states, tokens)["logits"])


def test_fitted_samples_spread_around_the_action_as_asked() -> None:
    states = near_states(1)
    action = ask(make(), states)["action"][0]
    inside = np.abs(action) < 0.5
    assert inside.any()
    labels = ask(make(n_samples=4000, std=0.1), states)
    np.testing.assert_allclose(labels["action"][0, inside], action[inside], atol=0.0064)  # 4 standard errors
    np.testing.assert_allclose(labels["std"][0, inside], 0.1, atol=0.0045)
    assert np.abs(labels["action"]).max() <= 1.0


def test_fitted_samples_cover_both_ways() -> None:
    labels = ask(make(n_samples=4000, std=0.1, detour=0.5), far_states(1))
    assert labels["action"][0, 1] == pytest.approx(0.0, abs=0.033)
    assert labels["std"][0, 1] == pytest.approx(np.sqrt(0.5**2 + 0.1**2), abs=0.01)


def test_fitted_std_is_never_below_the_floor() -> None:
    std = ask(make(n_samples=3, std=1e-6, std_floor=0.07), random_states(20))["std"]
    np.testing.assert_array_equal(std, np.float32(0.07))


def test_samples_follow_from_the_seed() -> None:
    same, again, other = (ask(make(n_samples=3, seed=seed), random_states(4)) for seed in (1, 1, 2))
    for name in ("action", "std"):
        np.testing.assert_array_equal(same[name], again[name])
        assert not np.array_equal(same[name], other[name])
