"""VecTeacher where the teacher acts: who acts when, one label for each observation, and what it costs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.contract.bins import to_clipped_actions
from rpd_sb3.envs import ActionTokens, make_vec_env
from rpd_sb3.envs.worker_pool import WorkerPoolVecEnv
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.labelling.take_over import TakeOvers, steps_of_the_limit
from rpd_sb3.teachers import Labels, Query, TeacherError
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from tests.support.helpers import CountingEnv, EchoTeacher
from tests.support.serving_helpers import serving

N = 5


class Recorded(CountingEnv):
    """Tells what it did."""

    def step(self, action: np.ndarray) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward + self.t, terminated, truncated, info | {"did": np.array(action)}


def dummy(n: int = N, **kwargs: Any) -> VecEnv:
    # different lengths, so that environments reset at different times
    return DummyVecEnv([lambda i=i: Recorded(number=i, length=3 + i, **kwargs) for i in range(n)])


def pool(n: int = N, **kwargs: Any) -> VecEnv:
    return WorkerPoolVecEnv([lambda i=i: Recorded(number=i, length=3 + i, **kwargs) for i in range(n)], 2)


both = pytest.mark.parametrize("make", [dummy, pool])


def answer(query: Query) -> np.ndarray:
    """One number for each observation: of environment, episode and step; beyond the actions' bounds now and then."""
    return query.inputs["state"] @ np.array([[0.1, 0.0], [0.01, 0.0], [0.0, 0.3]], np.float32)


def with_memory(teacher: EchoTeacher) -> EchoTeacher:
    object.__setattr__(teacher.spec, "stateful", True)
    return teacher


class Rollout:
    """A rollout with random actions of the student's: everything that came of it, step by step."""

    def __init__(self, venv: VecTeacher, n_steps: int = 30) -> None:
        rng = np.random.default_rng(0)
        self.obs = [np.array(venv.reset())]
        self.actions, self.rewards, self.dones, self.infos = [], [], [], []
        for _ in range(n_steps):
            self.actions.append(rng.uniform(-1, 1, (venv.num_envs, 2)).astype(np.float32))
            obs, rewards, dones, infos = venv.step(self.actions[-1])
            self.obs.append(np.array(obs))
            self.rewards.append(rewards)
            self.dones.append(dones)
            self.infos.append(infos)
        self.acted = np.array([[info["teacher_acted"] for info in infos] for infos in self.infos])
        self.labels = np.array([[np.asarray(info["teacher_action"]) for info in infos] for infos in self.infos])
        self.did = np.array([[info["did"] for info in infos] for infos in self.infos])


@both
@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_every_observation_gets_one_label_and_that_is_what_the_teacher_does(
    make: Callable[[], VecEnv], stateful: bool, share: float
) -> None:
    teacher = EchoTeacher(answer)
    with closing(make()) as envs:
        venv = VecTeacher(envs, with_memory(teacher) if stateful else teacher, teacher_share=share, take_over_steps=3)
        rollout = Rollout(venv)
        venv.label()  # what the teacher still has to say
    acted_on = np.array(rollout.obs[:-1])
    expected = answer(Query({"state": acted_on.reshape(-1, 3)}, np.zeros(0), np.zeros(0))).reshape(
        *acted_on.shape[:2], 2
    )
    np.testing.assert_array_equal(rollout.labels, expected)
    asked = Counter(tuple(row) for query in teacher.queries for row in query.inputs["state"].tolist())
    assert set(asked.values()) == {1}, "asked once"
    assert asked.keys() == {tuple(row) for row in np.array(rollout.obs).reshape(-1, 3).tolist()}, "about each"
    assert sum(asked.values()) == venv.n_labels == 31 * N
    assert 0.2 < rollout.acted.mean() < 0.9
    assert venv.n_taught == rollout.acted.sum()
    executed = np.where(rollout.acted[..., None], rollout.labels.clip(-1, 1), rollout.actions)
    np.testing.assert_array_equal(rollout.did, executed)
    for infos, did in zip(rollout.infos, rollout.did):
        for env, info in enumerate(infos):
            assert ("executed_action" in info) == info["teacher_acted"]
            np.testing.assert_array_equal(info.get("executed_action", did[env]), did[env])


def test_a_step_in_turns_is_the_step_at_once() -> None:
    at_once, in_turns = (
        Rollout(VecTeacher(envs, EchoTeacher(answer), teacher_share=0.7, take_over_steps=3))
        for envs in (dummy(), pool())
    )
    for name in ("obs", "rewards", "dones", "acted", "labels", "did"):
        np.testing.assert_array_equal(getattr(at_once, name), getattr(in_turns, name), strict=True)
    for ours, theirs in zip(at_once.infos, in_turns.infos):
        for mine, other in zip(ours, theirs):
            assert mine.keys() == other.keys()
            for key in mine.keys() & {"terminal_observation", "teachers_episode"}:
                np.testing.assert_array_equal(mine[key], other[key])


