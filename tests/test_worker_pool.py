"""WorkerPoolVecEnv: the same as a DummyVecEnv, in other processes; and what happens when they fail."""

from __future__ import annotations

import os
import signal
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.envs.worker_pool import WorkerPoolVecEnv
from tests.helpers import CountingEnv


def make_fns(n: int) -> list[Any]:
    return [lambda i=i: Monitor(CountingEnv(number=i, length=2 + i, teacher_view=bool(i < 0))) for i in range(n)]


def pendulums(n: int) -> list[Any]:
    return [lambda: gym.make("Pendulum-v1")] * n


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_it_steps_like_a_dummy_vec_env(n_workers: int) -> None:
    pool, dummy = WorkerPoolVecEnv(pendulums(5), n_workers), DummyVecEnv(pendulums(5))
    rng = np.random.default_rng(0)
    for venv in (pool, dummy):
        venv.seed(7)
    np.testing.assert_array_equal(pool.reset(), dummy.reset())
    for _ in range(205):  # beyond the time limit of 200
        actions = rng.uniform(-2, 2, (5, 1)).astype(np.float32)
        for ours, theirs in zip(pool.step(actions)[:3], dummy.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    pool.close()


def test_infos_belong_to_their_environments() -> None:
    pool = WorkerPoolVecEnv(make_fns(5), 2)
    pool.reset()
    for _ in range(6):
        obs, _, dones, infos = pool.step(np.zeros((5, 2), np.float32))
        np.testing.assert_array_equal(obs[:, 0], np.arange(5))
        for i in range(5):
            assert infos[i]["here"][0] == i
            assert ("terminal_observation" in infos[i]) == dones[i]
    pool.close()


def test_methods_and_attributes_reach_the_asked_environments_in_order() -> None:
    pool = WorkerPoolVecEnv(make_fns(5), 2)
    assert pool.get_attr("number") == [0, 1, 2, 3, 4]
    assert pool.get_attr("number", indices=[4, 0, 2]) == [4, 0, 2]
    pool.set_attr("tag", "here", indices=[1, 3])
    assert pool.get_attr("tag", indices=[3, 1]) == ["here", "here"]
    assert pool.env_method("get_wrapper_attr", "length", indices=[2]) == [4]
    assert pool.env_is_wrapped(Monitor) == [True] * 5
    assert is_wrapped(Monitor(CountingEnv()), Monitor)
    assert pool.has_attr("number")
    assert not pool.has_attr("no_such_thing")
    pool.close()


class Brittle(CountingEnv):
    def step(self, action: np.ndarray) -> Any:
        if self.t == 1:
            raise RuntimeError("the gripper fell off")
        return super().step(action)


def test_an_error_in_an_environment_arrives_with_its_text() -> None:
    pool = WorkerPoolVecEnv([CountingEnv, Brittle], 2)
    pool.reset()
    pool.step(np.zeros((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="environment worker 1 failed:[^$]*the gripper fell off"):
        pool.step(np.zeros((2, 2), np.float32))
    pool.close()


def test_an_environment_that_cannot_be_made_is_an_error() -> None:
    def broken() -> gym.Env:
        raise ValueError("no such task")

    with pytest.raises(RuntimeError, match="environment worker 0 failed:[^$]*no such task"):
        WorkerPoolVecEnv([broken], 1)


def test_a_dead_worker_is_an_error_and_not_a_wait() -> None:
    pool = WorkerPoolVecEnv(make_fns(2), 2)
    pool.reset()
    os.kill(pool._processes[1].pid, signal.SIGKILL)
    pool._processes[1].join(5)
    with pytest.raises(RuntimeError, match="environment worker 1 of 2 died with exit code -9"):
        pool.step(np.zeros((2, 2), np.float32))
    pool.close()
    assert not any(process.is_alive() for process in pool._processes)
