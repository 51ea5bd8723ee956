"""Replicas behind Ray Serve: the real command, in processes of their own."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import requests

from rpd_sb3.contract.privileged import SIZE
from rpd_sb3.labelling.pending import PendingLabels, RetryPolicy
from rpd_sb3.serve import ray_engine
from rpd_sb3.serve.__main__ import main
from rpd_sb3.teachers import Labels, Query, TeacherError
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher
from tests.support import ROOT
from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import free_port, serving, wait_for

if importlib.util.find_spec("ray") is None:
    pytest.skip("ray is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
PATIENCE = 120.0
"""Seconds for Ray to start, or to replace a replica, on a busy machine."""


class Signing(EchoTeacher):
    """Its action is the last value of the observation, and the id of the process that answers."""

    def label(self, query: Query) -> Labels:
        last = query.inputs["state"][:, 2]
        return {"action": np.stack([last, np.full_like(last, os.getpid())], axis=1)}


class Remembering(EchoTeacher):
    """Its action is the number of queries since the episode's start, and the id of the process that answers."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = dataclasses.replace(self.spec, stateful=True)
        self.counts: dict[int, int] = {}

    def label(self, query: Query) -> Labels:
        for env, start in zip(query.env_ids.tolist(), query.episode_starts, strict=True):
            self.counts[env] = 1 if start else self.counts[env] + 1
        counts = [self.counts[env] for env in query.env_ids.tolist()]
        return {"action": np.array([[count, os.getpid()] for count in counts], np.float32)}


class Quitting(Signing):
    """Its thread ends at a negative observation."""

    def label(self, query: Query) -> Labels:
        if (query.inputs["state"] < 0).any():
            raise SystemExit
        return super().label(query)


class Thinking(EchoTeacher):
    """Takes its time."""

    def label(self, query: Query) -> Labels:
        time.sleep(1.0)
        return super().label(query)


class Broken(EchoTeacher):
    """Cannot be loaded."""

    def __init__(self) -> None:
        raise OSError("the weights\nare gone")


class Service(NamedTuple):
    """A service that answers."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def ray_service(teacher: str, *more: str, replicas: int = 2, **environment: str) -> Iterator[Service]:
    """``python -m rpd_sb3.serve --engine ray``, ready to answer; ended at the end.

    :param teacher: name of a teacher, or of a class in this module
    :param more: arguments
    """
    port = free_port()
    teacher = f"tests.serve.test_ray:{teacher}" if teacher in globals() else teacher
    command = [sys.executable, "-m", "rpd_sb3.serve", "--engine", "ray", "--replicas", str(replicas), *more]
    process = subprocess.Popen(
        [*command, "--teacher", teacher, "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()  # it says when all replicas are there
        assert line, process.communicate()[1]
        yield Service(line.split()[-1], process)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def ask(
    teacher: RemoteTeacher, n: int = 1, value: float = 0.0, start: bool = True, patience: float = PATIENCE
) -> np.ndarray:
    """(n, 2): the labels of n environments whose observations end with ``value``; asked for again as in training."""
    states = np.full((n, 3), value, np.float32)
    query = Query({"state": states}, np.arange(n), np.full(n, start))
    labels = PendingLabels(teacher, query, RetryPolicy("test", "raise", patience, patience), lambda found: found).get()
    assert labels is not None
    return labels["action"]


def exists(pid: int) -> bool:
    """True if there is such a process, and it has not ended."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """Ids of the processes that a process has started, and of theirs."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout.splitlines()
    parents = dict(map(int, line.split()) for line in lines)
    found, new = [], [pid]
    while new:
        new = [child for child, parent in parents.items() if parent in new]
        found += new
    return found


