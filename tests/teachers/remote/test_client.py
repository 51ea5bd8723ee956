"""RemoteTeacher: what reaches the teacher, what comes back, and what happens when either is disturbed."""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.contract.teacher import TIMEOUT
from rpd_sb3.labelling import TeacherWrapper, VecTeacher
from rpd_sb3.teachers import Labels, Query, TeacherError, TeacherUnavailable, make_teacher
from rpd_sb3.teachers.openpi.teacher import OpenPITeacher
from rpd_sb3.teachers.remote import replica as replica_module
from rpd_sb3.teachers.remote.replica import Piece
from rpd_sb3.teachers.remote.teacher import RemoteTeacher, _gather, share
from rpd_sb3.wire import spec as spec_module
from tests.support.faulty_proxy import faulty
from tests.support.helpers import ACTION_SPACE, CountingEnv, EchoTeacher
from tests.support.serving_helpers import free_port, serving, states, wait_for

IMAGE = (64, 64, 3)


def ask(n: int = 5, number: int | None = None, env_ids: np.ndarray | None = None, start: bool = True) -> Query:
    ids = np.arange(n) if env_ids is None else env_ids
    return Query({"state": states(n)}, ids, np.full(n, start), np.zeros((n, 2), np.float32), number)


def check(labels: Labels, n: int = 5) -> None:
    np.testing.assert_array_equal(labels["action"], states(n)[:, 1:3])


@contextmanager
def asking(*services: Any, **kwargs: Any) -> Iterator[RemoteTeacher]:
    """A client of these services, or of what stands before them."""
    with closing(RemoteTeacher([service.url for service in services], **kwargs)) as remote:
        yield remote


class ImageTeacher(EchoTeacher):
    """Its action is the first two values of the image's first pixel, as seen after ``before`` was called (not in warm-up)."""

    def __init__(self, before: Callable[[], object] = lambda: None) -> None:
        super().__init__(
            lambda query: (len(query.env_ids) > 1 and before(), query.inputs["images.base"][:, 0, 0, :2] / 255)[1]
        )
        self.spec = type(self.spec)("image", frozenset({"action"}), ("images.base",), ACTION_SPACE, {"base": IMAGE[:2]})


class CountingTeacher(EchoTeacher):
    """With a memory: its action is (queries so far in this episode, environment's slot), for each environment."""

    def __init__(self) -> None:
        super().__init__(self._count)
        self.spec = type(self.spec)("counting", frozenset({"action"}), ("state",), ACTION_SPACE, stateful=True)
        self.counts: dict[int, int] = {}

    def _count(self, query: Query) -> np.ndarray:
        for slot, start in zip(query.env_ids, query.episode_starts):
            self.counts[int(slot)] = 1 if start else self.counts[int(slot)] + 1
        return np.array([[self.counts[int(slot)], slot] for slot in query.env_ids], np.float32)


def image_query(value: int, n: int = 8) -> Query:
    image = np.full((n, *IMAGE), value, np.uint8)
    return Query({"images.base": image}, np.arange(n), np.ones(n, bool))


def test_teacher_gets_the_query_as_it_was_asked() -> None:
    seen: list[Query] = []
    teacher = EchoTeacher(lambda query: (seen.append(query), query.inputs["state"][:, 1:3])[1])
    with serving(lambda: teacher) as service, asking(service) as remote:
        query = ask(3, env_ids=np.array([7, 1, 4]))
        check(remote.submit(query).result(10), 3)
    got = seen[-1]
    np.testing.assert_array_equal(got.env_ids, query.env_ids)
    np.testing.assert_array_equal(got.episode_starts, query.episode_starts)
    assert query.actions is not None
    assert got.actions is not None
    np.testing.assert_array_equal(got.actions, query.actions)
    assert got.inputs["state"].dtype == np.float32


def test_instructions_arrive_as_text() -> None:
    seen: list[Query] = []

    def load() -> EchoTeacher:
        teacher = EchoTeacher(lambda query: (seen.append(query), np.zeros((len(query.env_ids), 2)))[1])
        teacher.spec = type(teacher.spec)("said", frozenset({"action"}), ("instruction",), ACTION_SPACE)
        return teacher

    with serving(load) as service, asking(service) as remote:
        words = np.array(["pick up the cube", "schließe die Tür"])
        remote.submit(Query({"instruction": words}, np.arange(2), np.ones(2, bool))).result(10)
    assert seen[-1].inputs["instruction"].tolist() == words.tolist()


