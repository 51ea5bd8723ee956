"""OpenPITeacher against a real WebSocket server on loopback that speaks openpi's protocol."""

from __future__ import annotations

import inspect
import json
import logging
import re
import shlex
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.cli.config import parse_pairs
from rpd_sb3.doctor import FAIL, OK
from rpd_sb3.doctor import teacher as doctor
from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.serve import __main__ as serve
from rpd_sb3.teachers import Query, TeacherError, TeacherUnavailable, make_teacher
from rpd_sb3.teachers.openpi.messages import pack, resize_with_pad, unpack
from rpd_sb3.teachers.openpi.teacher import OpenPITeacher
from rpd_sb3.train import __main__ as train
from rpd_sb3.wire.tensors import ProtocolError
from rpd_sb3.wire.urls import OPENPI_API_KEY, openpi_url
from tests.support import ROOT
from tests.support.openpi_server import OpenPIServer, Raw, later, openpi_server
from tests.support.openpi_server import pack as server_pack
from tests.support.serving_helpers import free_port, wait_for
from tests.support.tiny_env import TINY, TinyEnv

HORIZON, WIDTH = 5, 32
STATE = {"observation/state": "state"}


def plan(observation: dict[str, Any]) -> dict[str, Any]:
    """Action t of the chunk is (first value of the state, t, 2, 3, ...), padded as openpi's are."""
    actions = np.tile(np.arange(WIDTH, dtype=np.float32), (HORIZON, 1))
    actions[:, 0], actions[:, 1] = observation["observation/state"][0], np.arange(HORIZON)
    return {"actions": actions, "state": observation["observation/state"], "policy_timing": {"infer_ms": 1.0}}


def query(values: Any, starts: Any = False, number: int | None = None, env_ids: Any = None) -> Query:
    """States (value, 0) of environments 0, 1, ..."""
    states = np.zeros((len(values), 2), np.float32)
    states[:, 0] = values
    ids = np.arange(len(values)) if env_ids is None else np.array(env_ids)
    return Query({"state": states}, ids, np.full(len(values), starts, bool), number=number)


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connected(closing: ExitStack, infer: Any = plan, **kwargs: Any) -> tuple[OpenPIServer, OpenPITeacher]:
    """A server, and a teacher that asks it about states."""
    server = closing.enter_context(openpi_server(infer))
    options = {"inputs": STATE, "action_dim": 2, "timeout": 5.0, "ready_timeout": 5.0, **kwargs}
    teacher = OpenPITeacher(server.url, **options)
    closing.callback(teacher.close)
    return server, teacher


def ask(teacher: OpenPITeacher, *args: Any, **kwargs: Any) -> list[list[float]]:
    return teacher.submit(query(*args, **kwargs)).result(5)["action"].tolist()


# ---- questions and answers


def test_rows_keep_their_order(closing: ExitStack) -> None:
    def slower_first(observation: dict[str, Any]) -> Any:
        value = observation["observation/state"][0]
        return later(0.02 * (8 - value) / 8, plan)(observation)

    _, teacher = connected(closing, slower_first)
    assert ask(teacher, range(8)) == [[i, 0] for i in range(8)]


def test_first_dimensions_of_a_padded_chunk_are_the_action(closing: ExitStack) -> None:
    _, teacher = connected(closing, action_dim=7)
    action = teacher.submit(query([9])).result(5)["action"]
    assert action.dtype == np.float32
    assert action.tolist() == [[9, 0, 2, 3, 4, 5, 6]]
    assert teacher.spec.action_space.shape == (7,)


def test_connections_are_used_at_a_time(closing: ExitStack) -> None:
    server, teacher = connected(closing, later(0.1, plan), n_connections=4)
    ask(teacher, range(4))  # opens them
    start = time.monotonic()
    first, second = teacher.submit(query(range(4))), teacher.submit(query(range(4, 8)))
    assert [future.result(5)["action"][0, 0] for future in (first, second)] == [0, 4]
    assert 0.2 <= time.monotonic() - start < 0.35  # one after the other: 0.8 s
    assert server.n_connections == 4