@pytest.mark.slow
def test_answers_like_the_local_engine() -> None:
    states = np.random.default_rng(0).normal(size=(64, SIZE)).astype(np.float32)
    query = Query({"privileged": states}, np.arange(64), np.zeros(64, bool))
    with (
        ray_service("scripted", "--env", "PickCube-v1", "--token", "secret") as there,
        serving(lambda: ScriptedTeacher("PickCube-v1"), token="secret") as here,
    ):
        assert requests.get(f"{there.url}/v2", timeout=5).status_code == 401
        with (
            closing(RemoteTeacher([there.url], token="secret")) as remote,
            closing(RemoteTeacher([here.url], token="secret")) as local,
        ):
            assert remote.spec == local.spec
            for _ in range(10):  # of both replicas
                expected = local.submit(query).result(PATIENCE)
                assert np.array_equal(remote.submit(query).result(PATIENCE)["action"], expected["action"])


@pytest.mark.slow
def test_killing_a_replica_loses_no_label_and_it_is_replaced() -> None:
    wrong: list[Any] = []
    pids: list[float] = []
    stop = threading.Event()

    def client(number: int) -> None:
        with closing(RemoteTeacher([service.url])) as teacher:
            for i in range(10**6):
                if stop.is_set():
                    return
                try:
                    label = ask(teacher, n=4, value=1000.0 * number + i % 1000)
                except TeacherError as error:
                    wrong.append(error)
                    return
                if (label[:, 0] != 1000 * number + i % 1000).any():
                    wrong.append(label)
                pids.append(label[0, 1])

    with ray_service("Signing") as service:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: len(set(pids)) == 2 and len(pids) > 100, PATIENCE)
            os.kill(int(pids[-1]), signal.SIGKILL)
            killed = len(pids)
            wait_for(lambda: bool(wrong) or len(set(pids)) == 3, PATIENCE)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert len(pids) > killed


@pytest.mark.slow
def test_replica_that_does_not_answer_any_more_is_replaced() -> None:
    with ray_service("Quitting", replicas=1) as service, closing(RemoteTeacher([service.url])) as teacher:
        before = ask(teacher)[0, 1]
        with (
            closing(RemoteTeacher([service.url], timeout=1)) as other,
            pytest.raises(TeacherError, match="teacher"),
        ):
            ask(other, value=-1.0, patience=1.0)
        assert ask(teacher)[0, 1] != before


@pytest.mark.slow
def test_client_of_a_stateful_teacher_stays_at_one_replica_and_hears_of_its_death() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros((2, 3), int)
    seen: list[set[float]] = [set(), set()]

    def step(i: int) -> None:
        starts = rng.random(3) < 0.2 if counts[i].all() else np.ones(3, bool)
        counts[i] = np.where(starts, 1, counts[i] + 1)
        query = Query({"state": np.zeros((3, 3), np.float32)}, np.arange(3), starts)
        label = clients[i].submit(query).result(PATIENCE)["action"]
        assert label[:, 0].tolist() == counts[i].tolist()
        seen[i] |= set(label[:, 1].tolist())

    with ray_service("Remembering") as service:
        clients = [RemoteTeacher([service.url]) for _ in range(2)]
        for _ in range(50):
            step(0)
            step(1)
        assert [len(pids) for pids in seen] == [1, 1]
        assert seen[0] != seen[1]
        os.kill(int(*seen[0]), signal.SIGKILL)
        with pytest.raises(TeacherError, match="409: the teacher has a memory, but knows nothing of environments"):
            ask(clients[0], n=3, start=False)
        for _ in range(20):
            step(1)
        assert len(seen[1]) == 1
        assert ask(clients[0], n=3, start=True)[:, 0].tolist() == [1, 1, 1]
        for client in clients:
            client.close()


@pytest.mark.slow
def test_sigterm_answers_what_was_accepted_and_leaves_no_process() -> None:
    with ray_service("Thinking", replicas=1) as service, closing(RemoteTeacher([service.url])) as teacher:
        query = Query({"state": np.ones((1, 3), np.float32)}, np.arange(1), np.ones(1, bool))
        answer = teacher.submit(query)
        time.sleep(0.5)  # it is in the teacher now, which takes a second
        processes = descendants(service.process.pid)
        service.process.terminate()
        assert answer.result(PATIENCE)["action"].tolist() == [[1, 1]]
        assert service.process.wait(PATIENCE) == 128 + signal.SIGTERM
        assert len(processes) > 5
        wait_for(lambda: not any(exists(pid) for pid in processes), PATIENCE)