@pytest.mark.parametrize("shared_memory", [True, False])
def test_images_arrive_however_they_are_sent(shared_memory: bool) -> None:
    with serving(ImageTeacher) as service, asking(service, shared_memory=shared_memory) as remote:
        for value in (3, 250):
            np.testing.assert_allclose(remote.submit(image_query(value)).result(10)["action"], value / 255)


def test_arrays_may_be_overwritten_as_soon_as_submit_returns() -> None:
    go = threading.Event()
    with serving(lambda: ImageTeacher(go.wait)) as service, asking(service, shared_memory=True) as remote:
        query = image_query(10)
        answer = remote.submit(query)
        query.inputs["images.base"][:] = 99
        go.set()
        np.testing.assert_allclose(answer.result(10)["action"], 10 / 255)


def test_ring_grows_with_the_largest_query() -> None:
    with serving(ImageTeacher) as service, asking(service, shared_memory=True, max_pending=2) as remote:
        answers = [remote.submit(image_query(n, n=n)) for n in (8, 16, 64, 8)]
        for n, answer in zip((8, 16, 64, 8), answers):
            np.testing.assert_allclose(answer.result(10)["action"], np.full((n, 2), n / 255), rtol=1e-6)


def test_no_name_is_left_in_shared_memory() -> None:
    with serving(ImageTeacher) as service, asking(service, shared_memory=True) as remote:
        remote.submit(image_query(1)).result(10)
        assert not list(Path("/dev/shm").glob(f"rpd_sb3-{os.getpid()}-*"))


def test_submit_returns_before_the_answer_and_waits_only_when_too_many_are_pending() -> None:
    go, entered = threading.Event(), []

    def block(query: Query) -> np.ndarray:
        entered.extend(query.env_ids)
        go.wait(60)
        return query.inputs["state"][:, 1:3]

    with serving(lambda: EchoTeacher(block)) as service, asking(service, max_pending=2) as remote:
        pending = [remote.submit(ask(1)) for _ in range(2)]
        wait_for(lambda: len(entered) + service.engine.waiting == 2)  # in one batch, or one after the other
        assert not any(answer.done() for answer in pending)
        remote.replicas[0].timeout = 0.3
        with pytest.raises(TeacherUnavailable, match="2 queries are not answered yet"):
            remote.submit(ask(1)).result(10)
        go.set()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("reset", "reset by peer"),
        ("truncate", "more expected"),
        ("garbage", "cannot be read"),
        ("overflow", "503: the queue is full"),
        ("bad gateway", "502: oops"),
        ("hang", "no answer in time"),
        ("trickle", "still answering after 0.3 s"),
    ],
)
def test_failure_that_may_pass_is_raised_after_one_attempt(fault: str, message: str) -> None:
    with serving() as service, faulty(service.url) as proxy:
        remote = RemoteTeacher([proxy.url], timeout=0.3 if fault in ("hang", "trickle") else 5.0)
        proxy.faults = [fault]
        with pytest.raises(TeacherUnavailable, match=message):
            remote.submit(ask()).result(10)
        assert proxy.n_infer == 1
        check(remote.submit(ask()).result(10))
        remote.close()


@pytest.mark.parametrize("on_failure", ["raise", "wait"])
def test_failure_that_passes_costs_no_label(on_failure: str) -> None:
    with serving() as service, faulty(service.url) as proxy, asking(proxy) as remote:
        venv = VecTeacher(DummyVecEnv([CountingEnv] * 2), remote, on_failure=on_failure)
        obs = venv.reset()
        proxy.faults = ["reset", "overflow", "truncate"]
        infos = venv.step(np.zeros((2, 2), np.float32))[3]
        np.testing.assert_array_equal([np.asarray(info["teacher_action"]) for info in infos], obs[:, 1:3])
        assert proxy.n_infer == 4


def test_a_service_that_hangs_holds_submit_up_once() -> None:
    with serving() as service, faulty(service.url) as proxy, asking(proxy, timeout=0.5, max_pending=2) as remote:
        proxy.faults = ["hang"] * 99
        start = time.monotonic()
        answers = [remote.submit(ask()) for _ in range(20)]
        assert time.monotonic() - start < 2.0  # 9 x 0.5 s if each waited for room
        for answer in answers:
            with pytest.raises(TeacherUnavailable):
                answer.result(10)