def test_too_many_queries_wait_for_room_while_the_server_answers(closing: ExitStack) -> None:
    go = threading.Event()
    _, teacher = connected(closing, lambda o: go.wait(5) and plan(o), max_pending=2)
    first = [teacher.submit(query([i])) for i in range(2)]
    teacher._failing = True
    with pytest.raises(TeacherUnavailable, match="2 queries are not answered yet"):
        teacher.submit(query([2])).result(0)
    teacher._failing = False
    threading.Timer(0.1, go.set).start()
    assert ask(teacher, [3]) == [[3, 0]]
    assert [future.result(5)["action"][0, 0] for future in first] == [0, 1]


def test_the_query_may_be_overwritten_at_once(closing: ExitStack) -> None:
    _, teacher = connected(closing, later(0.05, plan), n_connections=1)
    asked = query([1, 2])
    future = teacher.submit(asked)
    asked.inputs["state"][:] = 99
    assert future.result(5)["action"][:, 0].tolist() == [1, 2]


def test_observations_are_what_openpi_expects(closing: ExitStack) -> None:
    server, teacher = connected(
        closing,
        lambda _: {"actions": np.zeros((1, 7))},
        inputs={"observation/image": "images.human", "observation/state": "state", "prompt": "instruction"},
        action_dim=7,
        image_size=8,
    )
    assert teacher.spec.inputs == ("images.human", "state", "instruction")
    image = np.full((1, 4, 8, 3), 200, np.uint8)
    inputs = {"images.human": image, "state": np.ones((1, 3), np.float32), "instruction": np.array(["pick ü"])}
    teacher.submit(Query(inputs, np.array([7]), np.array([True]))).result(5)
    (seen,) = server.observations
    assert list(seen) == ["observation/image", "observation/state", "prompt"]
    assert seen["prompt"] == "pick ü"
    assert (seen["observation/state"].dtype, seen["observation/state"].tolist()) == (np.float32, [1, 1, 1])
    assert (seen["observation/image"].dtype, seen["observation/image"].shape) == (np.uint8, (8, 8, 3))
    assert seen["observation/image"][:, 0, 0].tolist() == [0, 0, 200, 200, 200, 200, 0, 0]


def test_images_are_sent_as_they_are_if_asked(closing: ExitStack) -> None:
    inputs = {"image": "images.base"}
    server, teacher = connected(closing, lambda _: {"actions": np.zeros((1, 2))}, inputs=inputs, image_size=None)
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(1, 2, 4, 3)
    teacher.submit(Query({"images.base": image}, np.array([0]), np.array([True]))).result(5)
    np.testing.assert_array_equal(server.observations[0]["image"], image[0])


def test_metadata_and_spec(closing: ExitStack) -> None:
    server = closing.enter_context(openpi_server(plan, metadata={"robot": "arm", "reset_pose": np.zeros(3)}))
    options = {"control_mode": "pd_ee_delta_pose", "gripper": "0..1", "rotation": "axis_angle"}
    teacher = make_teacher(f"openpi:{server.url}", "Any-v0", **options)
    closing.callback(teacher.close)
    assert isinstance(teacher, OpenPITeacher)
    assert teacher.metadata["robot"] == "arm"
    spec = teacher.spec
    assert (spec.labels, spec.inputs, spec.stateful) == ({"action"}, ("images.human", "instruction"), False)
    assert {key: getattr(spec, key) for key in options} == options


# ---- chunks


def test_a_chunk_is_executed_to_its_horizon(closing: ExitStack) -> None:
    server, teacher = connected(closing, exec_horizon=3)
    assert teacher.spec.stateful
    assert [ask(teacher, [i], number=i)[0] for i in range(7)] == [
        [0, 0], [0, 1], [0, 2], [3, 0], [3, 1], [3, 2], [6, 0]
    ]  # fmt: skip
    assert len(server.observations) == 3


def test_an_episode_starts_with_a_new_chunk(closing: ExitStack) -> None:
    _, teacher = connected(closing, exec_horizon=3)
    ask(teacher, [0, 10])
    assert ask(teacher, [1, 11], starts=[False, True]) == [[0, 1], [11, 0]]
    assert ask(teacher, [2, 12]) == [[0, 2], [11, 1]]


def test_chunks_belong_to_their_environment(closing: ExitStack) -> None:
    _, teacher = connected(closing, exec_horizon=3)
    ask(teacher, [0, 10])
    assert ask(teacher, [11], env_ids=[1]) == [[10, 1]]
    assert ask(teacher, [12, 1], env_ids=[1, 0]) == [[10, 2], [0, 1]]


