"""The actions of student and teacher at the same observations."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO

from rpd_sb3.envs import make_env
from rpd_sb3.episodes.agreement import Pairs, compare, measure_agreement
from rpd_sb3.episodes.play import Evaluator
from rpd_sb3.teachers import LocalTeacher
from tests.episodes.test_play import go_to_goal
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv
from tests.support.train_helpers import student

ACTIONS = TinyEnv().action_space


def position_teacher() -> EchoTeacher:
    """Acts with the position, which is often outside of what the environment takes."""
    return EchoTeacher(lambda query: query.inputs["state"][:, :1], space=ACTIONS)


def evaluator(teacher: LocalTeacher | None, n_episodes: int = 3, n_envs: int = 2, **env_kwargs: Any) -> Evaluator:
    return Evaluator(TINY, env_kwargs, n_episodes=n_episodes, n_envs=n_envs, vec_env="dummy", teacher=teacher)


def last_token() -> PPO:
    """A student that always takes the last of 5 tokens, 0.75: their edges are -1, -0.5, 0, 0.5 and 1."""
    model = student(tokens=5)
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(th.arange(5.0))
    return model


def test_statistics_of_known_actions() -> None:
    teacher = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]], np.float32)
    result = compare(teacher + [[0.5, -0.25]], teacher, np.full((3, 2), 0.1, np.float32))
    assert result["n_observations"] == 3
    assert result["mean_abs_difference"] == [0.5, 0.25]
    assert result["bias"] == [0.5, -0.25]
    assert result["teacher_std"] == result["student_std"] == [pytest.approx(np.sqrt(2 / 3)), 0.0]
    assert result["correlation"] == [pytest.approx(1.0), None]
    assert result["teacher_label_std"] == pytest.approx([0.1, 0.1])


def test_bias_has_a_sign_and_differences_have_none() -> None:
    result = compare(np.array([[1.0], [-1.0]]), np.array([[0.0], [0.0]]))
    assert (result["bias"], result["mean_abs_difference"], result["correlation"]) == ([0.0], [1.0], [None])
    assert result["teacher_label_std"] is None


def test_only_observations_of_the_first_episodes_count() -> None:
    """An environment that waits for the other is left out, and so is the sixth episode, which nobody asked for."""
    teacher = position_teacher()
    with closing(evaluator(teacher, n_episodes=5, stop=True)) as evaluate:
        expected = evaluate.evaluate(go_to_goal)
        pairs = Pairs(evaluate.venv, go_to_goal)
        evaluate.evaluate(pairs.act, on_step=pairs.on_step)
    ours, theirs, std = pairs.arrays()
    assert len(set(expected.lengths)) > 1
    assert len(ours) == len(theirs) == expected.lengths.sum()
    assert std is None
    starts = [make_env(TINY).reset(seed=10_000 + i)[0][0] for i in range(5)]
    assert np.isin(np.array(starts, np.float32), theirs).all()


@pytest.mark.parametrize("n_envs", [1, 2, 3])
def test_agreement_does_not_depend_on_the_number_of_environments(n_envs: int) -> None:
    model, results = student(), []
    for n in (n_envs, 3):
        with closing(evaluator(position_teacher(), n_envs=n)) as evaluate:
            results.append(measure_agreement(evaluate, model))
    assert results[0] is not None
    assert results[0]["n_observations"] == 30
    for key in ("mean_abs_difference", "bias", "teacher_std", "correlation"):
        assert results[0][key] == pytest.approx(results[1][key])


def test_a_teacher_is_compared_as_it_would_act() -> None:
    loud = EchoTeacher(lambda query: np.full((len(query.env_ids), 1), 7.0, np.float32), space=ACTIONS)
    model = student()
    with th.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.fill_(5.0)
    with closing(evaluator(loud)) as evaluate:
        result = measure_agreement(evaluate, model)
    assert result is not None
    assert result["mean_abs_difference"] == [0.0]


def test_tokens_are_compared_as_the_actions_that_they_stand_for() -> None:
    teacher = EchoTeacher(lambda query: np.full((len(query.env_ids), 1), 0.5, np.float32), space=ACTIONS)
    with closing(evaluator(teacher, tokens=5)) as evaluate:
        result = measure_agreement(evaluate, last_token())
    assert result is not None
    assert result["bias"] == [0.25]


def test_a_teacher_of_tokens_is_compared_as_well() -> None:
    space = spaces.MultiDiscrete([5])
    teacher = EchoTeacher(lambda query: np.zeros((len(query.env_ids), 1), np.int64), space=space)
    with closing(evaluator(teacher, tokens=5)) as evaluate:
        result = measure_agreement(evaluate, last_token())
    assert result is not None
    assert result["bias"] == [1.5]


def test_actions_without_a_size_have_no_agreement() -> None:
    teacher = EchoTeacher(lambda query: np.zeros(len(query.env_ids), np.int64), space=spaces.Discrete(2))
    model = PPO("MlpPolicy", "CartPole-v1", device="cpu")
    with closing(Evaluator("CartPole-v1", n_episodes=1, vec_env="dummy", teacher=teacher)) as evaluate:
        assert measure_agreement(evaluate, model) is None


def test_a_teacher_that_was_hidden_is_shown_the_episodes_again() -> None:
    teacher = position_teacher()
    with closing(evaluator(teacher)) as evaluate:
        evaluate.hide_teacher()
        assert evaluate.student(student()).n_episodes == 3
        assert teacher.queries == []
        assert measure_agreement(evaluate, student()) is not None
    assert len(teacher.queries) == 20
