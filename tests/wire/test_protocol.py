"""The Open Inference Protocol as bytes: what goes in comes out, and what is malformed says where and why."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from rpd_sb3.teachers import TeacherSpec
from rpd_sb3.wire.messages import (
    HEADER_LENGTH,
    Message,
    SharedTensor,
    build,
    describe_shared,
    flag,
    parse,
    read_tensors,
    whole_number,
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
    to_json,
)
from tests.support.helpers import ACTION_SPACE

NUMBERS = [name for name in DATATYPES if name not in ("BYTES", "BOOL")]
TEXT = np.array([b"", b"\x00\xff", "schließe".encode()], object)


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
    data = json.loads(json.dumps(array.tolist() if nested else to_json(array, "x")))
    back = from_json(data, datatype, array.shape, "x")
    expected = np.vectorize(str.encode, otypes=[object])(array) if datatype == "BYTES" else array
    assert back.dtype == DATATYPES[datatype]
    np.testing.assert_array_equal(back, expected)


@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_every_datatype_is_recognised_by_its_dtype(datatype: str) -> None:
    assert datatype_of(np.zeros(1, DATATYPES[datatype])) == datatype


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
    ("data", "datatype", "shape", "message"),
    [
        (b"123", "FP32", [1], r"'x': 3 bytes for FP32 \[1\]"),
        (b"12345678", "FP32", [1], r"'x': 8 bytes for FP32 \[1\]"),
        (b"\0", "UINT8", [0], r"'x': 1 bytes for UINT8 \[0\]"),
        (b"\2", "BOOL", [1], "'x': a BOOL must be 0 or 1"),
        (b"\1\0\0", "BYTES", [1], "'x': 3 bytes do not hold 1 length-prefixed BYTES"),
        (b"\2\0\0\0a", "BYTES", [1], "'x': 5 bytes do not hold 1 length-prefixed BYTES"),
        (b"\0\0\0\0\0", "BYTES", [1], "'x': 5 bytes do not hold 1 length-prefixed BYTES"),
        (b"\0\0\0\0", "BYTES", [2], "'x': 4 bytes do not hold 2 length-prefixed BYTES"),
        (b"", "FP8", [0], "'x': datatype 'FP8' is unknown; known are BOOL"),
        (b"", None, [0], "'x': datatype 'None' is unknown"),
        (b"", "FP32", [-1], r"'x': shape \[-1\] must be at most 8 whole numbers >= 0"),
        (b"", "FP32", [True], r"'x': shape \[True\] must be"),
        (b"", "FP32", [1.0], r"'x': shape \[1.0\] must be"),
        (b"", "FP32", None, "'x': shape None must be"),
        (b"", "FP32", [1] * 9, "'x': shape .* must be at most 8"),
        (b"", "FP32", [2**41], "'x': shape .* must be"),
        (b"", "FP32", [0, 10**400], "'x': shape .* must be"),
        (b"", "FP32", [0, 2**62, 2], "'x': shape .* must be"),
    ],
)
def test_malformed_raw_bytes_name_the_tensor_and_the_reason(
    data: bytes, datatype: Any, shape: Any, message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        from_bytes(data, datatype, shape, "x")


@pytest.mark.parametrize(
    ("data", "datatype", "shape", "message"),
    [
        ([1, 2], "FP32", [3], "'x': 2 elements where the shape has 3"),
        ([[1, 2, 3], [4]], "FP32", [2, 2], r"'x': data is neither flat nor nested as \[2, 2\] says"),
        ([[1, 2], [3, 4]], "FP32", [4], r"'x': data is neither flat nor nested as \[4\] says"),
        ([[1], 2], "FP32", [2], r"'x': '\[1\]' is no FP32"),
        ([[1], 2], "FP32", [2, 1], r"'x': data is neither flat nor nested as \[2, 1\] says"),
        ([[[1]]], "FP32", [1], r"'x': '\[\[1\]\]' is no FP32"),
        ({"a": 1}, "FP32", [1], "'x': data must be a list, got dict"),
        ("abc", "BYTES", [3], "'x': data must be a list, got str"),
        (["1"], "FP32", [1], "'x': '1' is no FP32"),
        ([None], "FP32", [1], "'x': 'None' is no FP32"),
        ([True], "FP32", [1], "'x': 'True' is no FP32"),
        ([True], "INT32", [1], "'x': 'True' is no INT32"),
        ([1], "BOOL", [1], "'x': '1' is no BOOL"),
        ([1.0], "INT32", [1], "'x': 1.0 is no INT32"),
        ([1], "BYTES", [1], "'x': '1' is no BYTES"),
        (["\ud800"], "BYTES", [1], "'x' is no Unicode text: surrogates not allowed"),
        ([128], "INT8", [1], "'x': a number does not fit INT8"),
        ([-1], "UINT64", [1], "'x': a number does not fit UINT64"),
        ([1e39], "FP32", [1], "'x': a number does not fit FP32"),
        ([10**400], "FP64", [1], "'x': a number does not fit FP64"),
        ([float("inf")], "FP64", [1], "'x': a number does not fit FP64"),
        ([1.0], "FP16", [1], "'x' is FP16, which has no JSON form"),
    ],
)
def test_malformed_json_data_name_the_tensor_and_the_reason(
    data: Any, datatype: str, shape: list[int], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        from_json(data, datatype, shape, "x")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(1, np.float16), "'x' is FP16, which has no JSON form"),
        (np.array([np.nan], np.float32), "'x' has numbers that are not finite"),
        (TEXT, "'x' is not UTF-8"),
    ],
)
def test_what_json_cannot_hold_is_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        to_json(array, "x")


def test_zero_dimensions_are_one_element() -> None:
    assert check_header("FP32", [], "x") == (np.dtype("<f4"), 1)
    assert from_json([2.5], "FP32", [], "x") == np.float32(2.5)


def test_message_gives_binary_plain_and_shared_tensors_back() -> None:
    shared = SharedTensor("ring", 64, 12, "FP32", (3,))
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


@pytest.mark.parametrize("length", ["", "-1", "+2", "1e1", "3", "0x2", "²", "9" * 5000, " 2"])
def test_impossible_header_length_is_refused(length: str) -> None:
    with pytest.raises(ProtocolError, match="Inference-Header-Content-Length: .* must be a number up to 2"):
        parse(b"{}", length)


@pytest.mark.parametrize(
    ("body", "length", "message"),
    [
        (b"", None, "the message is no JSON"),
        (b"{", None, "the message is no JSON"),
        (b"{}x", None, "the message is no JSON"),
        (b"{}", "0", "the message is no JSON"),
        (b"[]", None, "must be a JSON object, got list"),
        (b'{"a": NaN}', None, "the message is no JSON: NaN is no JSON"),
        (b'{"a": -Infinity}', None, "the message is no JSON: -Infinity is no JSON"),
        (b"\xff\xfe\xff", None, "the message is no JSON"),
        (b"[" * 100_000, None, "the message is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", None, "the message is no JSON"),
    ],
)
def test_what_is_no_message_is_refused(body: bytes, length: str | None, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        parse(body, length)


A = {"name": "a", "datatype": "FP32", "shape": [1]}


@pytest.mark.parametrize(
    ("inputs", "binary", "message"),
    [
        (None, b"", "the message has no list of inputs"),
        ({}, b"", "the message has no list of inputs"),
        (["a"], b"", "every entry of inputs must be an object with a name"),
        ([{"name": 1}], b"", "every entry of inputs must be an object with a name"),
        ([A], b"", "'a' has neither data nor binary_data_size nor shared_memory_region"),
        ([{**A, "data": [1]}, {**A, "data": [1]}], b"", "'a' comes twice"),
        ([{**A, "parameters": 1}], b"", "parameters must be an object"),
        ([{**A, "parameters": {"binary_data_size": 4}}], b"123", "'a': 3 bytes are left of the 4 announced"),
        ([{**A, "parameters": {"binary_data_size": True}}], b"1", "binary_data_size must be a whole number >= 0"),
        ([{**A, "parameters": {"binary_data_size": -4}}], b"", "binary_data_size must be a whole number >= 0"),
        ([{**A, "parameters": {"binary_data_size": "4"}}], b"1234", "binary_data_size must be a whole number >= 0"),
        ([{**A, "data": [1]}], b"12", "2 bytes of the message belong to no tensor"),
        ([{**A, "parameters": {"shared_memory_region": 3}}], b"", "'a': shared_memory_region must be a name"),
        (
            [{**A, "parameters": {"shared_memory_region": "r"}}],
            b"",
            "a: shared_memory_byte_size must be a whole number",
        ),
        (
            [{**A, "parameters": {"shared_memory_region": "r", "shared_memory_offset": 2**63}}],
            b"",
            "a: shared_memory_offset must be a whole number >= 0",
        ),
    ],
)
def test_malformed_tensor_names_itself_and_the_reason(inputs: Any, binary: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        read_tensors({"inputs": inputs}, "inputs", memoryview(binary))


@pytest.mark.parametrize("value", [True, 1.0, "1", None, -1, 2**63])
def test_whole_number_is_nothing_else(value: Any) -> None:
    with pytest.raises(ProtocolError, match="the request: k must be a whole number >= 0, got"):
        whole_number({"k": value}, "k", "the request")


@pytest.mark.parametrize("value", [0, 1, "false", None])
def test_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(ProtocolError, match="the request: k must be true or false, got"):
        flag({"k": value}, "k", "the request")


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1.0, 1.0, (7,), np.float32),
        spaces.Box(np.array([-np.inf, 0.1, -2.0]), np.array([1.0, np.inf, np.inf]), dtype=np.float64),
        spaces.Box(0, 2**62, (2, 3), np.int64),
        spaces.Box(0.1, 0.2, (), np.float32),
        spaces.Discrete(5),
        spaces.Discrete(5, start=-2),
        spaces.MultiDiscrete([256] * 7),
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
        {"input_shapes": {"state": ["a"]}},
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