def test_queries_that_are_not_answered_yet_go_on_with_the_chunk(closing: ExitStack) -> None:
    server, teacher = connected(closing, later(0.05, plan), exec_horizon=3)
    futures = [teacher.submit(query([i], number=i)) for i in range(4)]
    assert [future.result(5)["action"][0].tolist() for future in futures] == [[0, 0], [0, 1], [0, 2], [3, 0]]
    assert len(server.observations) == 2


def test_a_repeated_query_gets_the_steps_that_it_had(closing: ExitStack) -> None:
    broken = [True]

    def infer(observation: dict[str, Any]) -> Any:
        if broken[0] and observation["observation/state"][0] >= 10:
            raise KeyError("no")
        return plan(observation)

    server, teacher = connected(closing, infer, exec_horizon=3)
    ask(teacher, [0], number=0)
    for _ in range(2):
        with pytest.raises(TeacherError, match="KeyError"):
            ask(teacher, [1, 11], number=1)  # environment 0 has a plan, 1 fails
    broken[0] = False
    assert ask(teacher, [1, 11], number=1) == [[0, 1], [11, 0]]
    assert ask(teacher, [2, 12], number=2) == [[0, 2], [11, 1]]
    assert ask(teacher, [3, 13], number=3) == [[3, 0], [11, 2]]


def test_an_environment_goes_on_with_its_chunk_when_an_answer_was_lost(closing: ExitStack) -> None:
    holder: list[OpenPIServer] = []

    def infer(observation: dict[str, Any]) -> Any:
        if len(holder[0].observations) in (1, 4):
            holder[0].drop()
        return later(0.02, plan)(observation)

    server, teacher = connected(closing, infer, action_dim=1, exec_horizon=2, n_connections=1)
    holder.append(server)
    venv = VecTeacher(DummyVecEnv([lambda: TinyEnv(length=9)]), teacher)
    venv.seed(0)
    obs = [venv.reset()[0, 0]]
    labels = []
    for _ in range(6):
        after, _, _, (info,) = venv.step(np.full((1, 1), 0.1, np.float32))
        obs.append(after[0, 0])
        labels.append(info["teacher_action"])
    np.testing.assert_allclose(np.array(labels)[:, 0], np.repeat(obs[:6:2], 2), atol=1e-6)
    assert len(server.observations) == 5  # three chunks, two of them asked for twice


def test_numbers_may_start_again(closing: ExitStack) -> None:
    _, teacher = connected(closing, exec_horizon=3)
    assert ask(teacher, [0], number=0) == [[0, 0]]
    assert ask(teacher, [5], starts=True, number=0) == [[5, 0]]


# ---- failures


def test_no_answer_in_time_may_pass(closing: ExitStack) -> None:
    server, teacher = connected(closing, later(2.0, plan), timeout=0.1)
    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=r"^openpi server at ws://\S+ gave no answer within 0.1 s$"):
        ask(teacher, [1])
    assert time.monotonic() - start < 1
    assert len(server.observations) == 1


def test_a_server_that_hangs_holds_submit_up_once(closing: ExitStack) -> None:
    _, teacher = connected(closing, later(9.0, plan), timeout=0.3, max_pending=2, n_connections=1)
    start = time.monotonic()
    answers = [teacher.submit(query([1])) for _ in range(20)]
    assert time.monotonic() - start < 2.0  # 9 x 0.3 s if each waited for room
    for answer in answers:
        with pytest.raises(TeacherUnavailable):
            answer.result(5)


def test_a_late_answer_is_not_taken_for_the_next_one(closing: ExitStack) -> None:
    def infer(observation: dict[str, Any]) -> Any:
        slow = observation["observation/state"][0] == 1
        return later(0.3 if slow else 0.0, plan)(observation)

    _, teacher = connected(closing, infer, timeout=0.1, n_connections=1)
    with pytest.raises(TeacherUnavailable, match="no answer"):
        ask(teacher, [1])
    time.sleep(0.25)
    assert ask(teacher, [2]) == [[2, 0]]