@both
def test_a_teacher_with_a_memory_sees_each_episode_in_order_without_gaps(make: Callable[[], VecEnv]) -> None:
    class Checking(EchoTeacher):
        last: Future[Labels] | None = None

        def submit(self, query: Query) -> Future[Labels]:
            assert self.last is None or self.last.done(), "the question before is not answered yet"
            assert query.number == len(numbers)
            numbers.append(query.number)
            self.last = super().submit(query)
            return self.last

    def slow(query: Query) -> np.ndarray:
        time.sleep(0.001)
        return answer(query)

    numbers: list[int] = []
    teacher = with_memory(Checking(slow))
    with closing(make()) as envs:
        venv = VecTeacher(envs, teacher, teacher_share=0.6, take_over_steps=3)
        for _ in range(2):  # a reset in the middle of episodes
            Rollout(venv, 20)
    seen: dict[int, list[tuple[int, int]]] = {env: [] for env in range(N)}
    for query in teacher.queries:
        for env, start, (number, episode, step) in zip(query.env_ids, query.episode_starts, query.inputs["state"]):
            assert number == env
            assert start == (step == 0)
            seen[int(env)].append((int(episode), int(step)))
    for questions in seen.values():
        for (episode, step), following in zip(questions, questions[1:]):
            assert following == (episode, step + 1) or (following[0] > episode and following[1] == 0)


def test_where_the_teacher_acts_it_has_seen_no_action_of_the_student() -> None:
    teacher = EchoTeacher(answer)
    rollout = Rollout(VecTeacher(dummy(), teacher, teacher_share=0.5, take_over_steps=3))
    scored = {
        tuple(row): query.actions is not None for query in teacher.queries for row in query.inputs["state"].tolist()
    }
    for obs, acted in zip(rollout.obs[:-1], rollout.acted):
        assert [not scored[tuple(row)] for row in obs.tolist()] == acted.tolist()


def test_the_student_begins_and_the_teacher_finishes() -> None:
    rollout = Rollout(VecTeacher(dummy(), EchoTeacher(answer), teacher_share=1.0, take_over_steps=3), 60)
    starts = np.concatenate([np.ones((1, N), bool), rollout.dones[:-1]])
    continues = ~starts[1:] & rollout.acted[:-1]
    assert rollout.acted[1:][continues].all(), "to the end of the episode"
    assert all(info["teachers_episode"] for infos in rollout.infos for info in infos), "also before the teacher acts"
    begun = np.array(rollout.obs[:-1])[..., 2][~rollout.acted]
    assert begun.max() <= 2, "take_over_steps"


@pytest.mark.parametrize("at_start", [0.0, 0.3, 1.0])
def test_take_overs_are_uniform_beside_those_at_the_start(at_start: float) -> None:
    take_overs = TakeOvers(1, 10, at_start, seed=0)
    take_overs.set_share(0.5)
    at = []
    for _ in range(4000):
        take_overs.begin(np.array([0]))
        at.append(int(take_overs._at[0]))
    counts = np.bincount([step for step in at if step < 10], minlength=10)
    assert counts.sum() == pytest.approx(2000, abs=5 * 32)
    np.testing.assert_allclose(counts[1:] / counts.sum(), (1 - at_start) / 10, atol=0.03)
    assert counts[0] / counts.sum() == pytest.approx(at_start + (1 - at_start) / 10, abs=0.06)


def test_a_share_counts_for_episodes_that_have_not_made_a_step() -> None:
    venv = VecTeacher(dummy(), EchoTeacher(answer), take_over_steps=1)
    venv.reset()
    idle = np.zeros((N, 2), np.float32)
    assert all("teacher_acted" not in info for info in venv.step(idle)[3])
    venv.set_teacher_share(1.0)
    assert [info["teacher_acted"] for info in venv.step(idle)[3]] == [False] * N, "they have begun without it"
    venv.reset()
    assert [info["teacher_acted"] for info in venv.step(idle)[3]] == [True] * N
    venv.set_teacher_share(0.0)
    for _ in range(2 + N - 1):  # until the longest episode ends
        infos = venv.step(idle)[3]
        assert infos[-1]["teacher_acted"]
        assert not infos[0]["teacher_acted"] or infos[0]["here"][1] == infos[-1]["here"][1]
    assert all("teacher_acted" not in info for info in venv.step(idle)[3])


