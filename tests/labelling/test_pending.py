"""What happens to a question without an answer, and which answers are usable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import OPD
from rpd_sb3.labelling import VecTeacher, pending
from rpd_sb3.labelling.pending import PendingLabels, RetryPolicy, check_labels
from rpd_sb3.labelling.views import check_spec
from rpd_sb3.teachers import Labels, Query, TeacherError, TeacherSpec, TeacherUnavailable
from tests.support.helpers import ACTION_SPACE, CountingEnv, EchoTeacher, SilentTeacher
from tests.support.token_helpers import SMALL, TOKENS, K, TokenTeacher, V
from tests.support.token_helpers import make_venv as make_token_venv

GOOD: Labels = {"action": np.ones((1, 2), np.float32)}
QUERY = Query({"state": np.zeros((1, 3), np.float32)}, np.zeros(1, int), np.ones(1, bool), number=0)


class Clock:
    """A clock that nothing but sleeping and the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        monkeypatch.setattr(pending.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pending.time, "sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class ManualTeacher(EchoTeacher):
    """Its answers are the futures that the test resolves; ``then`` may do so when it is asked."""

    def __init__(self, then: Callable[[Future[Labels], int], object] = lambda answer, i: None) -> None:
        super().__init__()
        self.answers: list[Future[Labels]] = []
        self.then = then

    def submit(self, query: Query) -> Future[Labels]:
        assert query is QUERY
        self.answers.append(Future())
        self.then(self.answers[-1], len(self.answers) - 1)
        return self.answers[-1]


def asked(teacher: EchoTeacher, mode: str, timeout: float = 60.0, patience: float = 600.0) -> PendingLabels:
    return PendingLabels(teacher, QUERY, RetryPolicy("test", mode, timeout, patience), lambda labels: labels)


def failing(n: int, retry_after: float = 0.0) -> Callable[[Future[Labels], int], object]:
    """Fails n times, then answers."""

    def then(answer: Future[Labels], i: int) -> None:
        if i < n:
            answer.set_exception(TeacherUnavailable("nobody there", retry_after))
        else:
            answer.set_result(GOOD)

    return then


# ---- asking again


@pytest.mark.parametrize("mode", pending.ON_FAILURE)
def test_a_failure_that_may_pass_is_asked_again_in_time(mode: str, clock: Clock) -> None:
    teacher = ManualTeacher(failing(3))
    assert asked(teacher, mode).get() == GOOD
    assert len(teacher.answers) == 4
    assert clock.slept == [0.1, 0.2, 0.4]


def test_pauses_grow_to_a_limit(clock: Clock) -> None:
    asked(ManualTeacher(failing(8)), "raise").get()
    assert clock.slept == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]


def test_the_pause_that_the_teacher_wants_counts_from_its_failure(clock: Clock) -> None:
    question = asked(ManualTeacher(failing(2, retry_after=7.0)), "raise")
    clock.now = 3.0
    question.get()
    assert clock.slept == [4.0, 7.0]


def test_a_failure_that_stays_is_raised_when_the_time_is_over(clock: Clock) -> None:
    question = asked(ManualTeacher(failing(99)), "raise", timeout=3.0)
    with pytest.raises(TeacherUnavailable, match=r"nobody there \(5 attempts\)"):
        question.get()
    assert 1.0 < clock.now < 3.0  # the next pause would have been too long
    with pytest.raises(TeacherUnavailable, match="nobody there"):
        question.get()
    assert len(question._teacher.answers) == 5, "once more, and it is not asked again"  # type: ignore[attr-defined]


def test_wait_goes_on_until_its_patience_is_over(clock: Clock) -> None:
    with pytest.raises(TeacherUnavailable, match="nobody there"):
        asked(ManualTeacher(failing(999)), "wait", timeout=3.0, patience=100.0).get()
    assert 95.0 < clock.now < 100.0