def test_a_server_that_reads_nothing_is_given_up(closing: ExitStack) -> None:
    go = threading.Event()
    answer = {"actions": np.zeros((1, 2))}
    options = {"image_size": None, "timeout": 0.3, "n_connections": 2}
    server, teacher = connected(closing, later(0.05, lambda _: dict(answer)), inputs={"image": "images.a"}, **options)
    closing.callback(go.set)

    def show(n: int, size: int) -> Any:
        return teacher.submit(
            Query({"images.a": np.zeros((n, size, size, 3), np.uint8)}, np.arange(n), np.ones(n, bool))
        )

    show(2, 8).result(5)  # opens both connections
    server.infer = lambda _: go.wait(5) and dict(answer)
    show(1, 8)
    wait_for(lambda: len(server.observations) == 3)  # from now on it reads nothing
    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match="no answer within 0.3 s"):
        show(1, 4000).result(5)  # more than the sockets' buffers
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("when", ["idle", "answering"])
def test_a_connection_that_drops_is_opened_again_for_the_next_attempt(when: str, closing: ExitStack) -> None:
    def infer(observation: dict[str, Any]) -> Any:
        if when == "answering" and len(server.observations) == 2:
            server.drop()
        return later(0.02, plan)(observation)

    server, teacher = connected(closing, infer, n_connections=1)
    ask(teacher, [1])
    if when == "idle":
        server.drop()
        wait_for(lambda: not server.connections)
    with pytest.raises(TeacherUnavailable, match="closed the connection"):
        ask(teacher, [2])
    assert ask(teacher, [2]) == [[2, 0]]
    assert server.n_connections == 2


def test_a_server_may_come_back(closing: ExitStack) -> None:
    port = free_port()
    with openpi_server(plan, port=port):
        teacher = OpenPITeacher(f"127.0.0.1:{port}", inputs=STATE, action_dim=2)
    closing.callback(teacher.close)
    with pytest.raises(TeacherUnavailable, match="closed the connection|refused"):
        ask(teacher, [1])
    with pytest.raises(TeacherUnavailable, match="refused"):
        ask(teacher, [1])
    with openpi_server(plan, port=port):
        assert ask(teacher, [2]) == [[2, 0]]


def test_a_traceback_becomes_its_last_line(closing: ExitStack) -> None:
    def infer(observation: dict[str, Any]) -> dict[str, Any]:
        return {"actions": observation["observation/wrist_image"]}

    server, teacher = connected(closing, infer)
    with pytest.raises(
        TeacherError, match=r"^openpi server at \S+ failed: KeyError: 'observation/wrist_image'$"
    ) as caught:
        ask(teacher, [1])
    assert not isinstance(caught.value, TeacherUnavailable)
    assert len(server.observations) == 1, "asking again would not help"
    server.infer = plan
    assert ask(teacher, [2]) == [[2, 0]]


