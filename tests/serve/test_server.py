"""The teacher service over HTTP: every route, every refusal with its reason, and clients that vanish."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from rpd_sb3 import __version__
from rpd_sb3.serve import __main__ as serve
from rpd_sb3.serve.address import bind
from rpd_sb3.serve.app import Service, make_app
from rpd_sb3.serve.engine import Engine
from rpd_sb3.serve.metrics import Metrics
from rpd_sb3.serve.regions import Regions
from rpd_sb3.serve.requests import read_request
from rpd_sb3.teachers.registry import TEACHERS
from rpd_sb3.wire.messages import HEADER_LENGTH, build
from rpd_sb3.wire.tensors import MAX_STRING
from tests.support.helpers import EchoTeacher
from tests.support.raw_client import (
    INFER,
    CountingTeacher,
    HeldTeacher,
    ask,
    assert_refused,
    connect,
    infer,
    labels,
    post,
    raw_request,
)
from tests.support.serving_helpers import free_port, serving, serving_process, states, wait_for


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    """URL of a service with an EchoTeacher that takes small requests; no test may change its state."""
    with serving(max_body=100_000) as service:
        yield service.url


class VisionTeacher(EchoTeacher):
    """Wants an image and an instruction; its action is the number of letters and the first pixel."""

    def __init__(self) -> None:
        super().__init__(
            lambda query: np.stack(
                [np.char.str_len(query.inputs["instruction"]), query.inputs["images.base"][:, 0, 0, 0]], axis=1
            )
        )
        self.spec = replace(self.spec, inputs=("images.base", "instruction"), image_sizes={"base": (4, 6)})


@pytest.fixture(scope="module")
def vision() -> Iterator[str]:
    """URL of a service with a VisionTeacher."""
    with serving(VisionTeacher) as service:
        yield service.url


def get(url: str, **kwargs: Any) -> requests.Response:
    return requests.get(url, timeout=30, **kwargs)


def error(response: requests.Response) -> str:
    return str(response.json()["error"])


# ---- pages


def test_server_metadata_names_the_extensions(echo: str) -> None:
    assert get(f"{echo}/v2").json() == {
        "name": "rpd_sb3",
        "version": __version__,
        "extensions": ["binary_tensor_data", "system_shared_memory"],
    }


def test_prometheus_counts_requests_by_status_and_rows_by_batch() -> None:
    with serving() as service:
        infer(service.url)
        infer(service.url, {"state": states(5)})
        infer(service.url, {})
        page = get(f"{service.url}/metrics")
    assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page.text)
        for sample in family.samples
    }
    assert found["rpd_sb3_requests_total", "200"] == 2
    assert found["rpd_sb3_requests_total", "400"] == 1
    assert found["rpd_sb3_request_seconds_count",] == 2, "answered"
    assert found["rpd_sb3_batch_size_sum",] == 7
    assert found["rpd_sb3_queue_length",] == 0


# ---- answers


def test_binary_answer_is_the_teachers(echo: str) -> None:
    np.testing.assert_array_equal(labels(infer(echo))["action"], states(2)[:, 1:3])


def test_json_answer_is_the_teachers(echo: str) -> None:
    body = {"id": "q7", "inputs": [{"name": "state", "datatype": "FP32", "shape": [1, 3], "data": [[1, 2, 3.5]]}]}
    response = post(echo, json.dumps(body).encode())
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == {
        "model_name": "teacher",
        "id": "q7",
        "outputs": [{"name": "action", "datatype": "FP32", "shape": [1, 2], "data": [2.0, 3.5]}],
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_reach_the_teacher_as_float32(dtype: type) -> None:
    teacher = EchoTeacher()
    with serving(lambda: teacher) as service:
        labels(infer(service.url, {"state": states(2).astype(dtype), "action": np.ones((2, 2), dtype)}))
    (query,) = teacher.queries
    assert query.actions is not None
    assert (query.inputs["state"].dtype, query.actions.dtype) == (np.float32, np.float32)


@pytest.mark.parametrize(("dtype", "sent"), [(np.float64, np.float32), (np.float16, np.float32), (np.int32, np.int64)])
def test_answers_have_the_datatypes_of_the_metadata(dtype: type, sent: type) -> None:
    with serving(lambda: EchoTeacher(lambda query: np.ones((len(query.env_ids), 2), dtype))) as service:
        assert labels(infer(service.url))["action"].dtype == sent


def test_images_and_text_reach_the_teacher(vision: str) -> None:
    arrays = {"images.base": np.full((2, 4, 6, 3), 9, np.uint8), "instruction": np.array(["ü", "four"])}
    assert labels(infer(vision, arrays))["action"].tolist() == [[1, 9], [4, 9]]


# ---- refusals


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v2/models/other"), ("GET", "/v2/models/other/ready"), ("POST", "/v2/models/other/infer")],
)
def test_unknown_model_is_404_and_the_right_one_is_named(echo: str, method: str, path: str) -> None:
    response = requests.request(method, echo + path, timeout=30)
    assert_refused(response, 404, "only 'teacher'")
    assert "name:teacher" in error(response)


@pytest.mark.parametrize("path", ["/v3", "/v2/models", "/v2/models/teacher/config", "/v2/%00"])
def test_unknown_path_is_404(echo: str, path: str) -> None:
    response = get(echo + path)
    assert response.status_code == 404
    assert error(response).endswith(": Not Found")


@pytest.mark.parametrize(("method", "path"), [("GET", INFER), ("POST", "/v2")])
def test_wrong_method_is_405(echo: str, method: str, path: str) -> None:
    assert_refused(requests.request(method, echo + path, timeout=30), 405, f"{method} {path}: Method Not Allowed")


def test_host_header_that_is_not_a_host_is_not_a_crash(echo: str) -> None:
    response = get(f"{echo}/v3", headers={"Host": "["})
    assert response.status_code in (400, 404)


@pytest.mark.parametrize("path", [INFER, "/v2/systemsharedmemory/region/r/register"])
def test_announced_body_that_is_too_large_is_413_before_it_is_sent(echo: str, path: str) -> None:
    with connect(echo) as connection:
        connection.sendall(raw_request(b"", {"Content-Length": "100001"}, path=path))
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"the body has 100001 bytes, at most 100000 are taken" in answer


@pytest.mark.parametrize("path", [INFER, "/v2/systemsharedmemory/region/r/register"])
def test_chunked_body_that_is_too_large_is_413(echo: str, path: str) -> None:
    assert_refused(
        requests.post(echo + path, data=(b"x" * 10_000 for _ in range(11)), timeout=30),
        413,
        "the body has more than 100000 bytes",
    )


def test_chunked_body_is_a_body(echo: str) -> None:
    message = build({}, "inputs", {"state": states(1)})
    response = requests.post(
        echo + INFER, data=(message.body[i : i + 7] for i in range(0, len(message.body), 7)), headers=message.headers
    )
    assert labels(response)["action"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({}, "'state' is missing"),
        ({"state": states(1), "speed": states(1)}, "'speed' is unknown"),
        ({"state": states(2), "env_id": np.arange(3)}, "same number of rows, 1 to 4096, got {'state': 2, 'env_id': 3}"),
        ({"state": states(0)}, "same number of rows"),
        ({"state": states(4097)}, "same number of rows"),
        ({"state": np.float32(1)}, "same number of rows"),
        ({"state": states(2).astype(np.int32)}, "'state' must be FP16 or FP32 or FP64, got INT32"),
        ({"state": np.float32([[0, 0, 0], [0, 0, np.nan]])}, "'state', row 1, is not finite"),
        ({"state": np.full((2, 3), 1e300)}, "'state', row 0, is not finite"),
        ({"state": states(2), "env_id": np.zeros(2)}, "'env_id' must be INT64 or INT32, got FP64"),
        ({"state": states(2), "env_id": np.zeros((2, 1), int)}, "'env_id' must have shape [N], got [2, 1]"),
        ({"state": states(2), "episode_start": np.ones(2, int)}, "'episode_start' must be BOOL, got INT64"),
        ({"state": states(2), "action": states(2), "action_tokens": np.ones(2, int)}, "exclude each other"),
    ],
)
def test_query_that_does_not_suit_the_teacher_is_400(echo: str, arrays: dict[str, np.ndarray], reason: str) -> None:
    assert_refused(infer(echo, {name: np.asarray(array) for name, array in arrays.items()}), 400, reason)


@pytest.mark.parametrize(
    ("image", "instruction", "reason"),
    [
        (np.zeros((1, 4, 6), np.uint8), ["go"], "'images.base' must have shape [N, 4, 6, 3], got [1, 4, 6]"),
        (np.zeros((1, 6, 4, 3), np.uint8), ["go"], "'images.base' must have shape"),
        (np.zeros((1, 4, 6, 3), np.float32), ["go"], "'images.base' must be UINT8, got FP32"),
        (np.zeros((1, 4, 6, 3), np.uint8), [b"\xff"], "'instruction' is not UTF-8"),
        (np.zeros((1, 4, 6, 3), np.uint8), [["go"]], "'instruction' must have shape [N], got [1, 1]"),
    ],
)
def test_images_and_text_of_another_form_are_400(
    vision: str, image: np.ndarray, instruction: list[Any], reason: str
) -> None:
    assert_refused(infer(vision, {"images.base": image, "instruction": np.array(instruction, object)}), 400, reason)


@pytest.mark.parametrize(
    ("body", "headers", "reason"),
    [
        (b"{", {}, "not JSON"),
        (b"{}", {"Inference-Header-Content-Length": "\xb2"}, "must be a number up to 2"),
        (b"{}", {"Content-Encoding": "gzip"}, "Content-Encoding 'gzip'"),
    ],
)
def test_request_that_is_not_a_message_is_400(echo: str, body: bytes, headers: dict[str, str], reason: str) -> None:
    assert_refused(post(echo, body, headers), 400, reason)


def test_name_that_is_not_unicode_text_is_400(echo: str) -> None:
    tensor = {"name": "\ud800", "datatype": "FP32", "shape": [1], "parameters": {"binary_data_size": -1}}
    assert_refused(post(echo, json.dumps({"inputs": [tensor]}).encode()), 400, "\\ud800")


def test_instructions_of_very_different_lengths_cost_what_they_are_long() -> None:
    spec = VisionTeacher().spec
    words = np.array([b"x" * MAX_STRING] + [b"go"] * 1023, object)
    message = build({}, "inputs", {"images.base": np.zeros((1024, 4, 6, 3), np.uint8), "instruction": words})
    tracemalloc.start()
    try:
        read_request(message.body, message.headers[HEADER_LENGTH], spec, Regions())
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_instruction_that_is_too_long_is_400(vision: str) -> None:
    arrays = {"images.base": np.zeros((1, 4, 6, 3), np.uint8), "instruction": np.array(["x" * (MAX_STRING + 1)])}
    assert_refused(infer(vision, arrays), 400, f"an element of {MAX_STRING + 1} bytes")


# ---- tokens

TOKEN = "open:sesame"


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """URL of a service with a token."""
    with serving(token=TOKEN) as service:
        yield service.url


def basic(text: str) -> bytes:
    return b"Basic " + base64.b64encode(text.encode())


GUARDED = ("/", "/metrics", "/v2", "/v2/models/teacher", INFER, "/v3")
WRONG = (
    b"",
    b"Bearer",
    b"Bearer wrong",
    TOKEN.encode(),
    b"Digest " + TOKEN.encode(),
    basic("user:wrong"),
    basic(TOKEN),
    b"Basic !",
    b"Basic \xff",
)


@pytest.mark.parametrize(
    ("path", "header"), [*((path, None) for path in GUARDED), *(("/v2", header) for header in WRONG)]
)
def test_without_the_token_everything_is_401(guarded: str, path: str, header: bytes | None) -> None:
    response = requests.get(guarded + path, headers={} if header is None else {"Authorization": header}, timeout=30)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"].startswith("Basic realm=")
    assert "bearer token" in error(response)


@pytest.mark.parametrize("header", [b"Bearer " + TOKEN.encode(), b"bearer " + TOKEN.encode(), basic(f"me:{TOKEN}")])
def test_token_opens_everything(guarded: str, header: bytes) -> None:
    for path in ("/", "/metrics", "/v2", "/v2/models/teacher"):
        assert get(guarded + path, headers={"Authorization": header}).status_code == 200


@pytest.mark.parametrize("token", ["öffne", "two words", "line\n"])
def test_token_that_no_header_can_hold_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        make_app(Service(Engine(EchoTeacher, Metrics()), "teacher"), token)


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready"])
def test_health_needs_no_token(guarded: str, path: str) -> None:
    assert get(guarded + path).status_code == 200


# ---- a teacher that cannot answer


def test_full_queue_is_503_with_retry_after() -> None:
    teacher = HeldTeacher()
    with serving(lambda: teacher, queue_size=1) as service, ThreadPoolExecutor() as pool:
        running = pool.submit(infer, service.url)
        wait_for(lambda: teacher.entered == 1)
        waiting = pool.submit(infer, service.url)
        wait_for(lambda: service.engine.waiting == 1)
        refused = infer(service.url)
        teacher.go.set()
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert error(refused) == "the queue is full: 1 queries wait"
        assert [answer.result().status_code for answer in (running, waiting)] == [200, 200]


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/teacher/ready", "/v2/models/teacher", INFER])
def test_service_that_is_loading_is_503_with_retry_after(path: str) -> None:
    go = threading.Event()
    with serving(lambda: (go.wait(30), EchoTeacher())[1], wait=False) as service:
        response = requests.request("POST" if path == INFER else "GET", service.url + path, timeout=30)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
        assert "is loading" in response.text
        assert get(f"{service.url}/v2/health/live").status_code == 200
        go.set()
        wait_for(lambda: service.engine.ready)
        assert infer(service.url).status_code == 200


def test_query_whose_deadline_passes_while_it_waits_is_503() -> None:
    teacher = HeldTeacher()
    with serving(lambda: teacher) as service, ThreadPoolExecutor() as pool:
        first = pool.submit(infer, service.url)
        wait_for(lambda: teacher.entered == 1)
        hasty = pool.submit(infer, service.url, timeout=1)  # microsecond
        patient = pool.submit(infer, service.url, timeout=60_000_000)
        wait_for(lambda: service.engine.waiting == 2)
        teacher.go.set()
        assert (first.result().status_code, patient.result().status_code) == (200, 200)
        assert (hasty.result().status_code, hasty.result().headers["Retry-After"]) == (503, "1")
        assert error(hasty.result()) == "the query's deadline passed while it waited"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_answer_that_is_not_finite_is_422(value: float) -> None:
    with serving(lambda: EchoTeacher(lambda query: np.array([[0.0, 0.0], [0.0, value]]))) as service:
        assert_refused(infer(service.url), 422, "the teacher's 'action' for row 1 is not finite")


def test_teacher_that_raises_is_500_with_its_words(caplog: pytest.LogCaptureFixture) -> None:
    def fail(query: Any) -> np.ndarray:
        raise ArithmeticError("no solution")

    with serving(lambda: EchoTeacher(fail)) as service:
        response = infer(service.url)
    assert response.status_code == 500
    assert response.json() == {"error": "the teacher failed: ArithmeticError: no solution", "type": "TeacherError"}
    assert "no solution" in caplog.text, "with a traceback for whoever runs the service"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda query: np.zeros((1, 2)), "gave 1 rows of 'action' for 2 queries"),
        (lambda query: 3.0, "gave no rows of 'action' for 2 queries"),
        (lambda query: np.zeros((2, 2), complex), "gave 'action' as complex128"),
    ],
)
def test_answer_of_another_form_is_500(answer: Any, reason: str) -> None:
    with serving(lambda: EchoTeacher(answer)) as service:
        assert_refused(infer(service.url), 500, reason)


def test_load_failure_is_told_at_ready() -> None:
    def load() -> EchoTeacher:
        raise FileNotFoundError("no weights at /x")

    with serving(load) as service:
        response = get(f"{service.url}/v2/models/teacher/ready")
        assert response.status_code == 503
        assert response.json()["failed"] is True
        assert response.json()["state"] == "failed: FileNotFoundError: no weights at /x"
        assert error(infer(service.url)) == "the teacher failed: FileNotFoundError: no weights at /x"


# ---- memory of clients


def test_teacher_with_a_memory_must_know_who_asks() -> None:
    with serving(CountingTeacher) as service:
        assert_refused(
            infer(service.url), 400, "it needs the parameter client_id and the inputs env_id and episode_start"
        )


def test_repeated_sequence_is_answered_once_and_an_older_one_is_409() -> None:
    teacher = CountingTeacher()
    with serving(lambda: teacher) as service:
        first = labels(ask(service.url, "a", 7, [0, 1], start=True))["action"]
        again = labels(ask(service.url, "a", 7, [0, 1], start=True))["action"]
        np.testing.assert_array_equal(first, again)
        assert len(teacher.queries) == 1
        assert labels(ask(service.url, "a", 9, [0, 1], start=False))["action"][:, 0].tolist() == [2, 2]
        response = ask(service.url, "a", 7, [0, 1], start=False)
        assert_refused(response, 409, "query 7 of client 'a' comes after its query 9")
        assert (response.json()["type"], len(teacher.queries)) == ("OutOfStep", 2)


# ---- clients that vanish


def wire_query() -> bytes:
    message = build({}, "inputs", {"state": states(2)})
    return raw_request(message.body, {**message.headers, "Content-Length": str(len(message.body))})


def test_client_that_vanishes_in_mid_request_disturbs_nobody(echo: str) -> None:
    query = wire_query()
    for size in (10, len(query) // 2, len(query) - 1):
        with connect(echo) as connection:
            connection.sendall(query[:size])
    assert infer(echo).status_code == 200


def test_client_that_vanishes_while_the_teacher_works_disturbs_nobody() -> None:
    teacher = HeldTeacher()
    with serving(lambda: teacher) as service, ThreadPoolExecutor() as pool:
        connection = connect(service.url)
        connection.sendall(wire_query())
        wait_for(lambda: teacher.entered == 1)
        other = pool.submit(infer, service.url)
        wait_for(lambda: service.engine.waiting == 1)
        connection.close()
        teacher.go.set()
        np.testing.assert_array_equal(labels(other.result())["action"], states(2)[:, 1:3])
        assert teacher.sizes == [2, 2]


# ---- the command


def test_sigterm_while_a_query_runs_still_answers_it(tmp_path: Path) -> None:
    fifo, port = tmp_path / "fifo", free_port()
    os.mkfifo(fifo)
    with (
        serving_process(
            "--teacher", "tests.support.raw_client:FifoTeacher", "--teacher-kwargs", f"path:{fifo}", port=port
        ) as process,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(infer, f"http://127.0.0.1:{port}")
        with fifo.open("wb"):  # returns when the teacher has the query, and lets it go at the end
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            assert process.stderr.readline() == b"stopping; once more to kill\n"
            wait_for(lambda: not listens(port))
        np.testing.assert_array_equal(labels(answer.result())["action"], states(2)[:, 1:3])
        assert process.wait(30) == 128 + signal.SIGTERM


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_teacher_that_cannot_be_loaded_ends_the_command() -> None:
    port = free_port()
    code = "import sys; from rpd_sb3.serve import __main__ as serve; serve.LINGER = 1.0; sys.exit(serve.main())"
    command = [sys.executable, "-c", code, "--teacher", "tests.support.raw_client:BrokenTeacher"]
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True) as process:
        state = "is loading"
        wait_for(lambda: listens(port))
        while state == "is loading":
            state = get(f"http://127.0.0.1:{port}/v2/health/ready").json()["state"]
        _, stderr = process.communicate(timeout=30)
    assert state == "failed: ArithmeticError: the weights do not add up"
    assert process.returncode == serve.USER_ERROR
    assert stderr.splitlines()[-1] == f"error: the teacher {state}"


def test_port_in_use_is_one_sentence_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert serve.main(["--teacher", "scripted", "--env", "PickCube-v1", "--port", str(port)]) == 2
    expected = f"error: cannot listen at 127.0.0.1:{port}: Address already in use; choose another --port\n"
    assert capsys.readouterr().err == expected


def test_port_is_taken_as_soon_as_it_is_bound() -> None:
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}: Address already in use"):
            bind("127.0.0.1", port)


def test_help_names_the_teachers_that_can_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    text = serve.make_parser().format_help()
    found = [name for name in TEACHERS if name in text]
    assert found == [name for name in TEACHERS if not name.startswith(("http:", "openpi:"))]


# ---- next to any VLA

LIGHT = ["serve.__main__", "serve.app", "serve.engine", "wire.messages", "wire.spec", "wire.shared_memory"]
LIGHT += ["teachers.registry", "teachers.octo", "teachers.scripted.teacher"]


def test_service_imports_nothing_of_the_students_side() -> None:
    lines = ["import sys"]
    for module in LIGHT:
        lines += [f"import rpd_sb3.{module}", "if {'torch', 'stable_baselines3'} & set(sys.modules):"]
        lines += [f"    sys.exit('rpd_sb3.{module} imports too much')"]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
