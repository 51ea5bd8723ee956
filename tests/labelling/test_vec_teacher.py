"""VecTeacher and TeacherWrapper: whose label belongs to which transition, and what happens when the teacher fails."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.labelling import TeacherWrapper, VecTeacher, pending
from rpd_sb3.teachers import Labels, Query
from tests.support.helpers import ACTION_SPACE, CountingEnv, EchoTeacher


def make_venv(n: int = 2, **kwargs: object) -> VecEnv:
    # different lengths, so that environments reset at different times
    return DummyVecEnv([lambda i=i: CountingEnv(number=i, length=3 + i, **kwargs) for i in range(n)])


def act(venv: VecEnv) -> tuple:
    return venv.step(np.zeros((venv.num_envs, 2), np.float32))


def with_memory(teacher: EchoTeacher) -> EchoTeacher:
    object.__setattr__(teacher.spec, "stateful", True)
    return teacher


@pytest.mark.parametrize("teacher_view", [False, True])
@pytest.mark.parametrize("wait", [False, True])
def test_label_belongs_to_the_observation_acted_on_across_resets(teacher_view: bool, wait: bool) -> None:
    venv = VecTeacher(make_venv(3, teacher_view=teacher_view), EchoTeacher(), wait=wait)
    obs = venv.reset()
    assert venv.observation_space.shape == obs.shape[1:] == (3,), "the student does not see the teacher's view"
    for _ in range(20):
        acted_on = obs
        obs, _, dones, infos = act(venv)
        given = np.stack([np.asarray(info["teacher_action"]) for info in infos])
        np.testing.assert_array_equal(given, acted_on[:, 1:3])
        for env in np.flatnonzero(dones):
            assert infos[env]["terminal_observation"][2] == 3 + env, "the student's view of the last observation"
            assert obs[env][2] == 0


def test_values_are_lazy_unless_asked_to_wait() -> None:
    go = threading.Event()  # the teacher answers only after the step has returned
    venv = VecTeacher(make_venv(), EchoTeacher(lambda query: go.wait(10) and query.inputs["state"][:, 1:3]))
    venv.reset()
    _, _, _, infos = act(venv)
    assert repr(infos[0]["teacher_action"]) == "LazyLabel('action', waiting)"
    go.set()
    np.testing.assert_array_equal(np.asarray(infos[1]["teacher_action"]), [0, 0])


def test_each_observation_is_labelled_exactly_once() -> None:
    teacher = EchoTeacher()
    venv = VecTeacher(make_venv(), teacher)
    venv.reset()
    for _ in range(10):
        for info in act(venv)[3]:
            np.asarray(info["teacher_action"]), np.asarray(info["teacher_action"])
    assert sum(len(query.env_ids) for query in teacher.queries) == 10 * venv.num_envs == venv.n_labels


def test_query_tells_environments_episode_starts_and_student_actions() -> None:
    teacher = EchoTeacher()
    venv = VecTeacher(make_venv(), teacher, wait=True)
    venv.reset()
    for step in range(4):
        venv.step(np.full((2, 2), step, np.float32))
    np.testing.assert_array_equal(teacher.queries[0].env_ids, [0, 1])
    starts = np.array([query.episode_starts for query in teacher.queries])
    np.testing.assert_array_equal(starts, [[True, True], [False, False], [False, False], [True, False]])
    np.testing.assert_array_equal([query.actions[0, 0] for query in teacher.queries], [0, 1, 2, 3])


def test_teacher_inputs_are_copies() -> None:
    teacher = EchoTeacher()
    venv = VecTeacher(make_venv(), teacher, wait=True)
    obs = venv.reset()
    obs[:] = 99.0
    act(venv)
    assert teacher.queries[0].inputs["state"].max() < 99


def test_label_fraction_labels_a_share_and_nothing_at_zero() -> None:
    teacher = EchoTeacher()
    venv = VecTeacher(make_venv(), teacher, label_fraction=0.25)
    venv.reset()
    n = sum("teacher_action" in info for _ in range(400) for info in act(venv)[3])
    assert n == venv.n_labels
    assert 140 < n < 260  # 800 transitions; 200 +- 5 std
    venv.set_label_fraction(0.0)
    assert not any("teacher_action" in info for info in act(venv)[3])
    assert venv.n_labels == n


def test_partial_labels_belong_to_their_environments() -> None:
    venv = VecTeacher(make_venv(5), EchoTeacher(lambda query: query.inputs["state"][:, :2]), label_fraction=0.5)
    venv.reset()
    for _ in range(10):
        for env, info in enumerate(act(venv)[3]):
            assert "teacher_action" not in info or np.asarray(info["teacher_action"])[0] == env


def test_label_answers_for_the_current_observation() -> None:
    venv = VecTeacher(make_venv(), EchoTeacher())
    venv.reset()
    obs = act(venv)[0]
    np.testing.assert_array_equal(venv.label()["action"], obs[:, 1:3])


def test_gap_in_the_questions_is_a_fresh_start_for_a_teacher_with_a_memory() -> None:
    teacher = EchoTeacher()
    venv = VecTeacher(make_venv(1), teacher, wait=True)  # episodes of 3 steps
    venv.reset()
    for fraction in (1.0, 0.0, 1.0, 1.0, 1.0):
        venv.set_label_fraction(fraction)
        act(venv)
    assert [query.episode_starts[0] for query in teacher.queries] == [True, True, True, False]


def test_label_and_step_are_one_question_to_a_teacher_with_a_memory() -> None:
    teacher = with_memory(EchoTeacher())
    venv = VecTeacher(make_venv(), teacher, label_fraction=0.0)
    venv.reset()
    for _ in range(4):
        answer = venv.label()["action"]
        infos = act(venv)[3]
        np.testing.assert_array_equal([np.asarray(info["teacher_action"]) for info in infos], answer)
    starts = [query.episode_starts.tolist() for query in teacher.queries]
    assert starts == [[True, True], [False, False], [False, False], [True, False]]


@pytest.mark.parametrize("space", [spaces.Box(-1, 1, (3,)), spaces.Box(-2, 2, (2,)), spaces.Discrete(4)])
def test_teacher_for_other_actions_is_refused(space: spaces.Space) -> None:
    with pytest.raises(ValueError, match="gives actions of .*, but the environment takes"):
        VecTeacher(make_venv(), EchoTeacher(space=space))


class ImageEnv(gym.Env):
    def __init__(self, size: int = 8) -> None:
        image = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict({"state": spaces.Box(-1, 1, (2,)), "teacher/images.human": image})
        self.action_space = ACTION_SPACE

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def test_teacher_for_other_image_sizes_or_inputs_is_refused() -> None:
    teacher = EchoTeacher()
    object.__setattr__(teacher.spec, "inputs", ("images.human",))
    object.__setattr__(teacher.spec, "image_sizes", {"human": (16, 16)})
    with pytest.raises(ValueError, match="needs images of 16x16 pixels from camera 'human'.*gives 8x8"):
        VecTeacher(DummyVecEnv([ImageEnv]), teacher)
    object.__setattr__(teacher.spec, "inputs", ("images.base",))
    with pytest.raises(ValueError, match=r"needs the input 'images.base'.*shows it \['images.human'\]"):
        VecTeacher(DummyVecEnv([ImageEnv]), teacher)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"on_failure": "ignore"}, "on_failure='ignore' is unknown"),
        ({"timeout": 0}, "timeout=0 must be positive"),
        ({"timeout": "60"}, "timeout='60' must be positive"),
        ({"patience": True}, "patience=True must be positive"),
        ({"patience": float("inf")}, "patience=inf must be positive and finite"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"VecTeacher: {message}"):
        VecTeacher(make_venv(), EchoTeacher(), **kwargs)
    with pytest.raises(ValueError, match=f"TeacherWrapper: {message}"):
        TeacherWrapper(CountingEnv(), EchoTeacher(), **kwargs)


def test_a_share_of_labels_lies_between_0_and_1() -> None:
    for wrapped in (VecTeacher(make_venv(), EchoTeacher()), TeacherWrapper(CountingEnv(), EchoTeacher())):
        with pytest.raises(ValueError, match="label_fraction=1.5 must lie between 0 and 1"):
            wrapped.set_label_fraction(1.5)


def test_labels_of_one_environment_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="on_failure='skip' is for VecTeacher"):
        TeacherWrapper(CountingEnv(), EchoTeacher(), on_failure="skip")


def test_labels_of_a_teacher_with_a_memory_cannot_be_skipped() -> None:
    teacher = with_memory(EchoTeacher())
    with pytest.raises(ValueError, match="on_failure='skip' would leave gaps in the memory of teacher 'echo'"):
        VecTeacher(make_venv(), teacher, on_failure="skip")


def test_a_teacher_with_a_memory_is_asked_when_it_has_answered_about_the_step_before() -> None:
    class Checking(EchoTeacher):
        answer: Future[Labels] | None = None

        def submit(self, query: Query) -> Future[Labels]:
            assert self.answer is None or self.answer.done()
            self.answer = super().submit(query)
            return self.answer

    def slow(query: Query) -> np.ndarray:
        time.sleep(0.01)
        return query.inputs["state"][:, 1:3]

    venv = VecTeacher(make_venv(), with_memory(Checking(slow)))
    venv.reset()
    for _ in range(3):
        act(venv)
    venv.label()


def test_the_time_of_labels_can_be_read_while_answers_come() -> None:
    class Slow(deque):
        """Lets the teacher's thread go on while it is read."""

        def __iter__(self) -> Iterator[Any]:
            for item in super().__iter__():
                time.sleep(0)
                yield item

    venv = VecTeacher(make_venv(), EchoTeacher())
    venv._times = Slow(maxlen=20)
    venv.reset()
    act(venv)
    done = threading.Event()
    thread = threading.Thread(target=lambda: [act(venv) for _ in iter(done.is_set, True)])
    thread.start()
    try:
        for _ in range(10):
            assert venv.label_time is None or venv.label_time.batch == 2
    finally:
        done.set()
        thread.join()