@pytest.mark.slow
def test_replicas_die_with_the_command_that_is_killed() -> None:
    with ray_service("Signing", replicas=1) as service, closing(RemoteTeacher([service.url])) as teacher:
        replica = int(ask(teacher)[0, 1])
        service.process.kill()
        wait_for(lambda: not exists(replica))


@pytest.mark.slow
def test_joins_a_cluster_and_leaves_it_running(tmp_path: Path) -> None:
    port = free_port()
    start = ["-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
    alone = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    alone["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
    command = [sys.executable, *start, f"--port={port}", "--disable-usage-stats"]
    log = tmp_path / "log"
    with log.open("w") as output, subprocess.Popen(command, env={**os.environ, **alone}, stdout=output) as cluster:
        try:
            wait_for(lambda: "Ray runtime started" in log.read_text(), PATIENCE)
            for _ in range(2):  # the first one has left nothing behind
                with (
                    ray_service("Signing", RAY_ADDRESS=f"127.0.0.1:{port}", **alone) as service,
                    closing(RemoteTeacher([service.url])) as teacher,
                ):
                    assert ask(teacher, value=3.0)[0, 0] == 3.0
            assert cluster.poll() is None
        finally:
            cluster.terminate()


@pytest.mark.slow
def test_teacher_that_cannot_be_loaded_ends_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["--teacher", "tests.serve.test_ray:Broken", "--engine", "ray", "--replicas", "2", "--port", "0"]
    assert main(arguments) == 2
    assert capfd.readouterr().err == "error: the teacher failed: OSError: the weights are gone\n"


@pytest.mark.slow
def test_cluster_that_is_too_small_ends_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--teacher", "tests.serve.test_ray:Signing", "--engine", "ray", "--replicas", "999", "--port", "0"]) == 2
    )
    assert "--replicas 999 needs 999 CPUs, but " in capfd.readouterr().err


def test_port_taken_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as other:
        port = other.url.rpartition(":")[2]
        assert main(["--teacher", "tests.serve.test_ray:Signing", "--engine", "ray", "--port", port]) == 2
    assert f"cannot listen at 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


def test_missing_ray_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["--teacher", "tests.serve.test_ray:Signing", "--engine", "ray", "--port", "0"]) == 2
    assert "--engine ray needs Ray Serve" in (error := capsys.readouterr().err)
    assert "pip install 'rpd_sb3[ray]'" in error


def test_cluster_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert main(["--teacher", "tests.serve.test_ray:Signing", "--engine", "ray"]) == 2
    assert "cannot join the Ray cluster RAY_ADDRESS=127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "replicas", "share"), [(0, 2, 0), (1, 1, 1), (1, 3, 1 / 3), (3, 4, 0.5), (4, 2, 1)])
def test_replicas_share_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, replicas: int, share: float) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(cluster_resources=lambda: {"CPU": 8.0, "GPU": float(gpus)}))
    assert ray_engine.gpu_share(replicas) == share


def test_router_gives_a_new_client_the_replica_with_the_fewest_and_leaves_the_others_where_they_are() -> None:
    from rpd_sb3.serve.ray_replica import StickyRouter

    router: Any = StickyRouter.__new__(StickyRouter)
    router.initialize_state()
    places = {client: router._place(client, ["a", "b"]) for client in "1234"}
    assert sorted(places.values()) == ["a", "a", "b", "b"]
    assert {client: router._place(client, ["a", "b", "c"]) for client in "1234"} == places
    survivors = [client for client in "1234" if places[client] == "b"]
    assert [router._place(client, ["b", "d"]) for client in survivors] == ["b", "b"]
    moved = next(client for client in "1234" if places[client] == "a")
    assert router._place(moved, ["b", "d"]) == "d"
