"""The Open Inference Protocol as bytes: what goes in comes out, and what is malformed says where and why."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rpd_sb3.teachers import TeacherSpec
from rpd_sb3.wire.messages import (
    HEADER_LENGTH,
    Generation,
    Message,
    Output,
    Place,
    RegionRequest,
    Request,
    SharedTensor,
    build,
    describe_shared,
    parse,
    parse_region,
    parse_request,
    read_tensors,
)
from rpd_sb3.wire.spec import metadata, space_from_json, space_to_json, spec_from_json, spec_to_json
from rpd_sb3.wire.tensors import (
    DATATYPES,
    ProtocolError,
    check_header,
    datatype_of,
    from_bytes,
    from_json,
    to_bytes,
)
from tests.support.helpers import ACTION_SPACE

NUMBERS = [name for name in DATATYPES if name not in ("BYTES", "BOOL")]


def example(datatype: str) -> np.ndarray:
    """(2, 3), with the extremes of the datatype."""
    if datatype == "BYTES":
        return np.array([[b"a", b"", b"\x00"], [b"longer than the others", b"\n", "ü".encode()]], object)
    dtype = DATATYPES[datatype]
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    return np.array([[limits.min, limits.max, 0], [1, 2, 3]], dtype)


def roundtrip(message: Message, tensors: str = "inputs") -> dict[str, np.ndarray | SharedTensor]:
    header, binary = parse(message.body, message.headers.get(HEADER_LENGTH))
    return read_tensors(header, tensors, binary)


@pytest.mark.parametrize("datatype", list(DATATYPES))
@pytest.mark.parametrize("shape", [(2, 3), (6,), (1, 2, 3, 1)])
def test_raw_bytes_give_the_array_back(datatype: str, shape: tuple[int, ...]) -> None:
    array = example(datatype).reshape(shape)
    back = from_bytes(to_bytes(array), datatype, shape, "x")
    assert datatype_of(array) == datatype
    assert back.dtype == DATATYPES[datatype]
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("datatype", list(DATATYPES))
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0, 5)])
def test_empty_tensors_give_the_array_back(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, DATATYPES[datatype])
    assert bytes(to_bytes(array)) == b""
    assert from_bytes(b"", datatype, shape, "x").shape == shape


@pytest.mark.parametrize("datatype", [name for name in DATATYPES if name != "FP16"])
@pytest.mark.parametrize("nested", [False, True])
def test_json_gives_the_array_back(datatype: str, nested: bool) -> None:
    array = example(datatype)
    if datatype == "BYTES":
        array = np.array([["a", ""], ["\x00", "ü"]], object)
    data = json.loads(json.dumps(array.tolist() if nested else array.ravel().tolist()))
    back = from_json(data, datatype, array.shape, "x")
    expected = np.vectorize(str.encode, otypes=[object])(array) if datatype == "BYTES" else array
    assert back.dtype == DATATYPES[datatype]
    np.testing.assert_array_equal(back, expected)


def test_text_is_sent_as_utf8() -> None:
    assert bytes(to_bytes(np.array(["ü"]))) == b"\x02\x00\x00\x00\xc3\xbc"


def test_numbers_are_little_endian_and_row_major() -> None:
    array = np.asfortranarray(np.array([[1, 2], [3, 4]], np.int16))
    assert bytes(to_bytes(array)) == b"\1\0\2\0\3\0\4\0"


def test_raw_bytes_are_not_copied() -> None:
    data = np.arange(4, dtype=np.float32)
    back = from_bytes(memoryview(data).cast("B"), "FP32", [4], "x")
    data[0] = 9
    assert back[0] == 9


@pytest.mark.parametrize("dtype", ["complex64", ">f4", "datetime64[s]"])
def test_arrays_without_a_datatype_are_refused(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be sent; the protocol knows BOOL, UINT8"):
        datatype_of(np.zeros(1, dtype))


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "reason"),
    [
        (b"123", "FP32", [1], "3 bytes for FP32"),
        (b"\2", "BOOL", [1], "must be 0 or 1"),
        (b"\1\0\0", "BYTES", [1], "3 bytes do not hold 1"),
        (b"\2\0\0\0a", "BYTES", [1], "5 bytes do not hold 1"),
        (b"\0\0\0\0\0", "BYTES", [1], "5 bytes do not hold 1"),
        (b"\0\0\0\0", "BYTES", [2], "4 bytes do not hold 2"),
        (b"\1\x10\0\0" + b"a" * 4097, "BYTES", [1], "4097 bytes"),
        (b"", "FP8", [0], "'FP8' is unknown"),
        (b"", None, [0], "'None' is unknown"),
        (b"", "FP32", [-1], "shape"),
        (b"", "FP32", [True], "shape"),
        (b"", "FP32", None, "shape"),
        (b"", "FP32", [1] * 9, "shape"),
        (b"", "FP32", [2**41], "shape"),
        (b"", "FP32", [0, 2**62, 2], "shape"),
    ],
)
def test_malformed_raw_bytes_name_the_tensor_and_the_reason(
    data: bytes, datatype: Any, shape: Any, reason: str
) -> None:
    with pytest.raises(ProtocolError, match=f"'x'.*{reason}"):
        from_bytes(data, datatype, shape, "x")


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "reason"),
    [
        ([1, 2], "FP32", [3], "2 elements"),
        ([[1, 2, 3], [4]], "FP32", [2, 2], "neither flat nor nested"),
        ([[1], 2], "FP32", [2, 1], "neither flat nor nested"),
        ([[[1]]], "FP32", [1], "not FP32"),
        ("abc", "BYTES", [3], "must be a list"),
        (["1"], "FP32", [1], "not FP32"),
        ([True], "INT32", [1], "not INT32"),
        ([1], "BOOL", [1], "not BOOL"),
        ([1.0], "INT32", [1], "not INT32"),
        ([1], "BYTES", [1], "not BYTES"),
        (["\ud800"], "BYTES", [1], "not Unicode"),
        (["ü" * 2049], "BYTES", [1], "4098 bytes"),
        ([-1], "UINT64", [1], "does not fit UINT64"),
        ([1e39], "FP32", [1], "does not fit FP32"),
        ([10**400], "FP64", [1], "does not fit FP64"),
        ([1.0], "FP16", [1], "FP16"),
    ],
)
def test_malformed_json_data_name_the_tensor_and_the_reason(
    data: Any, datatype: str, shape: list[int], reason: str
) -> None:
    with pytest.raises(ProtocolError, match=f"'x'.*{reason}"):
        from_json(data, datatype, shape, "x")


def test_zero_dimensions_are_one_element() -> None:
    assert check_header("FP32", [], "x") == (np.dtype("<f4"), 1)
    assert from_json([2.5], "FP32", [], "x") == np.float32(2.5)


def test_message_gives_binary_plain_and_shared_tensors_back() -> None:
    shared = SharedTensor(Place("ring", 64, 12), "FP32", (3,))
    message = build(
        {"id": "7"},
        "inputs",
        {"a": example("FP32"), "text": example("BYTES")},
        plain={"b": example("INT64")},
        entries=[describe_shared("c", shared)],
    )
    back = roundtrip(message)
    assert list(back) == ["c", "a", "text", "b"]
    assert back["c"] == shared
    for name, datatype in {"a": "FP32", "text": "BYTES", "b": "INT64"}.items():
        np.testing.assert_array_equal(back[name], example(datatype))


def test_message_without_binary_tensors_has_no_header_length() -> None:
    message = build({}, "inputs", {}, plain={"a": example("FP32")})
    assert message.headers == {"Content-Type": "application/json"}
    np.testing.assert_array_equal(roundtrip(message)["a"], example("FP32"))


def test_rest_of_the_json_object_is_kept() -> None:
    header, _ = parse(build({"id": "7", "parameters": {"k": 1}}, "inputs", {}).body, None)
    assert header == {"id": "7", "parameters": {"k": 1}, "inputs": []}


@pytest.mark.parametrize("length", ["", "-1", "1e1", "3", "²", "9" * 5000])
def test_impossible_header_length_is_refused(length: str) -> None:
    with pytest.raises(ProtocolError, match=HEADER_LENGTH):
        parse(b"{}", length)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}x", b"[]", b'{"a": NaN}', b"\xff\xfe\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["empty", "more", "list", "nan", "utf8", "deep", "digits"],
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="JSON"):
        parse(body, None)


A = {"name": "a", "datatype": "FP32", "shape": [1]}


def placed(**parameters: Any) -> list[dict[str, Any]]:
    """The only input, and these parameters of it."""
    return [{**A, "parameters": parameters}]


@pytest.mark.parametrize(
    ("inputs", "binary", "reason"),
    [
        (None, b"", "no list of inputs"),
        (["a"], b"", "an object with a name"),
        ([{"name": 1}], b"", "an object with a name"),
        ([A], b"", "'a' has neither data nor"),
        ([{**A, "data": [1]}, {**A, "data": [1]}], b"", "'a' comes twice"),
        ([{**A, "parameters": 1}], b"", "parameters must be an object"),
        (placed(binary_data_size=4), b"123", "'a': 3 bytes are left"),
        (placed(binary_data_size=-4), b"", "binary_data_size must be"),
        ([{**A, "data": [1]}], b"12", "2 bytes of the message"),
        (placed(shared_memory_region=3), b"", "'a': shared_memory_region must be"),
        (placed(shared_memory_region="r"), b"", "'a': shared_memory_byte_size must be"),
        (placed(shared_memory_region="r", shared_memory_offset=2**63), b"", "'a': shared_memory_offset must be"),
    ],
)
def test_malformed_tensor_names_itself_and_the_reason(inputs: Any, binary: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        read_tensors({"inputs": inputs}, "inputs", memoryview(binary))


# ---- requests


def parsed(labels: Collection[str] = ("action", "std"), **header: Any) -> Request:
    """A request with one input and the rest of this header."""
    return parse_request(json.dumps({"inputs": [{**A, "data": [1]}], **header}).encode(), None, labels)


def test_request_that_says_nothing_wants_every_output_as_json() -> None:
    request = parsed()
    assert request.inputs["a"] == np.float32(1)
    assert request.outputs == [Output("action", False, None), Output("std", False, None)]
    assert (request.id, request.client_id, request.sequence) == (None, "", None)
    assert (request.timeout, request.generation) == (float("inf"), None)


def test_request_may_want_every_output_as_raw_bytes() -> None:
    assert [output.binary for output in parsed(parameters={"binary_data_output": True}).outputs] == [True, True]


def test_request_says_what_it_wants_and_where() -> None:
    place = {"shared_memory_region": "r", "shared_memory_offset": 8, "shared_memory_byte_size": 16}
    request = parsed(
        id="q7",
        outputs=[{"name": "std", "parameters": place}, {"name": "action", "parameters": {"binary_data": False}}],
        parameters={
            "binary_data_output": True,
            "client_id": "me",
            "sequence": 3,
            "timeout": 1_500_000,
            "shared_memory_generation": 4,
            "shared_memory_generation_offset": 64,
            "shared_memory_generation_region": "ring",
        },
    )
    assert request.outputs == [Output("std", True, Place("r", 8, 16)), Output("action", False, None)]
    assert (request.id, request.client_id, request.sequence, request.timeout) == ("q7", "me", 3, 1.5)
    assert request.generation == Generation("ring", 64, 4)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"id": 7}, "id must be a string"),
        ({"parameters": {"sequence": -1}}, "sequence must be a whole number"),
        ({"parameters": {"timeout": 1.5}}, "timeout must be a whole number"),
        ({"parameters": {"client_id": 5}}, "client_id must be a string"),
        ({"parameters": {"client_id": "x" * 201}}, "client_id must be a string"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output must be true or false"),
        ({"parameters": {"shared_memory_generation": 1}}, "shared_memory_generation_region must be a string"),
        ({"outputs": {}}, "outputs must be a list"),
        ({"outputs": ["action"]}, "outputs must be a list"),
        ({"outputs": [{"name": "value"}]}, "'value' is unknown"),
        ({"outputs": [{}]}, "'None' is unknown"),
        ({"outputs": [{"name": "action"}, {"name": "action"}]}, "'action' is asked for twice"),
        ({"outputs": [{"name": "action", "parameters": {"binary_data": "no"}}]}, "'action': binary_data must be true"),
        (
            {"outputs": [{"name": "action", "parameters": {"shared_memory_byte_size": 1}}]},
            "'action': .*_region must be",
        ),
    ],
)
def test_malformed_request_is_refused_with_the_reason(header: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        parsed(**header)


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 2**63])
def test_whole_number_is_nothing_else(value: Any) -> None:
    with pytest.raises(ProtocolError, match="byte_size must be a whole number >= 0, got"):
        parse_region(json.dumps({"key": "/k", "byte_size": value}).encode())


def test_region_begins_at_the_beginning_if_it_does_not_say_where() -> None:
    assert parse_region(b'{"key": "/k", "byte_size": 8}') == RegionRequest("/k", 0, 8)


# ---- specs


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (7,), np.float32),
        spaces.Box(np.array([-np.inf, 0.1, -2.0]), np.array([1.0, np.inf, np.inf]), dtype=np.float64),
        spaces.Box(0, 2**62, (2, 3), np.int64),
        spaces.Box(0.1, 0.2, (), np.float32),
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([[2, 3], [4, 5]], dtype=np.int32, start=[[0, 1], [2, 3]]),
    ],
    ids=str,
)
def test_action_space_survives_json(space: spaces.Space) -> None:
    back = space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False)))
    assert back == space
    assert back.dtype == space.dtype
    if isinstance(space, spaces.Box):
        assert isinstance(back, spaces.Box)
        np.testing.assert_array_equal(back.low, space.low)
        np.testing.assert_array_equal(back.high, space.high)


def test_other_action_spaces_are_refused() -> None:
    with pytest.raises(ProtocolError, match="an action space of type Dict cannot be served"):
        space_to_json(spaces.Dict({"a": ACTION_SPACE}))


def full_spec() -> TeacherSpec:
    return TeacherSpec(
        name="vla",
        labels=frozenset({"action", "logits"}),
        inputs=("images.base", "instruction", "state"),
        action_space=spaces.MultiDiscrete([256] * 7),
        image_sizes={"base": (224, 320)},
        control_mode="pd_ee_delta_pose",
        env_id="PickCube-v1",
        stateful=True,
        input_shapes={"state": (9,)},
        n_bins=256,
        gripper="0..1",
        rotation="euler_xyz",
        unnorm_key="bridge_orig",
    )


@pytest.mark.parametrize(
    "spec", [full_spec(), TeacherSpec("echo", frozenset({"action"}), ("state",), ACTION_SPACE)], ids=["full", "short"]
)
def test_spec_survives_json(spec: TeacherSpec) -> None:
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec), allow_nan=False))) == spec


def test_what_an_older_service_does_not_say_is_the_default() -> None:
    content = spec_to_json(replace(full_spec(), stochastic=True, n_parameters=7, n_bytes=14))
    spec = spec_from_json(content)
    assert (spec.stochastic, spec.n_parameters, spec.n_bytes) == (True, 7, 14)
    del content["stochastic"], content["n_parameters"], content["n_bytes"]  # an older service
    spec = spec_from_json(content)
    assert (spec.stochastic, spec.n_parameters, spec.n_bytes) == (False, None, None)


def test_replicas_may_keep_their_weights_in_different_precision() -> None:
    assert replace(full_spec(), n_bytes=14) == replace(full_spec(), n_bytes=28)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": None},
        {"n_parameters": "many"},
        {"action_space": {"type": "Box"}},
        {"action_space": {"type": "Sphere"}},
        {"action_space": {"type": "Box", "low": [1], "high": [0], "shape": [2], "dtype": "float32"}},
        {"image_sizes": {"base": [1]}},
        {"image_sizes": []},
    ],
    ids=str,
)
def test_spec_that_cannot_be_read_says_so(change: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError, match="the teacher's spec cannot be read"):
        spec_from_json({**spec_to_json(full_spec()), **change})


def test_metadata_describes_every_input_and_output() -> None:
    content = metadata(full_spec(), "teacher", "1.0")
    described = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in content["inputs"]}
    assert described == {
        "images.base": ("UINT8", [-1, 224, 320, 3]),
        "instruction": ("BYTES", [-1]),
        "state": ("FP32", [-1, 9]),
        "env_id": ("INT64", [-1]),
        "episode_start": ("BOOL", [-1]),
        "action": ("FP32", [-1, -1]),
        "action_tokens": ("INT64", [-1, -1]),
    }
    outputs = {entry["name"]: (entry["datatype"], entry["shape"]) for entry in content["outputs"]}
    assert outputs == {"action": ("INT64", [-1, 7]), "logits": ("FP32", [-1, 7, 256])}
