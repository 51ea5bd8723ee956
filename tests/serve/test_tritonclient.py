"""NVIDIA's client for the Open Inference Protocol, which knows nothing of us, against the service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import Running, serving, states

triton = pytest.importorskip("tritonclient.http")
triton_utils = pytest.importorskip("tritonclient.utils")
triton_memory = pytest.importorskip("tritonclient.utils.shared_memory")


class WordTeacher(EchoTeacher):
    """Its action is the last two values of the state, plus the number of letters of the instruction."""

    def __init__(self) -> None:
        super().__init__(
            lambda query: query.inputs["state"][:, 1:3] + np.char.str_len(query.inputs["instruction"])[:, None]
        )
        self.spec = replace(self.spec, inputs=("state", "instruction"), input_shapes={"state": (3,)})


@pytest.fixture(scope="module")
def service() -> Iterator[Running]:
    with serving(WordTeacher) as running:
        yield running


@pytest.fixture
def client(service: Running) -> Iterator[triton.InferenceServerClient]:
    connection = triton.InferenceServerClient(service.url.removeprefix("http://"))
    yield connection
    connection.unregister_system_shared_memory()
    connection.close()


def inputs(n: int, binary: bool = True) -> list[triton.InferInput]:
    state = triton.InferInput("state", [n, 3], "FP32")
    state.set_data_from_numpy(states(n), binary_data=binary)
    words = triton.InferInput("instruction", [n], "BYTES")
    words.set_data_from_numpy(np.array([b"go"] * n, object), binary_data=binary)
    return [state, words]


EXPECTED = states(4)[:, 1:3] + 2
GIVEN, TAKEN = (f"/rpd_sb3_test_{os.getpid()}_{name}" for name in ("given", "taken"))


def test_server_and_model_are_live_and_ready(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("teacher")
    assert not client.is_model_ready("other")


def test_metadata_of_server_and_model(client: triton.InferenceServerClient) -> None:
    assert client.get_server_metadata()["name"] == "rpd_sb3"
    metadata = client.get_model_metadata("teacher")
    assert metadata["inputs"][0] == {"name": "state", "datatype": "FP32", "shape": [-1, 3]}
    assert metadata["outputs"] == [{"name": "action", "datatype": "FP32", "shape": [-1, 2]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_inference(client: triton.InferenceServerClient, binary_in: bool, binary_out: bool | None) -> None:
    wanted = None if binary_out is None else [triton.InferRequestedOutput("action", binary_data=binary_out)]
    result = client.infer("teacher", inputs(4, binary_in), outputs=wanted, request_id="q7")
    np.testing.assert_array_equal(result.as_numpy("action"), EXPECTED)
    assert result.get_response()["id"] == "q7"
    assert result.get_output("action")["datatype"] == "FP32"


def test_error_arrives_with_its_reason(client: triton.InferenceServerClient) -> None:
    with pytest.raises(triton_utils.InferenceServerException, match=r"\[400\] input 'instruction' is missing"):
        client.infer("teacher", inputs(4)[:1])


def test_inputs_and_outputs_in_system_shared_memory(client: triton.InferenceServerClient) -> None:
    state = states(4)
    given = triton_memory.create_shared_memory_region("given", GIVEN, state.nbytes + 64)
    taken = triton_memory.create_shared_memory_region("taken", TAKEN, 1024)
    try:
        triton_memory.set_shared_memory_region(given, [state], offset=64)
        client.register_system_shared_memory("given", GIVEN, state.nbytes, offset=64)
        client.register_system_shared_memory("taken", TAKEN, 1024)
        assert [region["name"] for region in client.get_system_shared_memory_status()] == ["given", "taken"]
        arrays = inputs(4)
        arrays[0].set_shared_memory("given", state.nbytes)
        wanted = triton.InferRequestedOutput("action")
        wanted.set_shared_memory("taken", EXPECTED.nbytes, offset=128)
        result = client.infer("teacher", arrays, outputs=[wanted])
        assert result.get_output("action")["shape"] == [4, 2]
        np.testing.assert_array_equal(
            triton_memory.get_contents_as_numpy(taken, np.float32, [4, 2], offset=128), EXPECTED
        )
        client.unregister_system_shared_memory("given")
        assert [region["name"] for region in client.get_system_shared_memory_status()] == ["taken"]
        with pytest.raises(triton_utils.InferenceServerException, match="region 'given' is not registered"):
            client.infer("teacher", arrays, outputs=[wanted])
    finally:
        triton_memory.destroy_shared_memory_region(given)
        triton_memory.destroy_shared_memory_region(taken)
