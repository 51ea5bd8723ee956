"""Actions as tokens: OpenVLA's convention, the environment that acts on them, and who fits it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.contract.bins import edges, to_actions, to_tokens
from rpd_sb3.envs import ActionTokens, make_env, make_vec_env
from rpd_sb3.episodes.play import Evaluator, teacher_actor
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import TokenPolicy
from tests.algos.test_loop import HARSH
from tests.support.helpers import ACTION_SPACE, CountingEnv, EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv

OPENVLA_VOCABULARY = 32_000
# From OpenVLA's own code (openvla/openvla-7b at 31f090d, predict_action): ids that a model may give, the actions that
# it makes of them.
OPENVLA_DECODES = {
    31999: -254 / 255,
    31998: -252 / 255,
    31872: 0.0,
    31746: 252 / 255,
    31745: 254 / 255,
    31744: 254 / 255,
}
# Its ActionTokenizer: id = 32000 - digitize(clip(a, -1, 1), linspace(-1, 1, 256)); digitize counts the edges <= a.
OPENVLA_ENCODES = {
    -7.0: 31999,
    -1.0: 31999,
    -1 + 1.99 / 255: 31999,
    -1 + 2.01 / 255: 31998,
    -0.5 / 255: 31872,
    0.5 / 255: 31872,
    1 - 2.01 / 255: 31746,
    0.9999: 31745,
    1.0: 31744,
    7.0: 31744,
}


def openvla_id(tokens: np.ndarray) -> np.ndarray:
    return OPENVLA_VOCABULARY - 1 - tokens


def test_tokens_are_decoded_as_openvla_does() -> None:
    tokens = openvla_id(np.array(list(OPENVLA_DECODES)))
    actions = to_actions(tokens, 256)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, list(OPENVLA_DECODES.values()), rtol=1e-7, atol=1e-16)


def test_actions_are_encoded_as_openvla_does() -> None:
    tokens = to_tokens(np.array(list(OPENVLA_ENCODES)), 256)
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(openvla_id(tokens), list(OPENVLA_ENCODES.values()))


@pytest.mark.parametrize("n_bins", [2, 3, 16, 256])
def test_an_edge_belongs_to_the_bin_above_it(n_bins: int) -> None:
    np.testing.assert_array_equal(to_tokens(edges(n_bins), n_bins), np.arange(n_bins))


class Acted(gym.Env):
    """Remembers the action that it got."""

    def __init__(self, space: spaces.Space = ACTION_SPACE) -> None:
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32), space

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.acted = action
        return np.zeros(1, np.float32), 0.0, False, False, {}


def test_the_environment_acts_on_bin_centres() -> None:
    env = ActionTokens(Acted(), n_bins=5)  # edges -1, -0.5, 0, 0.5, 1
    assert env.action_space == spaces.MultiDiscrete([5, 5])
    for tokens, expected in {(0, 1): [-0.75, -0.25], (3, 4): [0.75, 0.75]}.items():
        env.step(np.array(tokens))
        acted = env.unwrapped.acted  # type: ignore[attr-defined]
        np.testing.assert_array_equal(acted, np.array(expected, np.float32))
        assert ACTION_SPACE.contains(acted)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0.0, 1.0, (2,), np.float32),
        spaces.Box(np.array([-1, -1], np.float32), np.array([1, 2], np.float32)),
        spaces.Box(-1.0, 1.0, (2, 2), np.float32),
        spaces.Discrete(3),
    ],
)
def test_other_action_spaces_are_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"(?s)ActionTokens bins actions of Box\(-1, 1, .*RescaleAction"):
        ActionTokens(Acted(space))


def test_token_environment_passes_gymnasiums_checks() -> None:
    check_env(ActionTokens(TinyEnv(), n_bins=16), skip_render_check=True)


@pytest.mark.parametrize(("tokens", "n_bins"), [(True, 256), (16, 16), (2, 2)])
def test_make_env_takes_the_number_of_bins(tokens: bool | int, n_bins: int) -> None:
    assert make_env(TINY, tokens=tokens).action_space == spaces.MultiDiscrete([n_bins])


@pytest.mark.parametrize("tokens", [0, 1])
def test_make_env_refuses_too_few_bins_instead_of_reading_them_as_no_or_yes(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"n_bins={tokens} must be at least 2"):
        make_env(TINY, tokens=tokens)


def test_vec_env_steps_with_tokens_as_with_their_centres() -> None:
    tokens = np.random.default_rng(0).integers(256, size=(12, 3, 1))
    with (
        closing(make_vec_env(TINY, 3, seed=0, vec_env="dummy", tokens=True)) as ours,
        closing(make_vec_env(TINY, 3, seed=0, vec_env="dummy")) as plain,
    ):
        np.testing.assert_array_equal(ours.reset(), plain.reset())
        for row in tokens:  # beyond the 10 steps of an episode
            np.testing.assert_array_equal(ours.step(row)[0], plain.step(to_actions(row, 256))[0])


def trained(algorithm: type[PPO], policy: Any, **kwargs: Any) -> tuple[dict[str, th.Tensor], PPO]:
    def make() -> gym.Env:
        return Monitor(ActionTokens(CountingEnv(length=7, reward=lambda action: float(action.sum())), n_bins=8))

    model = algorithm(policy, DummyVecEnv([make] * 2), **{**HARSH, **kwargs})
    model.learn(390)
    return model.policy.state_dict(), model


@pytest.mark.parametrize("policy", ["MlpPolicy", TokenPolicy])
@pytest.mark.parametrize("kwargs", [{}, {"target_kl": None}])
def test_on_tokens_the_loop_is_sb3_ppo_to_the_last_bit(policy: Any, kwargs: dict[str, Any]) -> None:
    expected, ppo = trained(PPO, policy, **kwargs)
    actual, ours = trained(OnPolicyDistillation, policy, **kwargs)
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        assert th.equal(value, actual[name]), name
    assert ours._n_updates == ppo._n_updates
    assert ours.logger.name_to_value.keys() == ppo.logger.name_to_value.keys()
    assert (ppo._n_updates < 3 * HARSH["n_epochs"]) == ("target_kl" not in kwargs), "target_kl fires"


def make_venv(n_bins: int = 16) -> DummyVecEnv:
    return DummyVecEnv([lambda: ActionTokens(CountingEnv(), n_bins)] * 2)


def make_teacher(answer: Any = None, space: spaces.Space = ACTION_SPACE, **spec: Any) -> EchoTeacher:
    teacher = EchoTeacher(answer, space)
    teacher.spec = replace(teacher.spec, **spec)
    return teacher


def test_a_teacher_with_other_bins_is_refused() -> None:
    with pytest.raises(ValueError, match="teacher 'echo' has 8 bins, but the environment's actions have 16"):
        VecTeacher(make_venv(16), make_teacher(n_bins=8))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-2.0, 2.0, (2,)),
        spaces.Box(0.0, 1.0, (2,)),
        spaces.MultiDiscrete([8, 8]),
    ],
)
def test_a_teacher_whose_actions_are_no_tokens_of_the_environment_is_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match=r"gives actions of .* but the environment takes MultiDiscrete\(\[16 16\]\)"):
        VecTeacher(make_venv(16), make_teacher(space=space))


def test_the_teacher_is_told_the_students_tokens() -> None:
    teacher = make_teacher()
    venv = VecTeacher(make_venv(), teacher, wait=True)
    venv.reset()
    venv.step(np.array([[0, 15], [7, 3]]))
    (query,) = teacher.queries
    assert query.actions is not None
    assert query.actions.dtype.kind == "i"
    np.testing.assert_array_equal(query.actions, [[0, 15], [7, 3]])


def test_a_teachers_continuous_action_is_played_as_tokens() -> None:
    teacher = make_teacher(lambda query: np.array([[-1.0, -0.3], [0.3, 1.7]]))
    venv = VecTeacher(make_venv(5), teacher)  # edges -1, -0.5, 0, 0.5, 1
    obs = venv.reset()
    np.testing.assert_array_equal(teacher_actor(venv)(obs, np.ones(2, bool)), [[0, 1], [2, 4]])


def test_a_teachers_tokens_are_played_as_they_are() -> None:
    tokens = np.array([[0, 1], [2, 4]])
    teacher = make_teacher(lambda query: tokens, space=spaces.MultiDiscrete([5, 5]))
    venv = VecTeacher(make_venv(5), teacher)
    obs = venv.reset()
    np.testing.assert_array_equal(teacher_actor(venv)(obs, np.ones(2, bool)), tokens)


@pytest.mark.parametrize(("tokens", "success"), [(256, True), (2, False)])
def test_evaluated_teacher_succeeds_if_its_tokens_are_fine_enough(tokens: int, success: bool) -> None:
    """The only centre of two tokens is 0: nobody gets anywhere."""

    def to_goal(query: Any) -> np.ndarray:
        position, goal = query.inputs["state"].T
        return np.clip((goal - position) / 0.3, -1.0, 1.0)[:, None]

    teacher = EchoTeacher(to_goal, spaces.Box(-1.0, 1.0, (1,), np.float32))
    options = {"tokens": tokens}
    with closing(Evaluator(TINY, options, n_episodes=4, n_envs=2, vec_env="dummy", teacher=teacher)) as evaluator:
        result = evaluator.teacher()
    assert (result.success_at_end == 1.0) == success
    distances = np.array([abs(state[0] - state[1]) for state in teacher.queries[-1].inputs["state"]])
    assert (distances <= 0.3 / 255 + 1e-6).all() == success
