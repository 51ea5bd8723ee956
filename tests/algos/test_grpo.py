"""GRPO: whose return counts for which step, against numbers worked out by hand; and that it learns."""

from __future__ import annotations

import math
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from rpd_sb3.algos import GRPO
from rpd_sb3.envs import EpisodeSeeds, make_vec_env
from rpd_sb3.labelling import VecTeacher
from tests.support.helpers import EchoTeacher
from tests.support.tiny_env import TINY, TinyEnv

N_STEPS = 6
SMALL: dict[str, Any] = {"n_steps": N_STEPS, "batch_size": 4, "n_epochs": 2, "device": "cpu", "seed": 0}

Episodes = list[tuple[int, float]]
"""(length, return) of one episode after the other; the last one is repeated."""

# Two groups of three. After 6 steps:
#   first group:  returns (1, 2, 6) in the first episode; (4, 4, 4), all equal, in the second; the third is cut off in
#                 environment 0, so that it counts in nobody, though 1 and 2 have completed it
#   second group: returns (0, 0, 3) in the first; environment 3 takes all the time for that
PLAN: list[Episodes] = [
    [(2, 1.0), (3, 4.0), (9, 9.0)],
    [(3, 2.0), (2, 4.0), (1, 9.0)],
    [(1, 6.0), (1, 4.0), (4, 0.0)],
    [(6, 0.0)],
    [(2, 0.0), (4, 5.0)],
    [(3, 3.0), (2, 1.0), (9, 1.0)],
]
SPREAD = math.sqrt(14 / 3)  # of 1, 2, 6, whose mean is 3
LOW, MIDDLE, HIGH = -2 / SPREAD, -1 / SPREAD, 3 / SPREAD
LOSS, WIN = -1 / math.sqrt(2), 2 / math.sqrt(2)  # of 0, 0, 3: mean 1, std sqrt 2
ADVANTAGES = np.array(
    [
        [LOW, LOW, 0, 0, 0, 0],
        [MIDDLE, MIDDLE, MIDDLE, 0, 0, 0],
        [HIGH, 0, 0, 0, 0, 0],
        [LOSS, LOSS, LOSS, LOSS, LOSS, LOSS],
        [LOSS, LOSS, 0, 0, 0, 0],
        [WIN, WIN, WIN, 0, 0, 0],
    ]
)
RTOL = 4e-6  # group_advantage adds 1e-6 to the std, and is float32
MIXED = 17 / 36  # share of transitions in episodes of groups with different returns
COMPLETE = 23 / 36  # of those whose group is complete, alike or not


class Plan(gym.Env):
    """Episodes go as planned, whatever one does: the return comes with the first step, the time limit with the last."""

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.observation_space, self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32), spaces.Discrete(3)
        self.episode, self.t = -1, 0

    def begin_group(self, seed: int | None) -> None:
        self.episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = min(self.episode + 1, len(self.episodes) - 1), 0
        return self._obs(), {}

    def _obs(self) -> np.ndarray:
        return np.array([self.episode, self.t], np.float32) / 20

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        length, total = self.episodes[self.episode]
        return self._obs(), total if self.t == 1 else 0.0, False, self.t >= length, {}


def make_venv(plan: list[Episodes] = PLAN) -> DummyVecEnv:
    return DummyVecEnv([lambda episodes=episodes: Monitor(Plan(episodes)) for episodes in plan])


def make_model(plan: list[Episodes] = PLAN, **kwargs: Any) -> GRPO:
    return GRPO("MlpPolicy", make_venv(plan), **{**SMALL, "group_size": 3, **kwargs})


def advantages(model: GRPO) -> np.ndarray:
    """Those that the last update used, ``(n_envs, n_steps)``."""
    return model.rollout_buffer.advantages.reshape(model.n_envs, model.n_steps)  # flattened environment by environment


def parameters(model: PPO) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


def changed(model: PPO, before: dict[str, th.Tensor]) -> set[str]:
    return {name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])}


@pytest.mark.parametrize("rollouts", [1, 2])
def test_all_steps_of_a_complete_episode_get_its_advantage_in_the_group(rollouts: int) -> None:
    model = make_model().learn(rollouts * 36)
    np.testing.assert_allclose(advantages(model), ADVANTAGES / MIXED, rtol=RTOL)
    assert {name: model.logger.name_to_value[f"rollout/{name}"] for name in ("groups", "mixed_groups")} == {
        "groups": 3,
        "mixed_groups": 2,
    }
    assert model.logger.name_to_value["rollout/kept_transitions"] == pytest.approx(MIXED)


def test_without_the_filter_equal_groups_count_in_the_mean() -> None:
    model = make_model(filter_groups=False).learn(36)
    np.testing.assert_allclose(advantages(model), ADVANTAGES / COMPLETE, rtol=RTOL)
    assert model.logger.name_to_value["rollout/kept_transitions"] == pytest.approx(COMPLETE)