def test_one_failed_row_gives_up_those_in_line(closing: ExitStack) -> None:
    server, teacher = connected(closing, later(0.05, lambda o: o["nothing"]), n_connections=1)
    with pytest.raises(TeacherError, match="KeyError: 'nothing'"):
        ask(teacher, range(20))
    server.infer = plan
    assert ask(teacher, [1]) == [[1, 0]]
    assert len(server.observations) <= 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"action": np.zeros((5, 7))}, "sent no array 'actions', only 'action', 'server_timing'"),
        ({"actions": np.zeros((5, 1))}, r"actions of shape \(5, 1\) and float64, expected .* at least action_dim=2"),
        ({"actions": np.zeros(7)}, r"actions of shape \(7,\)"),
        ({"actions": np.zeros((2, 7), bool)}, "and bool"),
        ({"actions": np.zeros((1, 7))}, "plans 1 actions, fewer than exec_horizon=2; choose fewer"),
        (Raw(b"\xc1"), "sent what cannot be read: not MessagePack"),
        (Raw(server_pack([1])), "sent list, expected a map"),
        (Raw(bytes(2**26 + 1)), "a message is too big, its own may have 67108864 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_answers_are_one_sentence(answer: Any, message: str, closing: ExitStack) -> None:
    _, teacher = connected(closing, lambda _: answer, exec_horizon=2)
    with pytest.raises(TeacherError, match=message) as caught:
        ask(teacher, [1])
    assert not isinstance(caught.value, TeacherUnavailable)
    assert str(caught.value).startswith(f"openpi server at {teacher.url}")


@pytest.mark.parametrize("images", [np.zeros((1, 4, 4, 3)), np.zeros((1, 3, 4, 4), np.uint8)])
def test_bad_questions_are_one_sentence(images: np.ndarray, closing: ExitStack) -> None:
    _, teacher = connected(closing, inputs={"image": "images.a"}, max_pending=1)
    for _ in range(2):  # and take no room
        with pytest.raises(TeacherError, match="must be uint8 of shape"):
            teacher.submit(Query({"images.a": images}, np.arange(1), np.ones(1, bool))).result(5)


def test_what_cannot_be_packed_is_an_error_and_the_thread_lives(closing: ExitStack) -> None:
    _, teacher = connected(closing, n_connections=1)
    with pytest.raises(TeacherError, match="cannot be asked: TypeError.*an array of complex64 cannot be sent"):
        teacher.submit(query([1])._replace(inputs={"state": np.zeros((1, 2), np.complex64)})).result(5)
    assert ask(teacher, [2]) == [[2, 0]]


# ---- the beginning and the end


def test_waits_for_a_server_that_does_not_listen_yet(closing: ExitStack, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    server = openpi_server(plan, port=port)
    timer = threading.Timer(0.2, lambda: closing.enter_context(server))
    timer.start()
    teacher = OpenPITeacher(f"127.0.0.1:{port}", inputs=STATE, action_dim=2, ready_timeout=5.0)
    closing.callback(teacher.close)
    assert ask(teacher, [1]) == [[1, 0]]
    assert [(r.levelno, r.args[0]) for r in caplog.records if r.args] == [(logging.WARNING, 5.0)]


def test_nobody_there_is_one_sentence() -> None:
    message = r"^openpi server at ws://127.0.0.1:\d+: .*refused; waited 0.1 s for it, start one with"
    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match=message):
        OpenPITeacher(f"127.0.0.1:{free_port()}", ready_timeout=0.1)
    assert time.monotonic() - start < 2


def test_a_server_without_a_word_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="gave no answer within"):
            OpenPITeacher(f"127.0.0.1:{port}", ready_timeout=0.2)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("Traceback\n\nValueError: no model\n", "failed: ValueError: no model"),
        (Raw(b"\x01"), "sent int, expected a map"),
    ],
)
def test_a_bad_beginning_is_an_error(metadata: Any, message: str) -> None:
    with openpi_server(plan, metadata=metadata) as server, pytest.raises(TeacherError, match=message):
        OpenPITeacher(server.url, ready_timeout=5)


def test_the_api_key_is_shown(closing: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPENPI_API_KEY, raising=False)
    server = closing.enter_context(openpi_server(plan, api_key="secret"))
    with pytest.raises(TeacherError, match=r"wants another API key \(HTTP 403\)"):
        OpenPITeacher(server.url, ready_timeout=5)
    closing.callback(OpenPITeacher(server.url, api_key="secret").close)
    assert server.headers[-1]["Authorization"] == "Api-Key secret"
    monkeypatch.setenv(OPENPI_API_KEY, "secret")
    closing.callback(OpenPITeacher(server.url).close)


def test_another_server_is_no_openpi_server() -> None:
    with openpi_server(plan) as server, pytest.raises(TeacherError, match="answered HTTP 200 instead of opening a W"):
        OpenPITeacher(f"ws://{server.url}/healthz", ready_timeout=5)


def test_close_fails_what_waits_and_ends_the_threads(closing: ExitStack) -> None:
    server = closing.enter_context(openpi_server(later(5.0, plan)))
    running = threading.active_count()
    teacher = OpenPITeacher(server.url, inputs=STATE, action_dim=2, n_connections=2)
    future = teacher.submit(query(range(5)))
    wait_for(lambda: len(server.observations) == 2)
    start = time.monotonic()
    teacher.close()
    assert time.monotonic() - start < 1
    for asked in (future, teacher.submit(query([1]))):
        with pytest.raises(TeacherError, match="^the teacher is closed$"):
            asked.result(1)
    wait_for(lambda: threading.active_count() == running, 2)
    teacher.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"inputs": {}}, "inputs={} must map"),
        ({"inputs": {"image": "human"}}, "inputs: 'image': 'human' is unknown"),
        ({"inputs": {"observation": {"image": "images.human"}}}, "inputs: 'observation': .* is unknown"),
        ({"action_dim": 0}, "action_dim=0 must be a whole number"),
        ({"image_size": -1}, "image_size=-1 must be"),
        ({"timeout": 0}, "timeout=0 must be a positive number"),
        ({"api_key": "a\nb"}, "api_key, or RPD_SB3_OPENPI_API_KEY, must consist of printable ASCII"),
        ({"action_dims": 7}, "has no argument 'action_dims' .*did you mean 'action_dim'"),
    ],
)
def test_impossible_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_teacher("openpi:127.0.0.1:1", "Any-v0", **kwargs)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("gpu-box", "ws://gpu-box:8000"),
        ("ws://gpu-box:9000/", "ws://gpu-box:9000"),
        ("http://gpu-box:9000", "ws://gpu-box:9000"),
        ("https://gpu-box/pi0/", "wss://gpu-box/pi0"),
        ("wss://[::1]:9000", "wss://[::1]:9000"),
        ("[::1]", "ws://[::1]:8000"),
    ],
)
def test_address_becomes_a_url(address: str, url: str) -> None:
    assert openpi_url(address) == url


