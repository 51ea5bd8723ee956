"""Shared memory between a client and a service: what is found there, what is refused, and that nothing is left behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from rpd_sb3.serve import regions as regions_module
from rpd_sb3.serve.regions import Regions
from rpd_sb3.wire import shared_memory
from rpd_sb3.wire.messages import Place, RegionRequest, SharedTensor
from rpd_sb3.wire.shared_memory import (
    FOLDER,
    PREFIX,
    Region,
    Ring,
    SharedMemoryError,
    attach,
    check_generation,
    create,
    query_size,
    sweep,
    unlink,
)
from rpd_sb3.wire.tensors import from_bytes
from tests.support.helpers import EchoTeacher
from tests.support.raw_client import HeldTeacher, assert_refused, infer, labels, post
from tests.support.serving_helpers import Running, free_port, serving, serving_process, states, wait_for

MEMORY = "/v2/systemsharedmemory"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no /dev/shm")


@pytest.fixture
def shm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of this test alone instead of /dev/shm."""
    monkeypatch.setattr(shared_memory, "FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def region() -> Iterator[tuple[str, Region]]:
    """64 KiB with a name."""
    key, made = create(2**16)
    yield key, made
    unlink(key)


@pytest.fixture(scope="module")
def echo() -> Iterator[Running]:
    """A service with an EchoTeacher."""
    with serving() as service:
        yield service


def register(url: str, name: str, body: Any) -> requests.Response:
    return post(url, json.dumps(body).encode(), path=f"{MEMORY}/region/{name}/register")


def status(url: str, path: str = "") -> requests.Response:
    return requests.get(f"{url}{MEMORY}{path}/status", timeout=30)


def put(region: Region, offset: int, array: np.ndarray, name: str) -> SharedTensor:
    region.array(offset, array.shape, array.dtype)[:] = array
    return SharedTensor(Place(name, offset, array.nbytes), "FP32", array.shape)


# ---- the extension


def test_regions_are_registered_listed_and_forgotten(region: tuple[str, Region], echo: Running) -> None:
    url, place = echo.url, {"key": region[0], "offset": 0, "byte_size": 2**16}
    part = {**place, "offset": 4096, "byte_size": 100}
    assert register(url, "whole", place).status_code == 200
    assert register(url, "part", part).status_code == 200
    assert status(url).json() == [{"name": "whole", **place}, {"name": "part", **part}]
    assert status(url, "/region/part").json() == [{"name": "part", **part}]
    assert post(url, b"", path=f"{MEMORY}/region/whole/unregister").status_code == 200
    assert [entry["name"] for entry in status(url).json()] == ["part"]
    assert post(url, b"", path=f"{MEMORY}/region/whole/unregister").status_code == 200, "as Triton does"
    assert post(url, b"", path=f"{MEMORY}/unregister").status_code == 200
    assert status(url).json() == []


def test_region_that_is_registered_already_is_400(region: tuple[str, Region], echo: Running) -> None:
    place = {"key": region[0], "offset": 0, "byte_size": 2**16}
    register(echo.url, "twice", place)
    assert_refused(register(echo.url, "twice", place), 400, "region 'twice' is registered already; unregister it first")


def test_number_of_regions_is_limited(region: tuple[str, Region], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions_module, "MAX_REGIONS", 2)
    regions, request = Regions(), RegionRequest(region[0], 0, 8)
    regions.register("a", request)
    regions.register("b", request)
    with pytest.raises(ValueError, match="2 regions are registered already"):
        regions.register("c", request)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key": 7}, "key must be a string"),
        ({"key": "/nobody-made-this"}, "No such file"),
        ({"key": "/../etc/passwd"}, "'/../etc/passwd'"),
        ({"key": "//a"}, "'//a'"),
        ({"key": ""}, "''"),
        ({"key": "a\0b"}, "'a\\x00b'"),
        ({"key": "a\n"}, "'a\\n'"),
        ({"key": ".."}, "Is a directory"),
        ({"offset": -1}, "offset must be a whole number"),
        ({"byte_size": 0}, "has 65536 bytes, not 0"),
        ({"byte_size": 2**16 + 1}, "has 65536 bytes, not 65537"),
        ({"offset": 2**16 - 99}, "has 65536 bytes, not 100 from 65437 on"),
        ({"offset": 2**62, "byte_size": 2**62}, "has 65536 bytes, not"),
    ],
)
def test_region_that_cannot_be_mapped_is_400(
    region: tuple[str, Region], echo: Running, change: dict[str, Any], reason: str
) -> None:
    assert_refused(register(echo.url, "r", {"key": region[0], "offset": 0, "byte_size": 100, **change}), 400, reason)