def test_mean_over_the_rollout_is_the_mean_over_the_kept_transitions() -> None:
    model = make_model().learn(36)
    assert advantages(model).mean() == pytest.approx(ADVANTAGES[ADVANTAGES != 0].mean(), rel=1e-5)


@pytest.mark.parametrize("kwargs", [{"gamma": 0.1}, {"gae_lambda": 0.0}, {"learning_rate": 1.0}])
def test_neither_discount_nor_critic_have_a_say(kwargs: dict[str, Any]) -> None:
    np.testing.assert_allclose(advantages(make_model(**kwargs).learn(72)), ADVANTAGES / MIXED, rtol=RTOL)


def test_groups_are_neighbours() -> None:
    plan: list[Episodes] = [[(6, 1.0)], [(6, 3.0)], [(6, 5.0)], [(6, 4.0)]]
    model = make_model(plan, group_size=2).learn(24)
    np.testing.assert_allclose(advantages(model), np.repeat([[-1.0], [1.0], [1.0], [-1.0]], 6, axis=1), rtol=RTOL)


def test_an_aborted_rollout_leaves_no_traces() -> None:
    class Abort(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls != 4

    model = make_model().learn(36, callback=Abort())
    model.learn(36, reset_num_timesteps=False)
    np.testing.assert_allclose(advantages(model), ADVANTAGES / MIXED, rtol=RTOL)


def test_each_rollout_begins_with_new_episodes() -> None:
    model = make_model().learn(72)
    starts = model.rollout_buffer.episode_starts
    expected = np.zeros((6, 6))
    for env, steps in enumerate([[0, 2, 5], [0, 3, 5], [0, 1, 2], [0], [0, 2], [0, 3, 5]]):
        expected[steps, env] = 1
    np.testing.assert_array_equal(starts, expected)


def test_only_the_actor_learns() -> None:
    model = make_model()
    before = parameters(model)
    model.learn(36)
    actor = {name for name in before if name.startswith(("mlp_extractor.policy_net", "action_net"))}
    assert changed(model, before) == actor != set()


def test_groups_of_equal_returns_change_nothing() -> None:
    model = make_model([[(2, 7.0)]] * 6, filter_groups=False)
    before = parameters(model)
    model.learn(36)
    assert changed(model, before) == set()
    assert model.logger.name_to_value["rollout/mixed_groups"] == 0


def test_episodes_longer_than_the_rollout_change_nothing() -> None:
    model = make_model([[(7, float(env))] for env in range(6)])
    before = parameters(model)
    model.learn(36)
    assert changed(model, before) == set()
    assert model.logger.name_to_value["rollout/groups"] == 0


def test_one_return_that_differs_changes_the_policy() -> None:
    model = make_model([[(2, 7.0)]] * 5 + [[(2, 8.0)]])
    before = parameters(model)
    model.learn(36)
    assert changed(model, before) != set()


def test_upper_side_of_the_clip_range_is_used() -> None:
    trained = [
        parameters(make_model(clip_range=0.02, clip_range_high=high, n_epochs=6, learning_rate=1e-2).learn(36))
        for high in (None, 0.02, 0.5)
    ]
    assert all(th.equal(value, trained[1][name]) for name, value in trained[0].items())
    assert not all(th.equal(value, trained[2][name]) for name, value in trained[0].items())


def test_returns_may_come_from_a_vec_monitor() -> None:
    venv = VecMonitor(DummyVecEnv([lambda episodes=episodes: Plan(episodes) for episodes in PLAN]))
    model = GRPO("MlpPolicy", venv, group_size=3, **SMALL).learn(36)
    np.testing.assert_allclose(advantages(model), ADVANTAGES / MIXED, rtol=RTOL)


def test_it_needs_a_monitor() -> None:
    venv = DummyVecEnv([lambda: Plan([(2, 1.0)])] * 2)
    with pytest.raises(ValueError, match=r"^GRPO needs episodes' returns: wrap each env in SB3's Monitor$"):
        GRPO("MlpPolicy", venv, group_size=2, **SMALL).learn(12)


@pytest.mark.parametrize("group_size", [-1, 0, 1])
def test_a_group_has_at_least_two_members(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"^GRPO: group_size={group_size} must be at least 2$"):
        make_model(group_size=group_size)


@pytest.mark.parametrize("group_size", [4, 5, 12])
def test_groups_must_divide_the_environments(group_size: int) -> None:
    with pytest.raises(ValueError, match=f"^group_size={group_size} must divide n_envs=6$"):
        make_model(group_size=group_size)


def test_environments_that_cannot_start_alike_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match=r"^group_size=2 needs environments that can start alike"):
        GRPO("MlpPolicy", DummyVecEnv([lambda: Monitor(TinyEnv())] * 2), group_size=2, **SMALL)


