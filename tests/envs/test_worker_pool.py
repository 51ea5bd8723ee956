"""WorkerPoolVecEnv: the same as a DummyVecEnv, in other processes; and what happens when they fail."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from copy import deepcopy
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_util import is_wrapped
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.envs.worker_pool import WorkerPoolVecEnv
from tests.support.helpers import CountingEnv


def make_fns(n: int) -> list[Any]:
    return [lambda i=i: Monitor(CountingEnv(number=i, length=2 + i)) for i in range(n)]


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


IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
NUMBER = spaces.Box(-np.inf, np.inf, (), np.float32)
SPACES = {
    "box": IMAGE,
    "dict": spaces.Dict({"rgb": IMAGE, "number": NUMBER, "which": spaces.Discrete(300)}),
    "tuple": spaces.Tuple((NUMBER, IMAGE)),
    "discrete": spaces.Discrete(300),
}


class Frames(gym.Env):
    """Its observations are those of the space, one after the other; episodes last 2 steps longer than its number."""

    def __init__(self, number: int, space: spaces.Space) -> None:
        self.number, self.observation_space, self.action_space = number, deepcopy(space), spaces.Discrete(2)
        self.info = {"kept": "the same dict at each step"}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return self.observation_space.sample(), 0.0, self.t == self.number + 2, False, self.info


def test_there_is_a_worker_for_each_core_that_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3})
    pool = WorkerPoolVecEnv(make_fns(5))
    assert [len(rows) for rows in pool._rows] == [3, 2]
    pool.close()


def frames(n: int, space: spaces.Space) -> list[Any]:
    return [lambda i=i: Frames(i, space) for i in range(n)]


def parts(obs: Any) -> dict[Any, np.ndarray]:
    return dict(obs) if isinstance(obs, dict) else dict(enumerate(obs)) if isinstance(obs, tuple) else {None: obs}


def assert_same(ours: Any, theirs: Any) -> None:
    assert isinstance(
        ours, dict if isinstance(theirs, dict) else tuple if isinstance(theirs, tuple) else np.generic | np.ndarray
    )
    assert parts(ours).keys() == parts(theirs).keys()
    for key, values in parts(theirs).items():
        np.testing.assert_array_equal(parts(ours)[key], values, strict=True)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_observations_of_every_kind_are_those_of_a_dummy_vec_env(space: spaces.Space) -> None:
    pool, dummy = WorkerPoolVecEnv(frames(3, space), 2), DummyVecEnv(frames(3, space))
    for venv in (pool, dummy):
        venv.seed(7)
    assert_same(pool.reset(), dummy.reset())
    for _ in range(8):
        (obs, _, dones, infos), (wanted, _, ends, their_infos) = (v.step(np.zeros(3, int)) for v in (pool, dummy))
        assert_same(obs, wanted)
        assert dones.tolist() == ends.tolist()
        for i in np.flatnonzero(ends):
            assert_same(infos[i]["terminal_observation"], their_infos[i]["terminal_observation"])
        assert all("terminal_observation" not in infos[i] for i in np.flatnonzero(~ends))
    pool.close()


def test_observations_that_were_given_do_not_change_in_later_steps() -> None:
    pool = WorkerPoolVecEnv(frames(2, IMAGE), 2)
    first = pool.reset()
    _, _, _, infos = [pool.step(np.zeros(2, int)) for _ in range(2)][-1]
    terminal = infos[0]["terminal_observation"]
    before = first.copy(), terminal.copy()
    for _ in range(4):
        pool.step(np.zeros(2, int))
    np.testing.assert_array_equal(first, before[0])
    np.testing.assert_array_equal(terminal, before[1])
    pool.close()


class CountingRemote:
    """A connection that counts the bytes that arrive."""

    def __init__(self, remote: Any) -> None:
        self.remote, self.bytes = remote, 0
        self.send, self.close = remote.send, remote.close

    def recv(self) -> Any:
        data = self.remote.recv_bytes()
        self.bytes += len(data)
        return ForkingPickler.loads(data)


def test_no_frame_goes_through_a_pipe() -> None:
    pool = WorkerPoolVecEnv(frames(2, IMAGE), 1)
    (counting,) = pool._remotes = [CountingRemote(pool._remotes[0])]  # type: ignore[list-item]
    pool.reset()
    for _ in range(4):  # episodes end among them
        pool.step(np.zeros(2, int))
    assert counting.bytes < 4096 < np.prod(IMAGE.shape)
    pool.close()


def test_environments_that_show_different_things_are_refused() -> None:
    def fns() -> list[Any]:
        return [*frames(1, IMAGE), *frames(1, spaces.Box(0, 255, (32, 32, 3), np.uint8))]

    with pytest.raises(ValueError, match=r"env 0 shows Box\(0, 255, \(64, .* env 1 shows Box\(0, 255, \(32, "):
        WorkerPoolVecEnv(fns(), 2)
    with pytest.raises(RuntimeError, match="environment worker 0 failed:[^$]*could not broadcast"):
        WorkerPoolVecEnv(fns(), 1).reset()


def test_a_closed_pool_leaves_no_memory_and_no_descriptor() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        pool = WorkerPoolVecEnv(frames(2, IMAGE), 2)
        pool.reset()
        assert "rpd_sb3-observations" in Path("/proc/self/maps").read_text()
        pool.close()
        del pool
        gc.collect()
        assert "rpd_sb3-observations" not in Path("/proc/self/maps").read_text()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3  # the fork server's own


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


def step_in_turns(pool: WorkerPoolVecEnv, actions: np.ndarray, order: np.ndarray) -> tuple[Any, ...]:
    """The same as ``pool.step(actions)``, with both turns on their way at a time."""
    rewards, dones = np.zeros(pool.num_envs, np.float32), np.zeros(pool.num_envs, bool)
    infos: list[Any] = [None] * pool.num_envs
    pending = [pool.step_rows_async(rows, actions[rows]) for rows in pool.halves(order)]
    for turn in pending:
        rewards[turn.rows], dones[turn.rows], parts = pool.step_rows_wait(turn)
        for row, info in zip(turn.rows, parts):
            infos[row] = info
        np.testing.assert_array_equal(pool.read_observations(turn.rows)[:, 0], turn.rows)
    return pool.read_observations(), rewards, dones, infos


@pytest.mark.parametrize("n_workers", [1, 2, 5])
def test_steps_in_turns_are_those_of_a_dummy_vec_env(n_workers: int) -> None:
    def fns() -> list[Any]:
        return [lambda i=i: CountingEnv(i, length=2 + i, reward=lambda action: float(action[0])) for i in range(5)]

    pool, dummy = WorkerPoolVecEnv(fns(), n_workers), DummyVecEnv(fns())
    np.testing.assert_array_equal(pool.reset(), dummy.reset())
    rng = np.random.default_rng(0)
    for step in range(12):
        actions = rng.uniform(-1, 1, (5, 2)).astype(np.float32)
        # At once now and then: what a turn has changed is there in the steps after it.
        ours = pool.step(actions) if step % 4 == 3 else step_in_turns(pool, actions, rng.permutation(5))
        theirs = dummy.step(actions)
        for mine, wanted in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(mine, wanted, strict=True)
        for mine, wanted in zip(ours[3], theirs[3], strict=True):
            assert mine.keys() == wanted.keys()
            assert mine["TimeLimit.truncated"] == wanted["TimeLimit.truncated"]
            for key in mine.keys() - {"TimeLimit.truncated"}:
                np.testing.assert_array_equal(mine[key], wanted[key])
    pool.close()


def test_turns_are_halves_of_each_worker_in_the_order_wanted() -> None:
    pool = WorkerPoolVecEnv(make_fns(7), 2)  # 0 to 3, 4 to 6
    first, second = pool.halves(np.array([9, 0, 0, 9, 2, 1, 0]))
    assert (first.tolist(), second.tolist()) == ([1, 2, 6], [0, 3, 4, 5])
    pool.close()
    pool = WorkerPoolVecEnv(make_fns(3), 3)
    assert [rows.tolist() for rows in pool.halves(np.zeros(3))] == [[0, 2], [1]], "workers take turns"
    pool.close()


def test_information_of_resets_is_that_of_the_last_one() -> None:
    class Told(CountingEnv):
        def reset(self, **kwargs: Any) -> Any:
            return super().reset(**kwargs)[0], {"episode": self.episode}

    pool = WorkerPoolVecEnv([lambda i=i: Told(i, length=1 + i) for i in range(2)], 1)
    pool.reset()
    for step, episodes in enumerate(([1, 0], [2, 1], [3, 1], [4, 2])):
        actions = np.zeros((2, 2), np.float32)
        pool.step(actions) if step % 2 else step_in_turns(pool, actions, np.zeros(2))
        assert [info["episode"] for info in pool.reset_infos] == episodes
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


class Stumbling(CountingEnv):
    """Fails where it is told to."""

    def step(self, action: np.ndarray) -> Any:
        if action[0] < 0:
            raise RuntimeError("it stumbled")
        return super().step(action)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        if options:
            raise RuntimeError("it stumbled")
        return super().reset(seed=seed)

    def stumble(self, number: int) -> int:
        if number == self.number:
            raise RuntimeError("it stumbled")
        return self.number


def fail_in_step(pool: WorkerPoolVecEnv) -> None:
    pool.step(np.array([[-1, 0], [0, 0], [0, 0]], np.float32))


def fail_in_reset(pool: WorkerPoolVecEnv) -> None:
    pool.set_options([{"stumble": True}, {}, {}])
    pool.reset()


def fail_in_a_method(pool: WorkerPoolVecEnv) -> None:
    pool.env_method("stumble", 0)


def be_interrupted(pool: WorkerPoolVecEnv) -> None:
    pool.step_async(np.zeros((3, 2), np.float32))
    raise RuntimeError("it stumbled")


def fail_in_a_turn(pool: WorkerPoolVecEnv) -> None:
    actions = np.array([[-1, 0], [0, 0], [-1, 0]], np.float32)
    for turn in [pool.step_rows_async(rows, actions[rows]) for rows in pool.halves(np.zeros(3))]:
        pool.step_rows_wait(turn)


@pytest.mark.parametrize("fail", [fail_in_step, fail_in_reset, fail_in_a_method, be_interrupted, fail_in_a_turn])
def test_after_an_error_the_next_command_gets_its_own_answers(fail: Callable[[WorkerPoolVecEnv], None]) -> None:
    pool = WorkerPoolVecEnv([lambda i=i: Stumbling(i, length=9) for i in range(3)], 3)
    pool.reset()
    with pytest.raises(RuntimeError, match="it stumbled"):
        fail(pool)
    assert pool.get_attr("number") == [0, 1, 2]
    with pytest.raises(RuntimeError, match="it stumbled"):
        fail(pool)
    pool.set_options()
    pool.reset()
    for t in (1, 2):
        obs, _, dones, infos = pool.step(np.zeros((3, 2), np.float32))
        assert obs[:, 2].tolist() == [info["here"][2] for info in infos] == [t] * 3
        assert not dones.any()
    pool.close()


def test_a_step_whose_answer_a_later_command_dropped_is_an_error_and_not_a_wait() -> None:
    pool = WorkerPoolVecEnv(make_fns(2), 1)
    pool.reset()
    pool.step_async(np.zeros((2, 2), np.float32))
    pool.get_attr("number")
    with pytest.raises(RuntimeError, match="worker 0: the answer to a step was dropped by a later command"):
        pool.step_wait()
    pool.close()


def test_an_environment_that_cannot_be_made_is_an_error() -> None:
    def broken() -> gym.Env:
        raise ValueError("no such task")

    before = set(multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="environment worker 0 failed:[^$]*no such task") as error:
        WorkerPoolVecEnv([broken, CountingEnv], 2)
    assert set(multiprocessing.active_children()) <= before, f"workers that outlive {error.value}"


def test_a_dead_worker_is_an_error_and_not_a_wait() -> None:
    pool = WorkerPoolVecEnv(make_fns(2), 2)
    pool.reset()
    os.kill(pool._processes[1].pid, signal.SIGKILL)
    pool._processes[1].join(5)
    with pytest.raises(RuntimeError, match="environment worker 1 of 2 died with exit code -9"):
        pool.step(np.zeros((2, 2), np.float32))
    with pytest.raises(RuntimeError, match="environment worker 1 of 2 died with exit code -9"):
        step_in_turns(pool, np.zeros((2, 2), np.float32), np.zeros(2))
    pool.close()
    assert not any(process.is_alive() for process in pool._processes)
