"""Groups of environments whose episodes start alike, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv

from rpd_sb3.envs import EpisodeSeeds, make_vec_env
from rpd_sb3.envs.groups import begin_groups
from rpd_sb3.labelling import VecTeacher
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv

N = 6
Starts = list[list[tuple[float, ...]]]
"""First observation of each episode, for each environment."""


class Careless(TinyEnv):
    """Its steps consume the generator that its initial states come from."""

    def step(self, action: np.ndarray) -> Any:
        self.np_random.random(3)
        return super().step(action)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def everyone_else(obs: np.ndarray) -> np.ndarray:
    """Even environments go to the goal and are soon done, odd ones stay until the time limit."""
    actions = np.clip((obs[:, 1:] - obs[:, :1]) / 0.3, -1.0, 1.0)
    actions[1::2] = np.sign(obs[1::2, :1] - obs[1::2, 1:])
    return actions


def play(venv: VecEnv, n_steps: int = 60, act: Callable[[Any], np.ndarray] = everyone_else) -> Starts:
    """From the next reset on."""
    obs = venv.reset()
    starts: Starts = [[tuple(row)] for row in obs.tolist()]
    for _ in range(n_steps):
        obs, _, dones, _ = venv.step(act(obs))
        for env in np.flatnonzero(dones):
            starts[env].append(tuple(obs[env].tolist()))
    return starts


def alike(*members: list[tuple[float, ...]]) -> bool:
    """The i-th start of each is the same, as far as each has come."""
    return all(len(set(ith)) == 1 for ith in zip(*members))


@pytest.fixture(params=["dummy", "subproc", "careless", "sb3's subproc"])
def venv(request: pytest.FixtureRequest) -> Iterator[VecEnv]:
    thunks = [lambda: Monitor(EpisodeSeeds(Careless(stop=True)))] * N
    if request.param == "careless":
        made: VecEnv = DummyVecEnv(thunks)
    elif request.param == "sb3's subproc":
        made = SubprocVecEnv(thunks)
    else:
        made = make_vec_env(TINY, N, seed=0, vec_env=request.param, stop=True)
    with closing(made):
        yield made


def test_members_start_alike_in_the_same_order_however_long_their_episodes(venv: VecEnv) -> None:
    begin_groups(venv, 3, rng())
    starts = play(venv)
    assert len(starts[0]) > len(starts[1]) + 2 > 6, "the episodes have different lengths"
    assert alike(*starts[:3])
    assert alike(*starts[3:])


@pytest.fixture
def tiny() -> Iterator[VecEnv]:
    with closing(make_vec_env(TINY, N, seed=0, vec_env="dummy", stop=True)) as made:
        yield made


def test_groups_start_differently(tiny: VecEnv) -> None:
    begin_groups(tiny, 2, rng())
    first, second, third = play(tiny)[::2]
    assert not set(first) & set(second)
    assert not set(second) & set(third)
    assert not set(first) & set(third)


def test_episodes_of_a_group_start_differently(tiny: VecEnv) -> None:
    begin_groups(tiny, 2, rng())
    for starts in play(tiny):
        assert len(set(starts)) == len(starts)


def test_new_groups_start_elsewhere(tiny: VecEnv) -> None:
    generator = rng()
    begin_groups(tiny, 2, generator)
    before = play(tiny)
    begin_groups(tiny, 2, generator)
    after = play(tiny)
    assert alike(*after[:2])
    assert not set(before[0]) & set(after[0])


def test_groups_follow_from_the_generator_alone(tiny: VecEnv) -> None:
    begin_groups(tiny, 2, rng())
    before = play(tiny)
    begin_groups(tiny, 2, rng())
    assert play(tiny) == before


def test_group_of_one_starts_like_nobody_else(tiny: VecEnv) -> None:
    begin_groups(tiny, 1, rng())
    assert len({starts[0] for starts in play(tiny, 0)}) == N


def test_a_seed_given_at_reset_wins_and_counts_as_no_episode() -> None:
    env, plain = EpisodeSeeds(TinyEnv()), TinyEnv()
    env.begin_group(5)
    first, second = env.reset()[0], env.reset()[0]
    env.begin_group(5)
    np.testing.assert_array_equal(env.reset()[0], first)
    np.testing.assert_array_equal(env.reset(seed=3)[0], plain.reset(seed=3)[0])
    np.testing.assert_array_equal(env.reset()[0], second)


def test_a_seed_given_to_the_vec_env_after_the_groups_wins_for_one_episode(tiny: VecEnv) -> None:
    begin_groups(tiny, 2, rng())
    tiny.seed(40)
    env = TinyEnv()
    for i, (first, *later) in enumerate(play(tiny)):
        assert first == tuple(env.reset(seed=40 + i)[0].tolist())
        assert later


@pytest.mark.parametrize("wrap", [lambda venv: venv, lambda venv: VecTeacher(venv, EchoTeacher(space=ACTIONS))])
def test_a_seed_given_before_the_groups_does_not_part_them(tiny: VecEnv, wrap: Callable[[VecEnv], VecEnv]) -> None:
    venv = wrap(tiny)
    venv.seed(40)  # SB3's set_random_seed does that, and the next reset may be long after
    begin_groups(venv, 2, rng())
    assert alike(*play(venv)[:2])


ACTIONS = spaces.Box(-1.0, 1.0, (1,), np.float32)


@pytest.mark.parametrize("grouped_before", [False, True])
def test_without_a_group_the_wrapper_changes_nothing(grouped_before: bool) -> None:
    env, plain = EpisodeSeeds(TinyEnv()), TinyEnv()
    if grouped_before:
        env.begin_group(5)
        env.reset()
        env.begin_group(None)
    for seed in (3, None, None):
        np.testing.assert_array_equal(env.reset(seed=seed)[0], plain.reset(seed=seed)[0])


def test_reset_options_are_passed_on() -> None:
    class Options(TinyEnv):
        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
            return super().reset(seed=seed)[0], {"options": options}

    env = EpisodeSeeds(Options())
    env.begin_group(5)
    assert env.reset(options={"hard": True})[1] == {"options": {"hard": True}}


@pytest.mark.parametrize("group_size", [-2, 0, 4, 12])
def test_groups_must_divide_the_environments(tiny: VecEnv, group_size: int) -> None:
    with pytest.raises(ValueError, match=f"^group_size={group_size} must divide n_envs={N}$"):
        begin_groups(tiny, group_size, rng())


def test_environments_that_cannot_start_alike_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^group_size=2 needs environments that can start alike: wrap each in .*Seeds"
    ):
        begin_groups(DummyVecEnv([TinyEnv] * 2), 2, rng())


def test_members_of_a_maniskill_group_see_the_same() -> None:
    pytest.importorskip("mani_skill")
    with closing(make_vec_env("PickCube-v1", 4, seed=0, vec_env="dummy", max_episode_steps=5)) as venv:
        begin_groups(venv, 2, rng())

        def step(obs: np.ndarray) -> np.ndarray:
            return np.random.default_rng(0).uniform(-1, 1, (4, 7)).astype(np.float32)  # another for each environment

        starts = play(venv, n_steps=5, act=step)
    assert [len(episodes) for episodes in starts] == [2] * 4
    assert alike(*starts[:2])
    assert alike(*starts[2:])
    assert len({start for episodes in starts for start in episodes}) == 4


def test_a_wrapper_of_gymnasium_may_lie_between() -> None:
    def make() -> gym.Env:
        return gym.wrappers.TimeLimit(EpisodeSeeds(TinyEnv()), 4)

    venv = DummyVecEnv([make] * 2)
    begin_groups(venv, 2, rng())
    assert alike(*play(venv))