def test_skip_gives_up_in_the_end(clock: Clock) -> None:
    question = asked(ManualTeacher(failing(99)), "skip", timeout=3.0)
    assert question.get() is None
    assert question.get() is None
    assert clock.now < 3.0


@pytest.mark.parametrize("mode", ["raise", "wait"])
def test_a_failure_of_long_ago_is_asked_again_at_once(mode: str, clock: Clock) -> None:
    question = asked(ManualTeacher(failing(1)), mode)
    clock.now = 10_000.0
    assert question.get() == GOOD
    assert clock.slept == [0.0]


def test_a_failure_of_long_ago_is_skipped_at_once(clock: Clock) -> None:
    teacher = ManualTeacher(failing(1))
    question = asked(teacher, "skip")
    clock.now = 10_000.0
    assert question.get() is None
    assert len(teacher.answers) == 1


@pytest.mark.parametrize("mode", ["raise", "wait"])
@pytest.mark.parametrize("error", [TeacherError("no"), ArithmeticError("no")])
def test_what_cannot_pass_is_not_asked_again(mode: str, error: Exception, clock: Clock) -> None:
    teacher = ManualTeacher(lambda answer, i: answer.set_exception(error))
    with pytest.raises(TeacherError, match="no") as caught:
        asked(teacher, mode).get()
    assert not isinstance(caught.value, TeacherUnavailable)
    assert len(teacher.answers) == 1


def test_a_cancelled_question_is_one_sentence() -> None:
    teacher = ManualTeacher(lambda answer, i: answer.cancel())
    with pytest.raises(TeacherError, match="was cancelled"):
        asked(teacher, "raise").get()


# ---- late answers


def test_a_late_answer_is_used_and_nothing_is_asked_twice() -> None:
    teacher = ManualTeacher()
    question = asked(teacher, "wait", timeout=0.01)
    threading.Timer(0.1, lambda: teacher.answers[0].set_result(GOOD)).start()
    assert question.get() == GOOD
    assert len(teacher.answers) == 1
    assert question.latency is not None
    assert question.latency >= 0.1


def test_after_a_timeout_the_question_is_asked_again_only_when_it_has_failed() -> None:
    teacher = ManualTeacher(lambda answer, i: answer.set_result(GOOD) if i else None)
    question = asked(teacher, "wait", timeout=0.01)

    def fail() -> None:
        assert len(teacher.answers) == 1
        teacher.answers[0].set_exception(TeacherUnavailable("dropped"))

    threading.Timer(0.1, fail).start()
    assert question.get() == GOOD
    assert len(teacher.answers) == 2


def test_latency_is_that_of_the_attempt_that_was_answered(clock: Clock) -> None:
    def then(answer: Future[Labels], i: int) -> None:
        clock.now += 3.0
        failing(1)(answer, i)

    question = asked(ManualTeacher(then), "wait")
    clock.now = 100.0
    question.get()
    assert question.latency == 3.0


def test_a_teacher_that_is_steadily_slower_than_the_timeout_works_with_wait() -> None:
    def slow(query: Query) -> np.ndarray:
        time.sleep(0.03)
        return query.inputs["state"][:, 1:3]

    teacher = EchoTeacher(slow)
    venv = VecTeacher(DummyVecEnv([CountingEnv]), teacher, timeout=0.01, on_failure="wait")
    obs = venv.reset()
    expected, infos = [], []
    for _ in range(5):
        expected.append(obs[0, 1:3])
        obs, _, _, (info,) = venv.step(np.zeros((1, 2), np.float32))
        infos.append(info)
    np.testing.assert_array_equal([np.asarray(info["teacher_action"]) for info in infos], expected)
    assert len(teacher.queries) == 5


def test_time_counts_from_the_asking_and_not_from_the_look(clock: Clock) -> None:
    question = asked(ManualTeacher(), "raise", timeout=60.0)
    clock.now = 61.0
    with pytest.raises(TeacherUnavailable, match="teacher 'echo' gave no answer within 60 s"):
        question.get()