def test_status_of_an_unknown_region_is_404(echo: Running) -> None:
    response = status(echo.url, "/region/unknown")
    assert (response.status_code, response.json()["type"]) == (404, "UnknownRegion")


def test_object_of_another_user_is_refused(region: tuple[str, Region], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(SharedMemoryError, match="belongs to another user"):
        attach(region[0], 0, 100)


def test_link_is_not_followed(shm: Path) -> None:
    (shm / "target").write_bytes(b"x" * 100)
    (shm / "link").symlink_to("target")
    assert attach("target", 0, 100).byte_size == 100
    with pytest.raises(SharedMemoryError, match="there is no shared memory object 'link' here"):
        attach("link", 0, 100)


def test_pipe_is_no_region(shm: Path) -> None:
    os.mkfifo(shm / "pipe")
    with pytest.raises(SharedMemoryError, match="has 0 bytes, not 100"):
        attach("pipe", 0, 100)


def test_others_of_the_machine_may_not_open_a_region(region: tuple[str, Region]) -> None:
    assert (FOLDER / region[0][1:]).stat().st_mode & 0o777 == 0o600


# ---- tensors in regions


def test_inputs_and_outputs_lie_in_regions(region: tuple[str, Region], echo: Running) -> None:
    key, memory = region
    register(echo.url, "both", {"key": key, "offset": 0, "byte_size": 2**16})
    where = {"shared_memory_region": "both", "shared_memory_offset": 1000, "shared_memory_byte_size": 24}
    response = infer(
        echo.url, {}, [{"name": "action", "parameters": where}], {"state": put(memory, 8, states(3), "both")}
    )
    assert response.json()["outputs"] == [{"name": "action", "datatype": "FP32", "shape": [3, 2], "parameters": where}]
    np.testing.assert_array_equal(memory.array(1000, (3, 2), np.dtype("<f4")), states(3)[:, 1:3])
    post(echo.url, b"", path=f"{MEMORY}/unregister")


def test_region_may_begin_anywhere_in_its_object(region: tuple[str, Region], echo: Running) -> None:
    key, memory = region
    put(memory, 5000, states(2), "far")
    register(echo.url, "far", {"key": key, "offset": 5000, "byte_size": 24})
    response = infer(echo.url, {}, shared={"state": SharedTensor(Place("far", 0, 24), "FP32", (2, 3))})
    np.testing.assert_array_equal(labels(response)["action"], states(2)[:, 1:3])
    post(echo.url, b"", path=f"{MEMORY}/unregister")


@pytest.fixture
def registered(region: tuple[str, Region], echo: Running) -> Iterator[str]:
    """URL of a service that knows 4096 bytes as ``r``."""
    register(echo.url, "r", {"key": region[0], "offset": 0, "byte_size": 4096})
    yield echo.url
    post(echo.url, b"", path=f"{MEMORY}/unregister")


@pytest.mark.parametrize(
    ("place", "code", "reason"),
    [
        (Place("r", 4080, 24), 400, "'state' ends at byte 4104"),
        (Place("r", 2**62, 24), 400, "'state' ends at byte 4611686018427387928"),
        (Place("r", 0, 20), 400, "'state': 20 bytes for"),
        (Place("nowhere", 0, 24), 404, "shared memory region 'nowhere' is not registered"),
    ],
)
def test_input_outside_its_region_is_refused(registered: str, place: Place, code: int, reason: str) -> None:
    assert_refused(infer(registered, {}, shared={"state": SharedTensor(place, "FP32", (2, 3))}), code, reason)


@pytest.mark.parametrize(
    ("where", "code", "reason"),
    [
        ({"shared_memory_offset": 4090, "shared_memory_byte_size": 16}, 400, "'action' ends at byte 4106"),
        ({"shared_memory_byte_size": 15}, 400, "'action' has 16 bytes, but 15"),
        ({"shared_memory_region": "s", "shared_memory_byte_size": 16}, 404, "'s' is not registered"),
    ],
)
def test_output_that_has_no_place_is_refused(registered: str, where: dict[str, Any], code: int, reason: str) -> None:
    outputs = [{"name": "action", "parameters": {"shared_memory_region": "r", **where}}]
    assert_refused(infer(registered, outputs=outputs), code, reason)


def test_output_that_has_no_place_costs_no_work() -> None:
    teacher = EchoTeacher()
    outputs = [{"name": "action", "parameters": {"shared_memory_region": "none", "shared_memory_byte_size": 16}}]
    with serving(lambda: teacher) as service:
        assert infer(service.url, outputs=outputs).status_code == 404
    assert teacher.queries == []


# ---- generations


class RingClient:
    """Registers a ring with a service and asks from it."""

    def __init__(self, url: str) -> None:
        self.url, self.ring = url, Ring(1, 4096)
        self.slot = self.ring.free.pop()
        register(url, self.ring.name, {"key": self.ring.key, "offset": 0, "byte_size": 4096})
        unlink(self.ring.key)

    def ask(self, generation: int, tensors: dict[str, SharedTensor], **change: Any) -> requests.Response:
        parameters = {
            "shared_memory_generation": generation,
            "shared_memory_generation_region": self.ring.name,
            "shared_memory_generation_offset": self.slot.offset,
        }
        return infer(self.url, {}, shared=tensors, **{**parameters, **change})


def test_query_in_a_slot_is_answered(echo: Running) -> None:
    client = RingClient(echo.url)
    for n in (2, 4):
        generation, tensors, _ = client.slot.write({"state": states(n)})
        np.testing.assert_array_equal(labels(client.ask(generation, tensors))["action"], states(n)[:, 1:3])


def test_slot_that_was_written_again_before_is_409(echo: Running) -> None:
    client = RingClient(echo.url)
    generation, tensors, _ = client.slot.write({"state": states(2)})
    client.slot.write({"state": states(3)})
    response = client.ask(generation, tensors)
    assert (response.status_code, response.json()["type"]) == (409, "StaleGeneration")
    assert response.json()["error"] == "the shared memory slot is at generation 2, but the query was 1"


def test_slot_that_was_written_again_while_the_teacher_worked_is_409() -> None:
    teacher = HeldTeacher()
    with serving(lambda: teacher) as service, ThreadPoolExecutor() as pool:
        client = RingClient(service.url)
        generation, tensors, _ = client.slot.write({"state": states(2)})
        answer = pool.submit(client.ask, generation, tensors)
        wait_for(lambda: teacher.entered == 1)
        client.slot.write({"state": states(2) + 100})
        teacher.go.set()
        assert (answer.result().status_code, answer.result().json()["type"]) == (409, "StaleGeneration")


def test_nonsense_in_an_overwritten_slot_is_409_not_400(echo: Running) -> None:
    client = RingClient(echo.url)
    words = np.array(["x" * 100], object)
    generation, tensors, _ = client.slot.write({"state": words})
    client.slot.write({"state": np.full((20, 3), np.nan, np.float32)})
    assert client.ask(generation, tensors).status_code == 409


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({"shared_memory_generation_region": "none"}, 404, "'none' is not registered"),
        ({"shared_memory_generation_offset": 4}, 400, "offset 4 is not in the region"),
        ({"shared_memory_generation_offset": 4096}, 400, "offset 4096 is not in the region"),
    ],
)
def test_generation_that_is_nowhere_is_refused(echo: Running, change: dict[str, Any], code: int, reason: str) -> None:
    client = RingClient(echo.url)
    generation, tensors, _ = client.slot.write({"state": states(2)})
    assert_refused(client.ask(generation, tensors, **change), code, reason)


