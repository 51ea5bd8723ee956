"""The engine: who shares a batch, who waits, whose memory is whose, and what one bad query costs the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rpd_sb3.serve import engine as engine_module
from rpd_sb3.serve.batch import PendingQuery, Unanswerable, fits
from rpd_sb3.serve.engine import Busy, Engine
from rpd_sb3.serve.memory import ClientMemory, OutOfStep
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.teachers import Labels, Query, Teacher, TeacherError
from rpd_sb3.wire.shared_memory import StaleGeneration
from tests.support.helpers import EchoTeacher
from tests.support.raw_client import CountingTeacher, HeldTeacher
from tests.support.serving_helpers import states, wait_for

FOREVER = 60.0


@contextmanager
def running(load: Callable[[], Teacher], **kwargs: Any) -> Iterator[Engine]:
    """An engine that has loaded its teacher."""
    engine = Engine(load, Metrics(), **kwargs)
    engine.start()
    try:
        wait_for(lambda: engine.ready)
        yield engine
    finally:
        engine.close()


def query(n: int = 1, env_ids: Sequence[int] | None = None, start: bool = True, actions: Any = None) -> Query:
    ids = np.arange(n) if env_ids is None else np.array(env_ids)
    return Query({"state": states(len(ids))}, ids, np.full(len(ids), start), actions)


def pending(
    n: int = 1,
    client: str = "",
    env_ids: Sequence[int] | None = None,
    start: bool = True,
    actions: Any = None,
    **kwargs: Any,
) -> PendingQuery:
    return PendingQuery(query(n, env_ids, start, actions), client, **kwargs)


def counts(engine: Engine, client: str, env_ids: Sequence[int], start: bool, sequence: int | None = None) -> list[int]:
    """What a CountingTeacher counts: queries so far in the episode of each environment."""
    answer = engine.submit(pending(client=client, env_ids=env_ids, start=start, sequence=sequence)).result(FOREVER)
    return answer["action"][:, 0].astype(int).tolist()


# ---- batches


def test_queries_that_came_while_the_teacher_worked_are_one_batch() -> None:
    teacher = HeldTeacher()
    with running(lambda: teacher) as engine:
        first = engine.submit(pending(2, "a"))
        wait_for(lambda: teacher.entered == 1)
        others = [engine.submit(pending(n, name)) for n, name in ((1, "b"), (3, "c"), (2, "d"))]
        teacher.go.set()
        for n, answer in zip((2, 1, 3, 2), (first, *others)):
            np.testing.assert_array_equal(answer.result(FOREVER)["action"], states(n)[:, 1:3])
        assert teacher.sizes == [2, 6]


def test_batch_waits_for_every_client_that_was_active(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RECENT", FOREVER)
    teacher = EchoTeacher()
    with running(lambda: teacher, max_wait=FOREVER) as engine:
        engine.submit(pending(client="a")).result(FOREVER)
        second = engine.submit(pending(client="b"))
        assert not second.done(), "a was active, so b waits for it"
        engine.submit(pending(client="a")).result(FOREVER)
        assert second.done()
        assert [len(query.env_ids) for query in teacher.queries] == [1, 2]


def test_batch_waits_for_nobody_who_was_not_active_lately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RECENT", 0.0)
    with running(EchoTeacher, max_wait=FOREVER) as engine:
        engine.submit(pending(client="a")).result(FOREVER / 2)
        engine.submit(pending(client="b")).result(FOREVER / 2)


def test_batch_waits_no_longer_than_max_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RECENT", FOREVER)
    with running(EchoTeacher, max_wait=0.05) as engine:
        engine.submit(pending(client="a")).result(FOREVER)
        started = time.monotonic()
        engine.submit(pending(client="b")).result(FOREVER / 2)
        assert time.monotonic() - started >= 0.05


def test_full_batch_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RECENT", FOREVER)
    with running(EchoTeacher, max_wait=FOREVER, max_batch=4) as engine:
        engine.submit(pending(4, "a")).result(FOREVER / 2)
        engine.submit(pending(4, "b")).result(FOREVER / 2)


def test_lone_client_waits_for_nobody() -> None:
    with running(EchoTeacher, max_wait=FOREVER) as engine:
        for _ in range(3):
            engine.submit(pending(client="a")).result(FOREVER / 2)


def test_query_larger_than_a_batch_is_split_and_put_together() -> None:
    teacher = EchoTeacher()
    with running(lambda: teacher, max_batch=4) as engine:
        actions = np.arange(18).reshape(9, 2)
        answer = engine.submit(pending(9, actions=actions)).result(FOREVER)
        np.testing.assert_array_equal(answer["action"], states(9)[:, 1:3])
    assert [len(query.env_ids) for query in teacher.queries] == [4, 4, 1]
    assert np.concatenate([query.env_ids for query in teacher.queries]).tolist() == list(range(9))
    np.testing.assert_array_equal(np.concatenate([query.actions for query in teacher.queries]), actions)


def test_batch_has_no_more_rows_than_max_batch() -> None:
    teacher = HeldTeacher()
    with running(lambda: teacher, max_batch=4) as engine:
        first = engine.submit(pending(1, "a"))
        wait_for(lambda: teacher.entered == 1)
        answers = [engine.submit(pending(n, str(n))) for n in (3, 2, 2, 1)]
        teacher.go.set()
        for answer in (first, *answers):
            answer.result(FOREVER)
        assert teacher.sizes == [1, 3, 4, 1]


def test_queries_of_the_same_form_fit() -> None:
    assert fits(query(2), query(3))


@pytest.mark.parametrize(
    "other",
    [
        query(2)._replace(inputs={"state": states(2, 5)}),
        query(2)._replace(inputs={"state": states(2).astype(int)}),
        query(2, actions=np.ones((2, 2), np.float32)),
    ],
    ids=["shape", "kind", "actions"],
)
def test_queries_of_another_form_do_not_fit(other: Query) -> None:
    assert not fits(query(2), other)


def test_actions_of_one_query_are_not_lost_next_to_one_without() -> None:
    teacher, actions = HeldTeacher(), np.ones((2, 2), np.float32)
    with running(lambda: teacher) as engine:
        answers = [engine.submit(pending())]
        wait_for(lambda: teacher.entered == 1)
        answers += [engine.submit(pending(2)), engine.submit(pending(2, actions=actions))]
        teacher.go.set()
        for answer in answers:
            answer.result(FOREVER)
    assert teacher.sizes == [1, 2, 2]
    np.testing.assert_array_equal(teacher.queries[-1].actions, actions)


def test_answers_do_not_change_when_the_teacher_uses_its_array_again() -> None:
    buffer = np.zeros((1, 2), np.float32)

    def answer(query: Query) -> np.ndarray:
        buffer[:] = query.inputs["state"][:, 1:3]
        return buffer

    with running(lambda: EchoTeacher(answer)) as engine:
        first = engine.submit(pending()).result(FOREVER)["action"]
        other = query()._replace(inputs={"state": states(2)[1:]})
        engine.submit(PendingQuery(other)).result(FOREVER)
        np.testing.assert_array_equal(first, states(1)[:, 1:3])


class ChattyTeacher(EchoTeacher):
    """Gives more than it promised."""

    def label(self, query: Query) -> Labels:
        return {**super().label(query), "secret": np.full(1, np.nan)}


def test_labels_that_were_not_promised_are_dropped() -> None:
    with running(ChattyTeacher) as engine:
        assert list(engine.submit(pending(2)).result(FOREVER)) == ["action"]


# ---- failures


def test_bad_query_does_not_cost_the_others_their_answers() -> None:
    held = HeldTeacher()

    def answer(query: Query) -> np.ndarray:
        result = held._hold(query)
        if (query.env_ids == 13).any():
            raise ArithmeticError("thirteen")
        return result

    with running(lambda: EchoTeacher(answer)) as engine:
        first = engine.submit(pending())
        wait_for(lambda: held.entered == 1)
        good, bad, also = (engine.submit(pending(env_ids=ids)) for ids in ([1, 2], [3, 13], [5]))
        held.go.set()
        for n, future in ((1, first), (2, good), (1, also)):
            np.testing.assert_array_equal(future.result(FOREVER)["action"], states(n)[:, 1:3])
        with pytest.raises(TeacherError, match="the teacher failed: ArithmeticError: thirteen"):
            bad.result(FOREVER)


def test_answer_that_is_not_finite_costs_only_its_query() -> None:
    held = HeldTeacher()

    def answer(query: Query) -> np.ndarray:
        return np.where((query.env_ids == 13)[:, None], np.nan, held._hold(query))

    with running(lambda: EchoTeacher(answer)) as engine:
        first = engine.submit(pending())
        wait_for(lambda: held.entered == 1)
        good, bad = (engine.submit(pending(env_ids=ids)) for ids in ([1, 2], [3, 13]))
        held.go.set()
        for future in (first, good):
            future.result(FOREVER)
        with pytest.raises(Unanswerable, match="'action' for row 1 is not finite"):
            bad.result(FOREVER)


def test_query_that_was_overwritten_while_it_waited_is_not_asked() -> None:
    teacher = EchoTeacher()

    def stale() -> None:
        raise StaleGeneration("overwritten")

    with running(lambda: teacher) as engine, pytest.raises(StaleGeneration, match="overwritten"):
        engine.submit(pending(still_valid=stale)).result(FOREVER)
    assert teacher.queries == []


def test_closing_answers_what_was_accepted_and_refuses_the_rest() -> None:
    teacher = HeldTeacher()
    with running(lambda: teacher) as engine:
        answers = [engine.submit(pending(client=str(i))) for i in range(2)]
        wait_for(lambda: teacher.entered == 1)
        answers.append(engine.submit(pending(client="2")))
        engine.close(timeout=0.0)
        with pytest.raises(Busy, match="is shutting down"):
            engine.submit(pending())
        teacher.go.set()
        for answer in answers:
            answer.result(FOREVER)
        assert engine.finished.wait(FOREVER)


def test_closing_does_not_wait_for_a_teacher_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    engine = Engine(lambda: (go.wait(FOREVER), EchoTeacher())[1], Metrics())
    engine.start()
    monkeypatch.setattr(engine._thread, "join", lambda timeout: pytest.fail("it waited"))
    engine.close()
    assert not engine.finished.is_set()
    go.set()
    assert engine.finished.wait(FOREVER)


def test_teacher_is_closed_at_the_end() -> None:
    teacher = EchoTeacher()
    with running(lambda: teacher):
        pass
    with pytest.raises(RuntimeError, match="after shutdown"):
        teacher.submit(Query({}, np.zeros(1), np.ones(1, bool)))


def test_queries_in_line_fail_with_the_engine() -> None:
    held = HeldTeacher()

    def leave(query: Query) -> np.ndarray:
        held._hold(query)
        raise SystemExit

    with running(lambda: EchoTeacher(leave)) as engine:
        answers = [engine.submit(pending())]
        wait_for(lambda: held.entered == 1)
        answers.append(engine.submit(pending()))
        held.go.set()
        for answer in answers:
            with pytest.raises(Busy, match="the teacher failed: SystemExit"):
                answer.result(FOREVER)
        assert engine.finished.wait(FOREVER)


def test_warm_up_asks_once_for_what_the_spec_describes() -> None:
    teacher = EchoTeacher()
    teacher.spec = replace(teacher.spec, input_shapes={"state": (3,)})
    with running(lambda: teacher):
        assert [query.inputs["state"].shape for query in teacher.queries] == [(1, 3)]


# ---- memory


def test_clients_of_a_teacher_with_a_memory_share_no_slot() -> None:
    with running(CountingTeacher) as engine:
        for step in range(3):
            for client, env_ids in (("a", [0, 1]), ("b", [0, 1, 2]), ("a", [2])):
                assert counts(engine, client, env_ids, start=step == 0) == [step + 1] * len(env_ids)
        slots = {
            int(slot) for client in "ab" for slot in engine.submit(pending(3, client)).result(FOREVER)["action"][:, 1]
        }
    assert len(slots) == 6


def test_clients_of_a_teacher_with_a_memory_share_batches() -> None:
    entered, go = threading.Event(), threading.Event()
    teacher = CountingTeacher(lambda query: (entered.set(), go.wait(FOREVER)))
    with running(lambda: teacher) as engine:
        answers = [engine.submit(pending(2, "a"))]
        entered.wait(FOREVER)
        answers += [engine.submit(pending(2, client)) for client in "bc"]
        go.set()
        for answer in answers:
            answer.result(FOREVER)
    assert [len(query.env_ids) for query in teacher.queries] == [2, 4]


def test_queries_of_one_environment_are_answered_one_after_the_other() -> None:
    entered, go = threading.Event(), threading.Event()
    teacher = CountingTeacher(lambda query: (entered.set(), go.wait(FOREVER)))
    with running(lambda: teacher) as engine:
        answers = [engine.submit(pending(client="a", env_ids=[0]))]
        entered.wait(FOREVER)
        answers += [
            engine.submit(pending(client="a", env_ids=ids, start=start))
            for ids, start in (([0, 1], True), ([1], False), ([0], False))
        ]
        go.set()
        found = [answer.result(FOREVER)["action"][:, 0].tolist() for answer in answers]
    assert found == [[1], [1, 1], [2], [2]]
    assert [len(query.env_ids) for query in teacher.queries] == [1, 2, 2]


def test_repeated_query_gets_the_answer_that_is_still_to_come() -> None:
    entered, go = threading.Event(), threading.Event()
    teacher = CountingTeacher(lambda query: (entered.set(), go.wait(FOREVER)))
    with running(lambda: teacher) as engine:
        first = engine.submit(pending(client="a", sequence=0))
        entered.wait(FOREVER)
        assert engine.submit(pending(client="a", sequence=0)) is first
        go.set()
        first.result(FOREVER)
    assert len(teacher.queries) == 1


def test_failure_is_not_asked_again_when_the_query_is_repeated() -> None:
    calls = []

    def fail(query: Query) -> None:
        calls.append(1)
        raise ArithmeticError("no")

    with running(lambda: CountingTeacher(fail)) as engine:
        for _ in range(2):
            with pytest.raises(TeacherError, match="ArithmeticError: no"):
                counts(engine, "a", [0], True, sequence=0)
    assert len(calls) == 1


def put_off(engine: Engine, client: str, env_ids: Sequence[int], start: bool, sequence: int | None) -> None:
    """A query whose deadline has passed when its turn comes."""
    with pytest.raises(Busy, match="deadline passed"):
        engine.submit(
            pending(client=client, env_ids=env_ids, start=start, sequence=sequence, deadline=time.monotonic() - 1)
        ).result(FOREVER)


@pytest.mark.parametrize("start", [True, False])
def test_query_that_was_put_off_may_be_repeated(start: bool) -> None:
    with running(CountingTeacher) as engine:
        assert counts(engine, "a", [0], True, sequence=0) == [1]
        put_off(engine, "a", [0], start, sequence=1)
        put_off(engine, "a", [0], start, sequence=1)
        assert counts(engine, "a", [0], start, sequence=1) == [1 if start else 2]


@pytest.mark.parametrize("sequence", [1, None])
def test_memory_that_missed_a_query_is_an_error_until_the_next_episode(sequence: int | None) -> None:
    with running(CountingTeacher) as engine:
        counts(engine, "a", [0, 1], True, sequence=0)
        put_off(engine, "a", [0], False, sequence)
        with pytest.raises(OutOfStep, match="memory missed a query of this episode"):
            counts(engine, "a", [0, 1], False, sequence=2)
        assert counts(engine, "a", [1], False, sequence=3) == [2]
        assert counts(engine, "a", [0], True, sequence=4) == [1]
        assert counts(engine, "a", [0], False, sequence=5) == [2]


def test_memory_that_missed_two_queries_does_not_take_the_second_for_both() -> None:
    with running(CountingTeacher) as engine:
        counts(engine, "a", [0], True, sequence=0)
        put_off(engine, "a", [0], False, sequence=1)
        put_off(engine, "a", [0], False, sequence=2)
        with pytest.raises(OutOfStep, match="memory missed a query"):
            counts(engine, "a", [0], False, sequence=2)


def test_query_refused_by_a_full_queue_is_missed_too() -> None:
    entered, go = threading.Event(), threading.Event()
    teacher = CountingTeacher(lambda query: (entered.set(), go.wait(FOREVER)))
    with running(lambda: teacher, queue_size=1) as engine:
        answers = [engine.submit(pending(client="a", sequence=0))]
        entered.wait(FOREVER)
        answers.append(engine.submit(pending(client="b")))
        with pytest.raises(Busy, match="the queue is full: 1 queries wait"):
            engine.submit(pending(client="a", start=False, sequence=1))
        go.set()
        for answer in answers:
            answer.result(FOREVER)
        with pytest.raises(OutOfStep, match="memory missed a query"):
            counts(engine, "a", [0], False, sequence=2)


def test_memory_is_lost_with_a_call_that_fails() -> None:
    def fail(query: Query) -> None:
        if len(query.env_ids) == 2:
            raise ArithmeticError("two")

    with running(lambda: CountingTeacher(fail)) as engine:
        counts(engine, "a", [0], True)
        with pytest.raises(TeacherError, match="two"):
            counts(engine, "a", [0, 1], True)
        with pytest.raises(OutOfStep, match="memory missed a query"):
            counts(engine, "a", [1], False)


def test_memory_survives_an_answer_that_is_not_finite() -> None:
    def answer(query: Query) -> np.ndarray:
        return np.where(query.episode_starts[:, None], np.nan, counting._count(query))

    counting = CountingTeacher()
    teacher = EchoTeacher(answer)
    teacher.spec = counting.spec
    with running(lambda: teacher) as engine:
        with pytest.raises(Unanswerable, match="not finite"):
            counts(engine, "a", [0], True)
        assert counts(engine, "a", [0], False) == [2]


def test_environment_may_be_named_once_in_a_query() -> None:
    with (
        running(CountingTeacher) as engine,
        pytest.raises(OutOfStep, match="a query may name an environment only once"),
    ):
        engine.submit(pending(client="a", env_ids=[3, 3]))


def test_slots_of_clients_that_went_silent_are_given_away() -> None:
    memory = ClientMemory(max_slots=2, idle=0.0)
    ids, start = np.arange(2), np.ones(2, bool)
    assert memory.slots("a", ids, start).tolist() == [0, 1]
    wait_for(lambda: memory._clients["a"].seen < time.monotonic())
    assert sorted(memory.slots("b", ids, start)) == [0, 1]
    with pytest.raises(OutOfStep, match=r"knows nothing of environments \[0, 1\] of client 'a'"):
        memory.slots("a", ids, ~start)


def test_memory_has_a_limit() -> None:
    memory = ClientMemory(max_slots=3)
    memory.slots("a", np.arange(2), np.ones(2, bool))
    with pytest.raises(OutOfStep, match="the teacher's memory is full: 3 environments of 1 clients"):
        memory.slots("b", np.arange(2), np.ones(2, bool))
    assert memory.slots("b", np.arange(1), np.ones(1, bool)).tolist() == [2]


def test_slot_that_is_given_away_has_no_gap() -> None:
    memory = ClientMemory()
    slots, start = np.arange(2), np.array([True, False])
    memory.missed(slots, None)
    with pytest.raises(OutOfStep, match="missed a query"):
        memory.close_gaps(slots, start, 1)
    memory.close_gaps(slots, np.ones(2, bool), 1)
    memory.close_gaps(slots, np.zeros(2, bool), 2)