def test_clients_give_an_answer_the_time_that_vec_teacher_gives_it() -> None:
    clients = [RemoteTeacher, OpenPITeacher, TeacherWrapper, VecTeacher]
    assert {inspect.signature(client).parameters["timeout"].default for client in clients} == {TIMEOUT}


def test_error_of_the_teacher_arrives_with_its_text_and_is_not_repeated() -> None:
    calls = []

    def fail(query: Query) -> np.ndarray:
        calls.append(1)
        raise ArithmeticError("no solution for row 2")

    with serving(lambda: EchoTeacher(fail)) as service, asking(service) as remote:
        with pytest.raises(
            TeacherError, match="answered 500: the teacher failed: ArithmeticError: no solution for row 2"
        ):
            remote.submit(ask()).result(10)
        assert len(calls) == 1


def test_wrong_number_of_rows_is_an_error() -> None:
    teacher = EchoTeacher(lambda query: np.zeros((1, 2)))
    refused = pytest.raises(TeacherError, match="gave 1 rows of 'action' for 2 queries")
    with serving(lambda: teacher) as service, asking(service) as remote, refused:
        remote.submit(ask(2)).result(10)


def test_query_is_split_over_replicas_and_put_together_in_order() -> None:
    with serving() as first, serving() as second, asking(first, second) as remote:
        check(remote.submit(ask(7)).result(10), 7)
        rows = [service.engine.metrics.total("batch_size_sum") for service in (first, second)]
        assert sorted(rows) == [3, 4]


def test_replica_that_dies_costs_no_label() -> None:
    with serving() as first, serving() as second, faulty(second.url) as proxy, asking(first, proxy) as remote:
        proxy.faults = ["reset"] * 99
        for _ in range(3):
            check(remote.submit(ask(6)).result(10), 6)
        assert proxy.n_infer < 3, "a replica that failed is left alone for a while"
        assert [replica.outstanding for replica in remote.replicas] == [0, 0]


def test_rows_that_no_replica_answers_are_an_error_after_one_attempt_at_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "DOWN", 0.0)  # as if each attempt took longer than that
    with serving() as service, faulty(service.url) as first, faulty(service.url) as second:
        remote = RemoteTeacher([first.url, second.url])
        first.faults = ["reset"] * 9
        second.faults = ["reset"] * 9
        with pytest.raises(TeacherUnavailable, match="reset by peer"):
            remote.submit(ask(1)).result(10)
        assert (first.n_infer, second.n_infer) == (1, 1)
        remote.close()


@pytest.mark.parametrize(
    ("n", "waiting", "rates", "expected"),
    [
        (7, [0, 0], [None, None], [4, 3]),
        (1, [1, 0], [None, None], [0, 1]),
        (12, [0, 0], [20.0, 10.0], [8, 4]),
        (12, [0, 0, 0], [20.0, 10.0, None], [6, 2, 4]),  # 15 rows per second where it is not known
        (4, [100, 0], [10.0, 1.0], [0, 4]),  # 4 s, not 10.4 s
        (12, [6, 0], [20.0, 10.0], [6, 6]),
    ],
)
def test_rows_are_shared_so_that_all_replicas_finish_together(
    n: int, waiting: list[int], rates: list[float | None], expected: list[int]
) -> None:
    assert share(n, waiting, rates, [False] * len(waiting)) == expected


def test_a_replica_that_has_not_answered_for_long_gets_one_row() -> None:
    assert share(10, [0, 0], [1000.0, 1.0], [True, True]) == [9, 1]
    assert share(1, [0, 0], [1000.0, 1.0], [False, True]) == [0, 1]
    assert share(4, [0, 0], [None, None], [True, True]) == [2, 2]  # the first query


def test_a_slow_replica_does_not_set_the_pace() -> None:
    def slow(query: Query) -> np.ndarray:
        time.sleep(0.02 * len(query.env_ids))
        return query.inputs["state"][:, 1:3]

    with serving() as fast, serving(lambda: EchoTeacher(slow)) as service, asking(fast, service) as remote:
        check(remote.submit(ask(10)).result(10), 10)  # 5 rows each: it is not known yet
        before = service.engine.metrics.total("batch_size_sum")
        start = time.monotonic()
        for _ in range(10):
            check(remote.submit(ask(50)).result(10), 50)
        assert time.monotonic() - start < 2.5  # 5 s if it had half of the rows
        assert service.engine.metrics.total("batch_size_sum") - before < 125