def test_a_share_that_is_taken_back_before_the_first_step_costs_no_second_question() -> None:
    teacher = EchoTeacher(answer)
    venv = VecTeacher(dummy(), teacher, teacher_share=1.0, take_over_steps=1)
    venv.reset()
    idle = np.zeros((N, 2), np.float32)
    while not venv.step(idle)[2][0]:
        pass
    venv.set_teacher_share(0.0)
    infos = venv.step(idle)[3]
    assert [info["teacher_acted"] for info in infos] == [False] + [True] * (N - 1)
    np.testing.assert_array_equal(np.asarray(infos[0]["teacher_action"]), [np.float32(0.01), 0.0])
    assert set(Counter(tuple(row) for q in teacher.queries for row in q.inputs["state"].tolist()).values()) == {1}


def test_a_fraction_of_labels_is_one_of_the_students_transitions() -> None:
    venv = VecTeacher(dummy(), EchoTeacher(answer), label_fraction=0.0, teacher_share=0.5, take_over_steps=3)
    venv.reset()
    infos = [info for _ in range(30) for info in venv.step(np.zeros((N, 2), np.float32))[3]]
    assert {("teacher_action" in info, info["teacher_acted"]) for info in infos} == {(True, True), (False, False)}
    assert venv.n_labels >= sum(info["teacher_acted"] for info in infos) > 0

    def labelled(share: float) -> list[bool]:
        venv = VecTeacher(dummy(), EchoTeacher(answer), label_fraction=0.5, teacher_share=share, take_over_steps=3)
        venv.reset()
        steps = [venv.step(np.zeros((N, 2), np.float32))[3] for _ in range(30)]
        return ["teacher_action" in info and not info.get("teacher_acted") for infos in steps for info in infos]

    alone, shared = labelled(0.0), labelled(0.5)
    assert any(alone[i] and not shared[i] for i in range(len(alone)))
    assert all(alone[i] for i in range(len(alone)) if shared[i]), "the same draws"


@both
def test_without_an_answer_the_student_acts(make: Callable[[], VecEnv]) -> None:
    def flaky(query: Query) -> np.ndarray:
        if 1 in query.inputs["state"][:, 2]:  # the second step of an episode
            raise TeacherError("busy")
        return answer(query)

    with closing(make(1)) as envs:
        venv = VecTeacher(
            envs, EchoTeacher(flaky), teacher_share=1.0, take_over_steps=1, on_failure="skip", take_over_at_start=1.0
        )
        rollout = Rollout(venv, 6)
    assert rollout.acted[:, 0].tolist() == [True, False, True] * 2
    assert [infos[0]["teachers_episode"] for infos in rollout.infos] == [True] * 6
    np.testing.assert_array_equal(rollout.did[1], rollout.actions[1])
    assert np.isnan(rollout.labels[1]).all()


def test_tokens_are_executed_with_the_environments_bounds() -> None:
    acted = []

    class Arm(CountingEnv):
        def step(self, action: np.ndarray) -> Any:
            acted.append(action)
            return super().step(action)

    bounds = (np.array([-0.5, -1.0]), np.array([0.5, 1.0]))
    venv = VecTeacher(
        DummyVecEnv([lambda: ActionTokens(Arm(length=5), 64, bounds)]),
        EchoTeacher(lambda query: query.inputs["state"][:, 1:3] / 8),
        teacher_share=1.0,
        take_over_steps=1,
    )
    venv.reset()
    infos = [venv.step(np.zeros((1, 2), int))[3][0] for _ in range(10)]
    wanted = np.array([np.asarray(info["teacher_action"]) for info in infos])
    assert np.abs(np.array(acted) - wanted).max() <= 1 / 63, "half a bin of the wider dimension"
    tokens = np.array([info["executed_action"] for info in infos])
    assert tokens.dtype == np.int64
    np.testing.assert_array_equal(to_clipped_actions(tokens, 64, bounds_of(venv)), acted)


def bounds_of(venv: VecTeacher) -> Any:
    return venv.get_attr("token_bounds")[0]


def test_a_service_acts_too() -> None:
    with serving(lambda: EchoTeacher(answer)) as service, closing(RemoteTeacher([service.url])) as teacher:
        remote = Rollout(VecTeacher(dummy(), teacher, teacher_share=0.5, take_over_steps=3))
    local = Rollout(VecTeacher(dummy(), EchoTeacher(answer), teacher_share=0.5, take_over_steps=3))
    assert local.acted.any()
    np.testing.assert_array_equal(remote.did, local.did)
    np.testing.assert_array_equal(remote.labels, local.labels)


class Limited(CountingEnv):
    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.spec = EnvSpec("Limited-v0", max_episode_steps=limit)