@pytest.mark.parametrize(
    "address", ["", ":8000", "box:port", "box:99999", "ftp://box", "ws://", "me@box", "a b", "b?x=1"]
)
def test_what_is_not_an_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is not an address; expected e.g. gpu-box:8000"):
        openpi_url(address)


# ---- messages


def test_messages_are_openpis_bytes() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    message = {"image": image, "n": np.float32(1.5), "b": np.bool_(1), "s": "x", "l": [1]}
    assert pack(message) == server_pack(message)


@pytest.mark.parametrize("dtype", ["?", "u1", "<i2", ">i4", "<i8", "<f2", ">f4", "<f8"])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (1, 0, 2)])
def test_arrays_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype)
    found = unpack(pack({"a": [array]}))["a"][0]
    assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, shape, array.tobytes())


def array(data: Any = b"\0" * 8, dtype: Any = "<f4", shape: Any = (2,)) -> bytes:
    """An array as a server might write it."""
    return msgpack.packb({b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape})


def number(data: Any, dtype: str) -> bytes:
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not MessagePack"),
        (pack(1) + b"\x00", "not MessagePack"),
        (b"\x91" * 5000, "not MessagePack"),
        (b"\xa1\xff", "not MessagePack"),
        (array(dtype="|O"), r"arrays of dtype '\|O' are not read"),
        (array(dtype="|V8"), "are not read"),
        (array(dtype="<U2"), "are not read"),
        (array(dtype=[["a", "<f4"]]), "are not read"),
        (array(shape=(3,)), r"8 bytes for an array of float32 and shape \[3\]"),
        (array(shape=(-1, -2)), "must be at most"),
        (array(shape=(2.0,)), "must be at most"),
        (array(shape=(True, 2)), "must be at most"),
        (array(shape=2), "must be at most"),
        (array(shape=(1,) * 9), "must be at most 8"),
        (array(shape=(2**62, 2**62)), "8 bytes for an array"),
        (array(b"", shape=(0, 2**62, 4)), "too large"),
        (array("text"), "str for an array"),
        (array(b"\x02", "|b1", (1,)), "a boolean must be 0 or 1"),
        (number(1000, "|u1"), "not MessagePack"),
        (number(1, "|O"), "are not read"),
    ],
    ids=str,
)
def test_malformed_messages_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack(data)


@pytest.mark.parametrize(
    "value", [np.array([None]), np.array(["a"]), np.zeros(2, "c8"), np.datetime64("now"), object()]
)
def test_only_numbers_are_sent(value: Any) -> None:
    with pytest.raises(TypeError, match="cannot be sent; expected numbers"):
        pack({"a": value})


@pytest.mark.parametrize(
    ("height", "width", "size", "box"),
    [(8, 8, 8, (0, 0, 8, 8)), (4, 8, 8, (2, 0, 4, 8)), (16, 8, 8, (0, 2, 8, 4)), (10, 7, 8, (0, 1, 8, 5)), (1, 99, 8, (3, 0, 1, 8))],
)  # fmt: skip
def test_images_are_centred_on_black(height: int, width: int, size: int, box: tuple[int, int, int, int]) -> None:
    found = resize_with_pad(np.full((height, width, 3), 77, np.uint8), size)
    expected = np.zeros((size, size, 3), np.uint8)
    top, left, high, wide = box
    expected[top : top + high, left : left + wide] = 77
    np.testing.assert_array_equal(found, expected)


# ---- the commands, and an environment