def test_a_replica_without_room_gets_nothing_while_another_has_some() -> None:
    go = threading.Event()
    with serving() as first, serving(lambda: EchoTeacher(lambda q: (go.wait(10), np.zeros((1, 2)))[1])) as second:
        remote = RemoteTeacher([first.url, second.url], max_pending=1)
        waiting = remote.submit(ask(2))
        start = time.monotonic()
        for _ in range(5):
            check(remote.submit(ask(2)).result(5), 2)
        assert time.monotonic() - start < 5.0
        go.set()
        waiting.result(10)
        remote.close()


def test_answers_of_replicas_that_do_not_fit_together_are_an_error() -> None:
    whole: Future[Labels] = Future()
    pieces = [Piece({}, 2, {}) for _ in range(2)]
    _gather(whole, [(np.arange(2), pieces[0]), (np.arange(2, 4), pieces[1])])
    pieces[0].answer.set_result({"action": np.zeros((3, 2))})
    pieces[1].answer.set_result({"action": np.zeros((1, 2))})
    with pytest.raises(TeacherError, match="do not fit together: not 2 rows for 2 queries"):
        whole.result(0)


def test_memory_of_a_teacher_advances_once_however_often_the_answer_is_lost() -> None:
    with serving(CountingTeacher) as service, faulty(service.url) as proxy, asking(proxy) as remote:
        venv = VecTeacher(DummyVecEnv([lambda: CountingEnv(length=99)] * 2), remote)
        venv.reset()
        infos = []
        for step in range(6):
            proxy.faults = ["truncate"] * (step % 2) + ["reset"] * (step % 3)
            infos.append(venv.step(np.zeros((2, 2), np.float32))[3][0])
        counts = [float(np.asarray(info["teacher_action"])[0]) for info in infos]
        assert counts == [1, 2, 3, 4, 5, 6]


def test_queries_of_a_memory_arrive_in_order() -> None:
    with serving(CountingTeacher) as service, asking(service) as remote:
        answers = [remote.submit(ask(2, start=step == 0)) for step in range(4)]
        for step, answer in enumerate(answers):
            np.testing.assert_array_equal(answer.result(10)["action"][:, 0], step + 1)


def test_answers_arrive_while_shared_memory_is_being_registered() -> None:
    entered, go = threading.Event(), threading.Event()
    with serving(ImageTeacher) as service, asking(service, shared_memory=True) as remote:
        replica = remote.replicas[0]
        post = replica._own.post

        def hang(path: str, *args: Any) -> Any:
            entered.set()
            go.wait(10)
            return post(path, *args)

        replica._own.post = hang  # type: ignore[method-assign]
        large = threading.Thread(target=lambda: remote.submit(image_query(1)).result(10))
        large.start()
        assert entered.wait(10)
        start = time.monotonic()
        try:
            for _ in range(8):  # more than may be pending
                remote.submit(image_query(2, n=2)).result(5)  # too small to be shared
            assert time.monotonic() - start < 5.0
        finally:
            go.set()
        large.join(10)


def test_environments_of_a_teacher_with_a_memory_stay_at_their_replica() -> None:
    teachers = [CountingTeacher(), CountingTeacher()]
    with serving(lambda: teachers[0]) as first, serving(lambda: teachers[1]) as second, asking(first, second) as remote:
        for step in range(4):
            labels = remote.submit(ask(5, start=step == 0)).result(10)
            np.testing.assert_array_equal(labels["action"][:, 0], step + 1)
    assert [len(teacher.counts) for teacher in teachers] == [3, 2]


def test_clients_of_a_teacher_with_a_memory_do_not_share_it() -> None:
    with serving(CountingTeacher) as service:
        remotes = [RemoteTeacher([service.url]) for _ in range(2)]
        for step in range(3):
            labels = [remote.submit(ask(2, start=step == 0)).result(10) for remote in remotes]
            assert all((answer["action"][:, 0] == step + 1).all() for answer in labels)
        assert len({slot for answer in labels for slot in answer["action"][:, 1]}) == 4
        for remote in remotes:
            remote.close()


def test_memory_that_is_lost_is_an_error() -> None:
    port = free_port()
    with serving(CountingTeacher, port=port) as service:
        remote = RemoteTeacher([service.url])
        remote.submit(ask(2)).result(10)
    with serving(CountingTeacher, port=port):
        with pytest.raises(TeacherError, match="409: the teacher has a memory, but knows nothing of environments"):
            remote.submit(ask(2, start=False)).result(10)
        remote.close()