def test_slot_holds_every_kind_of_tensor_aligned() -> None:
    arrays = {
        "images.base": np.arange(2 * 5 * 7 * 3, dtype=np.uint8).reshape(2, 5, 7, 3),
        "instruction": np.array(["go", "schließe"]),
        "state": states(2)[:, ::2],
        "none": np.zeros((2, 0), np.float32),
    }
    ring = Ring(2, query_size(arrays))
    unlink(ring.key)
    regions = Regions()
    regions._regions[ring.name] = (ring.region, RegionRequest("x", 0, 0))
    for slot in ring.free:
        generation, tensors, views = slot.write(arrays)
        check_generation(ring.region, slot.offset, generation)
        for name, tensor in tensors.items():
            assert tensor.place.offset % 64 == 0
            found = from_bytes(regions.view(tensor.place, name), tensor.datatype, tensor.shape, name)
            np.testing.assert_array_equal(views[name], arrays[name])
            if name == "instruction":
                assert [word.decode() for word in found] == arrays[name].tolist()
            else:
                np.testing.assert_array_equal(found, arrays[name])


# ---- nothing is left


def test_more_than_there_is_cannot_be_made(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, byte_size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SharedMemoryError, match="no 3 MiB of shared memory: .*No space left on device"):
        create(3 * 2**20)
    assert list(shm.iterdir()) == []


def test_machine_without_shared_memory_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDER", Path("/nowhere"))
    with pytest.raises(SharedMemoryError, match="no shared memory here: .*No such file"):
        create(8)
    assert sweep() == []


MAKER = """
import os, signal
from pathlib import Path
from rpd_sb3.wire import shared_memory
shared_memory.FOLDER = Path({folder!r})
region = shared_memory.create(100)
print(flush=True)
signal.pause()
"""