@pytest.mark.parametrize("teacher", [False, True])
def test_members_of_a_group_act_from_the_same_initial_states(teacher: bool) -> None:
    with closing(make_vec_env(TINY, 4, vec_env="dummy", stop=True)) as venv:
        space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        model = GRPO(
            "MlpPolicy", VecTeacher(venv, EchoTeacher(space=space)) if teacher else venv, group_size=2,
            **{**SMALL, "n_steps": 40},
        )  # fmt: skip
        model.learn(160)
        model.set_random_seed(1)  # seeds that the next reset would take
        model.learn(160, reset_num_timesteps=False)
    buffer: Any = model.rollout_buffer
    observations = buffer.observations.reshape(4, 40, 2)
    starts = [observations[env, buffer.episode_starts[:, env] == 1].tolist() for env in range(4)]
    assert min(map(len, starts)) >= 4
    assert all(a == b for first in (0, 2) for a, b in zip(starts[first], starts[first + 1]))
    assert starts[0][0] != starts[2][0]


class Bandit(gym.Env):
    """Which of four contexts it is decides which arm pays 1, and how much each of them pays anyway."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = spaces.Box(0.0, 1.0, (4,), np.float32), spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.context = int(self.np_random.integers(4))
        return np.eye(4, dtype=np.float32)[self.context], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = 10.0 * self.context + float(int(action) == (self.context + 1) % 4)
        return np.zeros(4, np.float32), reward, True, False, {}


class Shuffled(GRPO):
    """Control: the same advantages, but those of others."""

    def prepare_rollout(self) -> None:
        super().prepare_rollout()
        flat = self.rollout_buffer.advantages.flatten()
        self.rollout_buffer.advantages = np.random.default_rng(0).permutation(flat).reshape(-1, self.n_envs)


@pytest.mark.parametrize(("algorithm", "learns"), [(GRPO, True), (Shuffled, False)])
def test_it_learns_which_arm_pays_in_which_context(algorithm: type[GRPO], learns: bool) -> None:
    venv = DummyVecEnv([lambda: Monitor(EpisodeSeeds(Bandit()))] * 8)
    kwargs: dict[str, Any] = {"n_steps": 32, "batch_size": 128, "n_epochs": 4, "learning_rate": 1e-2}
    model = algorithm("MlpPolicy", venv, group_size=8, seed=0, device="cpu", **kwargs)
    model.learn(256 * 12)
    right = model.predict(np.eye(4, dtype=np.float32), deterministic=True)[0] == (np.arange(4) + 1) % 4
    assert right.all() == learns


def test_saved_model_is_the_same_and_goes_on_learning(tmp_path: Path) -> None:
    model = make_model(filter_groups=False, clip_range_high=0.3).learn(36)
    model.save(tmp_path / "model")
    loaded = GRPO.load(tmp_path / "model", env=make_venv())
    settings = ("group_size", "filter_groups", "clip_range_high", "vf_coef", "normalize_advantage")
    assert [getattr(loaded, name) for name in settings] == [3, False, 0.3, 0.0, False]
    assert changed(loaded, parameters(model)) == set()
    before = parameters(loaded)
    loaded.learn(36, reset_num_timesteps=False)
    assert loaded.num_timesteps == 72
    assert changed(loaded, before) != set()
    np.testing.assert_allclose(advantages(loaded), ADVANTAGES / COMPLETE, rtol=RTOL)


def test_saved_model_acts_without_an_environment(tmp_path: Path) -> None:
    model = make_model()
    model.save(tmp_path / "model")
    obs = np.random.default_rng(0).uniform(-1, 1, (20, 2)).astype(np.float32)
    actions = [each.predict(obs, deterministic=True)[0] for each in (model, GRPO.load(tmp_path / "model"))]
    np.testing.assert_array_equal(*actions)


def test_saved_model_is_not_loaded_for_environments_that_its_groups_do_not_divide(tmp_path: Path) -> None:
    make_model().save(tmp_path / "model")
    with pytest.raises(ValueError, match="^group_size=3 must divide n_envs=4$"):
        GRPO.load(tmp_path / "model", env=make_venv(PLAN[:4]))


def test_the_same_seed_gives_the_same_model() -> None:
    def train(seed: int) -> dict[str, th.Tensor]:
        with closing(make_vec_env(TINY, 4, vec_env="dummy", stop=True)) as venv:
            return parameters(
                GRPO("MlpPolicy", venv, group_size=2, **{**SMALL, "n_steps": 20, "seed": seed}).learn(160)
            )

    first, again, other = train(1), train(1), train(2)
    assert all(th.equal(value, again[name]) for name, value in first.items())
    assert not all(th.equal(value, other[name]) for name, value in first.items())


def test_initial_states_follow_from_the_seed() -> None:
    def initial(seed: int) -> list[float]:
        with closing(make_vec_env(TINY, 2, vec_env="dummy")) as venv:
            model = GRPO("MlpPolicy", venv, group_size=2, **{**SMALL, "seed": seed}).learn(12)
        return model.rollout_buffer.observations.reshape(-1, 2)[0].tolist()

    first, again, other = initial(1), initial(1), initial(2)
    assert first == again != other