def test_nobody_at_the_url_is_one_sentence() -> None:
    with pytest.raises(TeacherError, match=r"no teacher service at http://127.0.0.1:\d+: .*start one with"):
        RemoteTeacher([f"http://127.0.0.1:{free_port()}"])


def test_teacher_that_cannot_be_loaded_is_reported_at_once() -> None:
    def load() -> EchoTeacher:
        raise FileNotFoundError("no checkpoint at /x")

    with (
        serving(load) as service,
        pytest.raises(TeacherError, match="not ready: failed: FileNotFoundError: no checkpoint at /x"),
    ):
        RemoteTeacher([service.url])


def test_client_waits_while_the_teacher_is_loading() -> None:
    go = threading.Event()

    def load() -> EchoTeacher:
        go.wait(10)
        return EchoTeacher()

    with serving(load, wait=False) as service:
        threading.Timer(0.5, go.set).start()
        with asking(service) as remote:
            assert go.is_set()
            check(remote.submit(ask()).result(10))


def test_another_protocol_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "PROTOCOL_VERSION", 99)
    with serving() as service, pytest.raises(TeacherError, match="version 99 of the protocol, this library version"):
        RemoteTeacher([service.url])


def test_replicas_that_serve_different_teachers_are_refused() -> None:
    with (
        serving() as first,
        serving(CountingTeacher) as second,
        pytest.raises(TeacherError, match="the replicas differ"),
    ):
        RemoteTeacher([first.url, second.url])


def test_spec_comes_from_the_service_and_is_refused_if_not_as_expected() -> None:
    with serving() as service:
        with closing(make_teacher(service.url, "any", expect={"name": "echo"})) as remote:
            assert remote.spec == EchoTeacher().spec
        with pytest.raises(TeacherError, match="has unnorm_key=None, but 'bridge' is expected"):
            make_teacher(service.url, "any", expect={"unnorm_key": "bridge"})


@pytest.mark.parametrize("give", ["argument", "environment"])
def test_token_opens_the_service(give: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(token="secret") as service:
        with pytest.raises(TeacherError, match="wants a bearer token"):
            RemoteTeacher([service.url])
        if give == "environment":
            monkeypatch.setenv("RPD_SB3_TOKEN", "secret")
        remote = RemoteTeacher([service.url], token="secret" if give == "argument" else None)
        check(remote.submit(ask()).result(10))
        remote.close()


@pytest.mark.parametrize(
    ("urls", "kwargs", "message"),
    [
        (["http://"], {}, "is not a URL"),
        (["http://a", "http://a"], {}, "names the same replica twice"),
        (["http://a"], {"timeout": 0}, "timeout=0 must be a positive number"),
        (["http://a"], {"max_pending": 0}, "max_pending=0"),
    ],
)
def test_impossible_arguments_are_refused(urls: list[str], kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemoteTeacher(urls, **kwargs)


def test_closed_teacher_answers_nothing() -> None:
    with serving() as service:
        remote = RemoteTeacher([service.url])
        remote.close()
        with pytest.raises(TeacherError, match="closed"):
            remote.submit(ask()).result(1)


def test_client_without_shared_memory_says_so_and_uses_http(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from rpd_sb3.wire import shared_memory

    monkeypatch.setattr(shared_memory, "FOLDER", Path("/nowhere"))
    with serving(ImageTeacher) as service, caplog.at_level("INFO"):
        remote = RemoteTeacher([service.url])
        np.testing.assert_allclose(remote.submit(image_query(5)).result(10)["action"], 5 / 255)
        remote.close()
    assert "sending over HTTP, because no shared memory here" in caplog.text


def test_restarted_service_gets_a_new_ring() -> None:
    port = free_port()
    remote = None
    for value in (1, 2):
        with serving(ImageTeacher, port=port) as service:
            remote = remote or RemoteTeacher([service.url], shared_memory=True)
            for _ in range(2):
                np.testing.assert_allclose(remote.submit(image_query(value)).result(10)["action"], value / 255)
            wait_for(lambda: len(service_regions(service.url)) == 1)
    assert remote is not None
    remote.close()


def service_regions(url: str) -> list[dict[str, object]]:
    return requests.get(f"{url}/v2/systemsharedmemory/status", timeout=5).json()


def test_lone_client_does_not_wait_for_company() -> None:
    with serving(max_wait=30.0) as service, asking(service) as remote:
        check(remote.submit(ask()).result(10))