def test_questions_in_line_have_time_as_long_as_those_before_are_answered(clock: Clock) -> None:
    teacher = ManualTeacher()
    policy = RetryPolicy("test", "raise", 60.0, 600.0)
    first, second = (PendingLabels(teacher, QUERY, policy, lambda labels: labels) for _ in range(2))
    clock.now = 50.0
    teacher.answers[0].set_result(GOOD)
    clock.now = 100.0
    threading.Timer(0.05, lambda: teacher.answers[1].set_result(GOOD)).start()
    assert (first.get(), second.get()) == (GOOD, GOOD)


def test_silence_is_an_error_after_the_deadline_with_the_failures_before(clock: Clock) -> None:
    teacher = ManualTeacher(lambda answer, i: i == 0 and answer.set_exception(TeacherUnavailable("was busy")))
    question = asked(teacher, "raise", timeout=0.2)
    threading.Timer(0.05, lambda: setattr(clock, "now", 1.0)).start()
    with pytest.raises(TeacherUnavailable, match=r"no answer within 0.2 s; before: was busy"):
        question.get()


# ---- labels that are skipped


def test_a_teacher_that_hangs_costs_the_timeout_once() -> None:
    venv = VecTeacher(DummyVecEnv([CountingEnv]), SilentTeacher(), timeout=0.2, on_failure="skip")
    venv.reset()
    infos = [venv.step(np.zeros((1, 2), np.float32))[3][0] for _ in range(20)]
    start = time.monotonic()
    assert all(np.isnan(np.asarray(info["teacher_action"])).all() for info in infos)
    assert time.monotonic() - start < 2.0  # not 20 x 0.2 s


ALL = frozenset({"action", "std", "logits", "log_prob", "value", "mood"})


def silent(space: spaces.Space = ACTION_SPACE) -> SilentTeacher:
    teacher = SilentTeacher()
    teacher.spec = TeacherSpec("full", ALL, ("state",), space, n_bins=V)
    return teacher


def test_skipped_labels_are_nan_of_their_shape() -> None:
    venv = VecTeacher(DummyVecEnv([CountingEnv] * 2), silent(), timeout=0.01, on_failure="skip")
    venv.reset()
    labels = venv.label()
    info = venv.step(np.zeros((2, 2), np.float32))[3][0]
    shapes = {"action": (2,), "std": (2,), "logits": (2, V), "log_prob": (), "value": (), "mood": ()}
    for name, shape in shapes.items():
        assert labels[name].shape == (2, *shape)
        label = np.asarray(info[f"teacher_{name}"])
        assert label.shape == shape
        assert np.isnan(label).all()


def test_training_goes_on_when_the_first_label_of_a_rollout_is_skipped() -> None:
    class Stumbling(TokenTeacher):
        n_queries = 0

        def submit(self, query: Query) -> Future[Labels]:
            self.n_queries += 1
            if self.n_queries != 1:
                return super().submit(query)
            failed: Future[Labels] = Future()
            failed.set_exception(TeacherError("an answer that cannot be used"))
            return failed

    teacher = Stumbling()
    venv = VecTeacher(make_token_venv(n_envs=2), teacher, on_failure="skip")
    model = OPD("MlpPolicy", venv, **SMALL)
    model.learn(32)
    assert teacher.n_queries == 16
    assert model.rollout_buffer.labels["logits"].shape == (8, 2, K, V)
    assert model.rollout_buffer.labelled.all()


# ---- answers that cannot be used