def test_teacher_wrapper_passes_check_env() -> None:
    check_env(TeacherWrapper(CountingEnv(teacher_view=True), EchoTeacher()), warn=True)


def test_teacher_wrapper_labels_the_observation_acted_on() -> None:
    env = TeacherWrapper(CountingEnv(teacher_view=True), EchoTeacher())
    obs, _ = env.reset()
    for _ in range(8):
        acted_on = obs
        obs, _, terminated, _, info = env.step(np.zeros(2, np.float32))
        np.testing.assert_array_equal(info["teacher_action"], acted_on[1:3])
        if terminated:
            obs, _ = env.reset()


def drawn(env: TeacherWrapper, seed: int | None = None) -> list[bool]:
    """Which of 40 steps carry a label."""
    env.set_label_fraction(0.5)
    env.reset(seed=seed)
    return ["teacher_action" in env.step(np.zeros(2, np.float32))[4] for _ in range(40)]


@pytest.mark.parametrize("by", ["argument", "reset"])
def test_wrapped_environments_draw_labels_of_their_own_and_runs_repeat(by: str) -> None:
    def draw(seed: int) -> list[bool]:
        env = TeacherWrapper(CountingEnv(length=99), EchoTeacher(), seed=seed if by == "argument" else None)
        return drawn(env, seed if by == "reset" else None)

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_wrapped_environments_without_a_seed_do_not_all_label_the_same_steps() -> None:
    first, second = (TeacherWrapper(CountingEnv(length=99), EchoTeacher()) for _ in range(2))
    assert drawn(first) != drawn(second)