def test_the_doctor_meets_an_openpi_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OPENPI_API_KEY, "secret")
    with openpi_server(plan, api_key="secret") as server:
        (found,) = doctor.inspect_teacher(f"openpi:{server.url}")
        assert found.status == OK
        assert server.n_connections == 1
        monkeypatch.setenv(OPENPI_API_KEY, "wrong")
        (found,) = doctor.inspect_teacher(f"openpi:{server.url}")
        assert found.status == FAIL
        assert "wants another API key (HTTP 403)" in found.value
        assert OPENPI_API_KEY in found.fix


def test_the_doctor_tells_other_servers_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT", 0.2)
    with openpi_server(plan, metadata="not first") as server, socket.create_server(("127.0.0.1", 0)) as silent:
        silent_url = f"127.0.0.1:{silent.getsockname()[1]}"
        urls = (server.url, f"ws://{server.url}/healthz", silent_url, f"127.0.0.1:{free_port()}", "box:port")
        findings = [doctor.inspect_teacher(f"openpi:{url}")[0] for url in urls]
    assert {finding.status for finding in findings} == {FAIL}
    reasons = ("not first", "HTTP 200", "no answer within", "refused", "address")
    for finding, reason in zip(findings, reasons):
        assert reason in finding.value


def test_an_openpi_server_is_not_served_again() -> None:
    with pytest.raises(ValueError, match="is a service already; train with it"):
        serve.check(serve.make_parser().parse_args(["--teacher", "openpi:gpu-box:8000"]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rpd_sb3.teachers.openpi.teacher", None)
    with pytest.raises(ValueError, match=r"pip install 'rpd_sb3\[openpi\]'"):
        make_teacher("openpi:gpu-box:8000", "Any-v0")


def towards_goal(observation: dict[str, Any]) -> dict[str, Any]:
    position, goal = observation["observation/state"]
    return {"actions": np.full((HORIZON, 1), np.clip(2 * (goal - position), -1, 1), np.float32)}


@pytest.mark.parametrize("horizon", [1, 3])
def test_an_environment_is_labelled(horizon: int, closing: ExitStack) -> None:
    _, teacher = connected(closing, towards_goal, action_dim=1, exec_horizon=horizon)
    venv = VecTeacher(DummyVecEnv([lambda i=i: TinyEnv(length=4 + i) for i in range(3)]), teacher)
    venv.seed(0)
    obs = venv.reset()
    planned = np.zeros(3, np.float32)
    age = np.zeros(3, int)
    for _ in range(12):
        planned = np.where(age % horizon == 0, obs[:, 1] - obs[:, 0], planned)
        obs, _, dones, infos = venv.step(np.ones((3, 1), np.float32))
        labels = np.array([np.asarray(info["teacher_action"])[0] for info in infos])
        np.testing.assert_allclose(labels, np.clip(2 * planned, -1, 1), rtol=0, atol=1e-6)
        age = np.where(dones, 0, age + 1)
    venv.close()


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_server_is_evaluated_from_the_command_line(horizon: int, tmp_path: Path) -> None:
    words = ["--env", TINY, "-n", "6", "--n-envs", "2", "--vec-env", "dummy", "--json", str(tmp_path / "result.json")]
    words += ["--teacher-kwargs", "inputs.observation/state:state", "action_dim:1", f"exec_horizon:{horizon}"]
    with openpi_server(towards_goal) as server:
        assert evaluate.main(["--teacher", f"openpi:{server.url}", *words]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["success_once"] == 1.0
    assert result["name"] == f"teacher openpi:{server.url}"
    assert len(server.observations) == 60 if horizon == 1 else len(server.observations) < 40


def test_what_the_page_shows_exists() -> None:
    page = (ROOT / "docs" / "openpi.md").read_text()
    arguments = inspect.signature(OpenPITeacher).parameters
    n = 0
    for command, parser in (("evaluate", evaluate.make_parser()), ("train", train.make_parser())):
        for line in re.findall(rf"^python -m rpd_sb3.{command} (.*)$", page, re.MULTILINE):
            args = parser.parse_args(shlex.split(line))
            assert set(parse_pairs(getattr(args, "teacher_kwargs", []), "--teacher-kwargs")) <= set(arguments)
            n += 1
    assert n == 4
    for name, value in re.findall(r"`(\w+)` \((\d+)(?: s)?\)", page):
        assert arguments[name].default == int(value)