def spec(*labels: str, space: spaces.Space = ACTION_SPACE) -> TeacherSpec:
    return TeacherSpec("odd", frozenset(labels), ("state",), space, n_bins=V)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action", np.zeros((3, 3)), r"'action' of shape \(3, 3\), expected \(3, 2\)"),
        ("action", 1.0, r"'action' of shape \(\), expected \(3, 2\)"),
        ("action", [[1.0], [1.0, 2.0], [1.0]], "something that is not an array"),
        ("action", np.full((3, 2), "1.0"), "dtype <U3, expected real numbers"),
        ("action", np.zeros((3, 2), bool), "dtype bool"),
        ("action", np.array([[0, 0], [0, np.nan], [0, 0]]), r"not finite for query 1 of 3: \[ 0. nan\]"),
        ("std", np.array([[1, 1], [1, 1], [-1, 1]]), r"negative for query 2 of 3: \[-1  1\]"),
        ("logits", np.zeros((3, 2, V + 1)), rf"expected \(3, 2, {V}\)"),
        ("log_prob", np.zeros((3, 1)), r"expected \(3,\)"),
        ("mood", np.zeros((2, 4)), r"expected \(3, 4\)"),
    ],
)
def test_unusable_labels_are_one_sentence(name: str, value: Any, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        check_labels({name: value}, spec(name), 3)


@pytest.mark.parametrize("answer", [None, np.zeros((3, 2)), [np.zeros((3, 2))]])
def test_an_answer_that_is_not_a_dict_is_one_sentence(answer: Any) -> None:
    with pytest.raises(TeacherError, match="teacher 'odd' answered with a .*, expected a dict"):
        check_labels(answer, spec("action"), 3)


def test_missing_label_is_one_sentence() -> None:
    with pytest.raises(TeacherError, match=r"promised the label 'action', but answered with \['acton'\]"):
        check_labels({"acton": np.zeros((3, 2))}, spec("action"), 3)


def test_usable_labels_come_back_as_they_are() -> None:
    labels = {
        "action": np.zeros((3, K), np.int64),
        "std": np.zeros((3, K), np.float32),
        "logits": np.zeros((3, K, V), np.float16),
        "log_prob": np.zeros(3),
        "value": np.zeros(3, np.float32),
        "mood": np.zeros((3, 9, 9), np.uint8),
    }
    found = check_labels(labels, spec(*ALL, space=TOKENS), 3)
    assert {name: id(value) for name, value in found.items()} == {name: id(value) for name, value in labels.items()}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda q: np.zeros((2, 3)), r"shape \(2, 3\), expected \(2, 2\)"),
        (lambda q: 1 / 0, "failed: ZeroDivisionError"),
    ],
)
def test_unusable_answers_are_raised_where_the_label_is_read(answer: Any, message: str) -> None:
    venv = VecTeacher(DummyVecEnv([CountingEnv] * 2), EchoTeacher(answer))
    venv.reset()
    info = venv.step(np.zeros((2, 2), np.float32))[3][0]
    with pytest.raises(TeacherError, match=message):
        np.asarray(info["teacher_action"])


def test_logits_without_a_number_of_bins_are_refused_before_a_run() -> None:
    without = replace(spec("action", "logits", space=TOKENS), n_bins=None)
    with pytest.raises(ValueError, match="gives logits, but its spec has no n_bins"):
        check_spec(without, spaces.Box(-1.0, 1.0, (2,)), TOKENS)


def test_the_same_question_is_asked_again_although_the_environment_has_moved_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pending, "PAUSE", 0.0)
    numbers: list[int | None] = []

    class Unreachable(EchoTeacher):
        """Answers from the fourth question on."""

        def submit(self, query: Query) -> Future[Labels]:
            numbers.append(query.number)
            if len(numbers) > 3:
                return super().submit(query)
            failed: Future[Labels] = Future()
            failed.set_exception(TeacherUnavailable("nobody there"))
            return failed

    venv = VecTeacher(DummyVecEnv([CountingEnv] * 2), Unreachable(), on_failure="wait")
    obs = venv.reset()
    infos = venv.step(np.zeros((2, 2), np.float32))[3]
    venv.step(np.zeros((2, 2), np.float32))
    np.testing.assert_array_equal([np.asarray(info["teacher_action"]) for info in infos], obs[:, 1:3])
    assert numbers == [0, 1, 0, 0]
