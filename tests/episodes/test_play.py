"""The same seeded episodes for everybody."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.envs import make_vec_env
from rpd_sb3.episodes.play import EvalResult, Evaluator, Step, play, student_actor, teacher_actor
from rpd_sb3.episodes.rng import preserved_rng
from rpd_sb3.teachers import make_teacher
from rpd_sb3.train.callbacks import EvalSuccessCallback
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv


def go_to_goal(obs: np.ndarray, episode_starts: np.ndarray) -> np.ndarray:
    return np.clip((obs[:, 1:] - obs[:, :1]) / 0.3, -1.0, 1.0)


def go_past_goal(obs: np.ndarray, episode_starts: np.ndarray) -> np.ndarray:
    return np.ones((len(obs), 1), np.float32)


def evaluate(act: Callable[..., np.ndarray], n_episodes: int = 7, n_envs: int = 1, **env_kwargs: Any) -> EvalResult:
    with closing(Evaluator(TINY, env_kwargs, n_episodes=n_episodes, n_envs=n_envs, vec_env="dummy")) as evaluator:
        return evaluator.evaluate(act)


def same(a: EvalResult, b: EvalResult) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def model() -> Iterator[PPO]:
    venv = make_vec_env(TINY, 2, seed=0, vec_env="dummy")
    yield PPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=2, seed=0, device="cpu")
    venv.close()


@pytest.mark.parametrize("n_envs", [2, 3, 7, 20])
def test_episodes_do_not_depend_on_the_number_of_environments(n_envs: int) -> None:
    assert same(evaluate(go_past_goal, n_envs=n_envs, stop=True), evaluate(go_past_goal, n_envs=1, stop=True))


@pytest.mark.parametrize("n_envs", [1, 3, 4, 7])
def test_student_acts_the_same_bit_for_bit_in_any_number_of_environments(n_envs: int) -> None:
    space = spaces.Box(-1.0, 1.0, (42,), np.float32)
    env = type(
        "Wide",
        (TinyEnv,),
        {"__init__": lambda self: TinyEnv.__init__(self) or setattr(self, "observation_space", space)},
    )()
    model = PPO("MlpPolicy", env, policy_kwargs={"net_arch": [256, 256]}, seed=0, device="cpu")
    obs = np.random.default_rng(0).normal(size=(21, 42)).astype(np.float32)
    parts = [
        student_actor(model)(obs[i : i + n_envs], np.ones(len(obs[i : i + n_envs]), bool)) for i in range(0, 21, n_envs)
    ]
    assert np.array_equal(np.concatenate(parts), student_actor(model)(obs, np.ones(21, bool)))


def test_episode_i_has_seed_plus_i() -> None:
    env = TinyEnv()
    with closing(Evaluator(TINY, n_episodes=5, n_envs=2, vec_env="dummy", seed=40)) as evaluator:
        seen = []
        evaluator.evaluate(lambda obs, starts: seen.extend(obs[starts]) or np.zeros((2, 1)))
    for i in range(5):
        assert np.array_equal(seen[i], env.reset(seed=40 + i)[0])


def test_evaluating_twice_gives_the_same() -> None:
    with closing(Evaluator(TINY, n_episodes=5, n_envs=2, vec_env="dummy")) as evaluator:
        assert same(evaluator.evaluate(go_past_goal), evaluator.evaluate(go_past_goal))


def test_worker_processes_give_the_same() -> None:
    with closing(Evaluator(TINY, n_episodes=5, n_envs=3)) as evaluator:
        assert same(evaluator.evaluate(go_past_goal), evaluate(go_past_goal, n_episodes=5))


def test_success_once_and_at_end_differ_when_success_is_lost() -> None:
    reached, passed = evaluate(go_to_goal), evaluate(go_past_goal)
    assert (reached.success_once, reached.success_at_end) == (1.0, 1.0)
    assert passed.success_at_end == 0.0
    assert passed.success_once is not None
    assert 0 < passed.success_once < 1
    assert passed.ci95 == wilson_interval(round(7 * passed.success_once), 7)


def test_returns_and_lengths_are_those_of_the_first_episode_of_each_environment() -> None:
    result = evaluate(go_to_goal, n_envs=7, stop=True)
    assert np.array_equal(result.returns, np.ones(7))
    env = TinyEnv(stop=True)
    for seed, length in enumerate(result.lengths, start=10_000):
        obs, _ = env.reset(seed=seed)
        for t in range(int(length)):
            obs, _, terminated, _, _ = env.step(go_to_goal(obs[None], np.ones(1))[0])
            assert terminated == (t == length - 1)
    assert result.mean_length == np.mean(result.lengths)
    assert len(set(result.lengths)) > 1


@pytest.mark.parametrize("n_episodes", [None, 1])
def test_every_step_shows_what_was_acted_on_and_who_still_plays(n_episodes: int | None) -> None:
    venv = make_vec_env(TINY, 3, seed=0, vec_env="dummy", stop=True)
    steps: list[Step] = []
    episodes = play(venv, go_to_goal, n_episodes=n_episodes, on_step=steps.append)
    everybody = play(make_vec_env(TINY, 3, seed=0, vec_env="dummy", stop=True), go_to_goal)
    assert episodes == everybody[:n_episodes]
    lengths = [episode.length for episode in everybody]
    assert len(set(lengths)) > 1
    assert len(steps) == max(lengths), "environments that do not count play to the end as well"
    playing = np.array([step.playing for step in steps])
    assert playing.sum(axis=0).tolist() == lengths[:n_episodes] + [0] * (3 - len(episodes))
    for step, following in zip(steps, steps[1:]):
        assert np.array_equal(step.actions, go_to_goal(step.obs, step.dones))
        moved = (following.obs[:, 0] - step.obs[:, 0])[~step.dones]
        assert moved == pytest.approx(0.3 * step.actions[~step.dones, 0], abs=1e-6)
        assert (step.rewards == [info["is_success"] for info in step.infos]).all()


def test_success_is_none_where_the_environment_does_not_tell() -> None:
    with closing(Evaluator("CartPole-v1", n_episodes=2, n_envs=2, vec_env="dummy")) as evaluator:
        result = evaluator.evaluate(lambda obs, starts: np.zeros(2, int))
    assert (result.success_once, result.success_at_end, result.ci95, result.once) == (None, None, None, None)
    assert result.mean_return == result.mean_length


def test_no_episodes_is_an_error() -> None:
    with pytest.raises(ValueError, match="n_episodes=0 must be at least 1"):
        Evaluator(TINY, n_episodes=0)


def test_recurrent_student_starts_every_episode_without_memory() -> None:
    venv = make_vec_env(TINY, 1, seed=0, vec_env="dummy")
    model = RecurrentPPO("MlpLstmPolicy", venv, n_steps=8, seed=0, device="cpu")
    with th.no_grad():  # an action that the memory decides
        for parameter in model.policy.parameters():
            parameter.mul_(3)
    act = student_actor(model)
    results = [evaluate(act, n_episodes=4, n_envs=1) for _ in range(2)]
    assert same(*results)
    forgetful = evaluate(lambda obs, starts: model.predict(obs, deterministic=True)[0], n_episodes=4)
    assert not same(results[0], forgetful)


@pytest.mark.parametrize("n_envs", [2, 3])
def test_recurrent_student_keeps_one_memory_per_environment(n_envs: int) -> None:
    model = RecurrentPPO(
        "MlpLstmPolicy", make_vec_env(TINY, 1, seed=0, vec_env="dummy"), n_steps=8, seed=0, device="cpu"
    )
    together, alone = (evaluate(student_actor(model), n_episodes=6, n_envs=n, stop=True) for n in (n_envs, 1))
    assert same(together, alone)


def test_student_is_deterministic(model: PPO) -> None:
    assert same(evaluate(student_actor(model)), evaluate(student_actor(model)))


def test_global_generators_are_left_alone() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(th.rand(()))  # noqa: NPY002

    with preserved_rng():
        inside = draws()
    assert draws() == inside


def test_teacher_is_clipped_and_asked_once_per_step() -> None:
    teacher = EchoTeacher(
        lambda query: 5 * (query.inputs["state"][:, 1:] - query.inputs["state"][:, :1]), space=TinyEnv().action_space
    )
    with closing(Evaluator(TINY, n_episodes=2, n_envs=2, vec_env="dummy", teacher=teacher)) as evaluator:
        result = evaluator.teacher()
        assert len(teacher.queries) == 10
        evaluator.evaluate(go_to_goal)
    assert len(teacher.queries) == 10  # a student's episodes do not ask
    assert result.lengths.tolist() == [10, 10]
    positions = np.array([query.inputs["state"][:, 0] for query in teacher.queries])
    assert np.abs(np.diff(positions, axis=0)).max() <= 0.3 + 1e-6


@pytest.mark.parametrize("freq", [8, 40])
def test_evaluations_do_not_change_training(tmp_path: Path, freq: int) -> None:
    def train(callback: BaseCallback | None) -> th.Tensor:
        venv = make_vec_env(TINY, 2, seed=0, vec_env="dummy")
        model = PPO("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=2, seed=0, device="cpu")
        model.set_logger(Logger(None, []))
        model.learn(100, callback)
        return th.cat([parameter.flatten() for parameter in model.policy.parameters()])

    noisy = {"noise": True}  # draws from NumPy's global generator
    with closing(Evaluator(TINY, noisy, n_episodes=3, n_envs=2, vec_env="dummy")) as evaluator:
        callback = EvalSuccessCallback(evaluator, freq, tmp_path, lambda steps, result: None)
        with_evaluations = train(callback)
    assert callback.timesteps == ([0, 16, 32, 48, 64, 80, 96] if freq == 8 else [0, 48, 80])
    assert th.equal(with_evaluations, train(None))


def test_best_model_is_the_last_of_the_best(tmp_path: Path, model: PPO) -> None:
    rates = iter([0.5, 1.0, 1.0, 0.5])
    model.set_logger(Logger(None, []))

    class Scripted(Evaluator):
        def student(self, model: Any) -> EvalResult:
            once = np.arange(4) < 4 * next(rates)
            return EvalResult(float(once.mean()), 0.0, 4, (0.0, 1.0), 0.0, 1.0, np.zeros(4), np.ones(4), once, once)

    callback = EvalSuccessCallback(Scripted(TINY), 16, tmp_path, lambda steps, result: None)
    model.learn(64, callback)
    assert callback.timesteps == [0, 16, 32, 48]
    assert PPO.load(tmp_path / "best_model.zip").num_timesteps == 32


def test_evaluations_file_has_the_layout_of_sb3(tmp_path: Path, model: PPO) -> None:
    model.set_logger(Logger(None, []))
    with closing(Evaluator(TINY, n_episodes=3, n_envs=2, vec_env="dummy")) as evaluator:
        model.learn(32, EvalSuccessCallback(evaluator, 16, tmp_path, lambda steps, result: None))
    with np.load(tmp_path / "evaluations.npz") as file:
        shapes = {name: file[name].shape for name in file.files}
        assert file["timesteps"].tolist() == [0, 16]
    assert shapes == {
        "timesteps": (2,),
        "results": (2, 3),
        "ep_lengths": (2, 3),
        "successes": (2, 3),
        "successes_at_end": (2, 3),
    }


def test_maniskill_episodes_go_on_after_success() -> None:
    teacher = make_teacher("scripted", "PickCube-v1")
    with closing(Evaluator("PickCube-v1", n_episodes=1, n_envs=1, vec_env="dummy", teacher=teacher)) as evaluator:
        result = evaluator.teacher()
    teacher.close()
    assert (result.success_once, result.success_at_end, result.mean_length) == (1.0, 1.0, 50.0)
    assert 1 < result.mean_return < 50


def test_episodes_as_trained_end_at_success() -> None:
    teacher = make_teacher("scripted", "PickCube-v1")
    evaluator = Evaluator("PickCube-v1", n_episodes=2, n_envs=1, vec_env="dummy", teacher=teacher)
    with closing(evaluator.with_training_ends()) as same:
        result = same.teacher()
    teacher.close()
    assert (result.success_once, result.success_at_end, result.n_episodes) == (1.0, 1.0, 2)
    assert list(result.returns) == [1.0, 1.0]


def test_teacher_without_images_is_evaluated_without_rendering() -> None:
    options = {"obs": "rgb", "image_size": 84, "reward": "dense", "max_episode_steps": 8}  # images are slow on a CPU

    def noisy_evaluator() -> Evaluator:
        teacher = make_teacher("scripted", "PushCube-v1", noise=0.5)  # its noise from the start
        return Evaluator("PushCube-v1", options, n_episodes=2, n_envs=2, vec_env="dummy", teacher=teacher)

    with closing(noisy_evaluator()) as evaluator:
        with_images = evaluator.evaluate(teacher_actor(evaluator.venv))
    evaluator = noisy_evaluator()
    without = evaluator.teacher()
    assert with_images.lengths.tolist() == [8, 8]
    assert with_images.returns.min() > 0
    np.testing.assert_array_equal(without.returns, with_images.returns)
    assert evaluator._venv is None, "the student's environments were not even made"