def test_by_default_the_teacher_takes_over_within_nine_tenths_of_the_time_limit() -> None:
    with closing(make_vec_env("PickCube-v1", 1, vec_env="dummy")) as envs:
        assert steps_of_the_limit(envs) == 45, "ManiSkill's wrapper knows it, its spec does not"
    venv = VecTeacher(DummyVecEnv([lambda: Limited(60), lambda: Limited(50)]), EchoTeacher(answer), teacher_share=0.5)
    assert venv._take_overs.steps == 45
    with closing(WorkerPoolVecEnv([lambda: gym.make("Pendulum-v1")], 1)) as envs:
        space = envs.action_space
        assert VecTeacher(envs, EchoTeacher(answer, space), teacher_share=1)._take_overs.steps == 180


@pytest.mark.parametrize("limits", [[None], [50, None]])
def test_without_a_time_limit_the_steps_are_asked_for(limits: list[int | None]) -> None:
    envs = DummyVecEnv([lambda limit=limit: Limited(limit) for limit in limits])
    with pytest.raises(ValueError, match="no time limit that take_over_steps=None could go by"):
        VecTeacher(envs, EchoTeacher(), teacher_share=0.5)
    VecTeacher(envs, EchoTeacher()).set_teacher_share(0.0)
    VecTeacher(envs, EchoTeacher(), take_over_steps=5).set_teacher_share(0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"teacher_share": 1.5}, "teacher_share=1.5 must lie between 0 and 1"),
        ({"teacher_share": float("nan")}, "teacher_share=nan must lie between 0 and 1"),
        ({"take_over_steps": 0}, "take_over_steps=0 must be a whole number of at least 1"),
        ({"take_over_steps": 2.5}, r"take_over_steps=2\.5 must be a whole number"),
        ({"take_over_at_start": -0.1}, r"take_over_at_start=-0\.1 must lie between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VecTeacher(dummy(), EchoTeacher(), **({"take_over_steps": 3} | kwargs))


def test_a_teacher_that_gives_no_action_cannot_act() -> None:
    teacher = EchoTeacher()
    object.__setattr__(teacher.spec, "labels", frozenset({"value"}))
    with pytest.raises(ValueError, match=r"teacher 'echo' cannot act: it gives the labels \['value'\] and no 'action'"):
        VecTeacher(dummy(), teacher, teacher_share=0.5, take_over_steps=3)


class Sleeping(CountingEnv):
    """Takes 8 ms for a step, asleep, so that the load of the machine counts little."""

    def step(self, action: np.ndarray) -> Any:
        time.sleep(0.008)
        return super().step(action)


def doze(query: Query) -> np.ndarray:
    """4 ms a label."""
    time.sleep(0.004 * len(query.env_ids))
    return np.zeros((len(query.env_ids), 2), np.float32)


def seconds(venv: VecTeacher, share: float, fraction: float, n_steps: int = 15) -> float:
    """Of a rollout with all of its labels."""
    venv.set_label_fraction(fraction)
    venv.set_teacher_share(share)
    venv.reset()
    start = time.monotonic()
    for _ in range(n_steps):
        infos = venv.step(np.zeros((8, 2), np.float32))[3]
    for info in infos if fraction else ():
        np.asarray(info["teacher_action"])
    return time.monotonic() - start


def compared_with_the_slower(venv: VecTeacher, share: float) -> float:
    """Time of a rollout over the greater of what the environments and the teacher need for it alone."""
    start = time.monotonic()
    for _ in range(15):
        doze(Query({}, np.arange(8), np.zeros(8, bool)))
    teacher = time.monotonic() - start
    return seconds(venv, share, 1.0) / max(seconds(venv, 0.0, 0.0), teacher)


def test_a_rollout_takes_as_long_as_the_slower_of_both_also_while_the_teacher_acts() -> None:
    """Environments of 32 ms a step, a teacher of 32 ms for the same observations. Of four tries, as the machine may be busy."""
    with closing(WorkerPoolVecEnv([lambda: Sleeping(length=20)] * 8, 2)) as envs:
        venv = VecTeacher(envs, EchoTeacher(doze), take_over_steps=10)
        for share in (1.0, 0.5):
            assert any(compared_with_the_slower(venv, share) <= 1.15 for _ in range(4))
        venv._pool = None  # all at once
        assert compared_with_the_slower(venv, 1.0) > 1.25


def test_an_episode_that_ends_before_its_take_over_is_not_one_of_the_student_alone() -> None:
    """Else only the failures among the teacher's episodes, which last long enough, would be left out of the success rate."""
    take_overs = TakeOvers(1000, 40, 0.0, 0)
    take_overs.set_share(0.5)
    teachers = take_overs.teachers.copy()
    assert 400 < teachers.sum() < 600
    take_overs.advance(np.arange(1000), np.zeros(1000, dtype=bool))
    np.testing.assert_array_equal(take_overs.teachers, teachers)
    assert take_overs.due.sum() < 50