@pytest.fixture
def maker(shm: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has made a region, and not unlinked it."""
    command = [sys.executable, "-c", MAKER.format(folder=str(shm))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_sweep_removes_the_region_of_a_maker_that_was_killed(shm: Path, maker: subprocess.Popen[str]) -> None:
    (path,) = shm.iterdir()
    assert sweep() == [], "its maker lives"
    maker.kill()
    maker.wait()
    assert sweep() == [f"/{path.name}"]
    assert list(shm.iterdir()) == []


def test_ring_sweeps_before_it_is_made(shm: Path, maker: subprocess.Popen[str]) -> None:
    maker.kill()
    maker.wait()
    ring = Ring(1, 64)
    assert [path.name for path in shm.iterdir()] == [ring.name]


def test_sweep_leaves_what_is_not_ours(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shm / "psm_other").write_bytes(b"x")
    (shm / f"{PREFIX}1-of-another-user").write_bytes(b"x")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert sweep() == []
    assert len(list(shm.iterdir())) == 2


def test_region_swept_between_making_and_locking_is_made_again(shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = []
    lock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        if operation == fcntl.LOCK_SH and not swept:
            swept.extend(sweep())
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    key, _ = create(100)
    assert len(swept) == 1
    assert [path.name for path in shm.iterdir()] == [key[1:]]


def test_service_forgets_regions_of_clients_that_are_gone(shm: Path, maker: subprocess.Popen[str]) -> None:
    (path,) = shm.iterdir()
    own, _ = create(100)
    (shm / "triton").write_bytes(b"x" * 100)
    regions = Regions()
    for name, key in (("theirs", path.name), ("own", own), ("triton", "triton")):
        regions.register(name, RegionRequest(key, 0, 100))
    assert [entry["name"] for entry in regions.status()] == ["theirs", "own", "triton"]
    maker.kill()
    maker.wait()
    assert [entry["name"] for entry in regions.status()] == ["own", "triton"]


def test_memory_is_freed_with_the_last_mapping(shm: Path) -> None:
    def mapped() -> bool:
        return str(shm) in Path("/proc/self/maps").read_text()

    key, region = create(100)
    other = attach(key, 0, 100)
    unlink(key)
    del region
    assert mapped()
    view = other.array(0, (10,), np.dtype(np.uint8))
    del other
    assert mapped(), "an array still needs it"
    del view
    assert not mapped()


def test_no_file_stays_open(shm: Path) -> None:
    def n_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = n_open()
    key, region = create(100)
    other = attach(key, 0, 100)
    with pytest.raises(SharedMemoryError, match="has 100 bytes, not 101"):
        attach(key, 0, 101)
    assert sweep() == []
    del region, other
    assert n_open() == before


class ImageTeacher(EchoTeacher):
    """Its action is the first two values of the image; ``python -m rpd_sb3.serve`` can load it."""

    def __init__(self) -> None:
        super().__init__(lambda query: query.inputs["images.base"][:, 0, 0, :2] / 255)
        self.spec = replace(self.spec, inputs=("images.base",), image_sizes={"base": (64, 64)})


CLIENT = """
import sys
import numpy as np
from rpd_sb3.teachers import Query
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
teacher = RemoteTeacher([sys.argv[1]], shared_memory=True)
for value in range(10**9):
    query = Query({"images.base": np.full((8, 64, 64, 3), value % 256, np.uint8)}, np.arange(8), np.ones(8, bool))
    answer = teacher.submit(query).result(60)["action"]
    assert abs(answer - value % 256 / 255).max() < 1e-6
    if value == 20:
        print(flush=True)
"""


@pytest.mark.parametrize("first", ["client", "server"])
def test_nothing_is_left_when_both_are_killed(first: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with serving_process("--teacher", "tests.wire.test_shared_memory:ImageTeacher", port=port) as server:
        command = [sys.executable, "-c", CLIENT, url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"\n", "the client got its answers"
            assert len(status(url).json()) == 1, "through shared memory"
            victims = [client, server] if first == "client" else [server, client]
            for process in victims:
                process.send_signal(signal.SIGKILL)
                process.wait(30)
        assert [path for pid in (client.pid, server.pid) for path in FOLDER.glob(f"{PREFIX}{pid}-*")] == []


def test_service_without_shared_memory_refuses_regions(region: tuple[str, Region]) -> None:
    with serving(shared_memory=False) as service:
        assert_refused(
            register(service.url, "r", {"key": region[0], "byte_size": 8}), 400, "this service takes no shared memory"
        )
        assert (
            requests.get(f"{service.url}/v2/models/teacher", timeout=30).json()["parameters"]["shared_memory"] is False
        )