def test_label_and_step_of_a_wrapped_environment_are_one_question_to_a_teacher_with_a_memory() -> None:
    teacher = with_memory(EchoTeacher())
    env = TeacherWrapper(CountingEnv(), teacher)
    env.set_label_fraction(0.0)
    env.reset()
    for _ in range(2):
        answer = env.label()["action"]
        info = env.step(np.zeros(2, np.float32))[4]
        np.testing.assert_array_equal(info["teacher_action"], answer[0])
    env.reset()
    env.step(np.zeros(2, np.float32))  # is not asked about
    env.label()
    assert [bool(query.episode_starts[0]) for query in teacher.queries] == [True, False, True]


def test_label_and_step_of_a_wrapped_environment_are_two_questions_to_any_other_teacher() -> None:
    teacher = EchoTeacher()
    env = TeacherWrapper(CountingEnv(), teacher)
    env.reset()
    env.label()
    env.step(np.ones(2, np.float32))
    assert [query.actions is None for query in teacher.queries] == [True, False]  # it may score the action


def test_time_of_a_label_is_that_of_a_query_over_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(EchoTeacher):
        """Takes 8 s, then 4 s, then 2 s, on a clock of its own."""

        clock, seconds = 0.0, [8.0, 4.0, 2.0]

        def submit(self, query: Query) -> Future[Labels]:
            answer: Future[Labels] = Future()
            Slow.clock += self.seconds[len(self.queries)] if query.actions is not None else 100.0
            answer.set_result(self.label(query))
            return answer

    monkeypatch.setattr(pending.time, "monotonic", lambda: Slow.clock)
    venv = VecTeacher(DummyVecEnv([CountingEnv] * 4), Slow())
    assert venv.label_time is None
    venv.reset()
    for _ in range(3):
        venv.step(np.zeros((4, 2), np.float32))
    assert venv.label_time == (1.0, 4)
    venv.label()  # nobody steps meanwhile
    assert venv.label_time == (1.0, 4)
