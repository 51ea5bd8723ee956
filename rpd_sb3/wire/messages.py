"""Inference requests and responses of the Open Inference Protocol v2, as bytes.

A message is a JSON object, followed by the raw content of the tensors that it says are binary. The header
``Inference-Header-Content-Length`` tells how long the JSON is; without it, all of the body is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple, NoReturn

import numpy as np

from rpd_sb3.wire.tensors import ProtocolError, check_header, datatype_of, from_bytes, from_json, to_bytes

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
JSON = "application/json"
MAX_TEXT = 200
"""Characters of a name or an id in a request."""


class Message(NamedTuple):
    """One message, ready to send."""

    body: bytes
    headers: dict[str, str]


class Place(NamedTuple):
    """Part of a registered shared memory region."""

    region: str
    offset: int
    byte_size: int


class SharedTensor(NamedTuple):
    """A tensor that lies in shared memory instead of in the message."""

    place: Place
    datatype: str
    shape: tuple[int, ...]


class Output(NamedTuple):
    """An output that a request asks for."""

    name: str
    binary: bool
    place: Place | None
    """Where in shared memory it goes; None: into the response."""


class Generation(NamedTuple):
    """The number that a slot in shared memory counts while it holds the tensors of a request."""

    region: str
    offset: int
    number: int


@dataclass(frozen=True)
class Request:
    """An inference request as the protocol describes it; whether its inputs suit the teacher is not checked."""

    inputs: Mapping[str, np.ndarray | SharedTensor]
    outputs: Sequence[Output]
    id: str | None
    client_id: str
    """Empty: the client has not said who it is."""
    sequence: int | None
    timeout: float
    """Seconds."""
    generation: Generation | None


class RegionRequest(NamedTuple):
    """A request to register part of a shared memory object."""

    key: str
    offset: int
    byte_size: int


def build(
    header: Mapping[str, Any],
    tensors: str,
    arrays: Mapping[str, np.ndarray],
    plain: Mapping[str, np.ndarray] | None = None,
    entries: Sequence[Mapping[str, Any]] = (),
) -> Message:
    """A message with these tensors.

    :param header: the rest of the JSON object
    :param tensors: ``inputs`` or ``outputs``
    :param arrays: tensor name to its content, to be sent as raw bytes
    :param plain: tensors of finite numbers or text, to be sent as JSON
    :param entries: descriptions of tensors whose content is elsewhere
    :raises ProtocolError: for an array whose dtype the protocol does not know
    """
    described = list(entries)
    chunks = []
    for name, array in arrays.items():
        chunks.append(to_bytes(array))
        described.append(_entry(name, array, parameters={"binary_data_size": len(chunks[-1])}))
    for name, array in (plain or {}).items():
        described.append(_entry(name, array, data=array.ravel().tolist()))
    head = json.dumps({**header, tensors: described}, allow_nan=False).encode()
    if not chunks:
        return Message(head, {"Content-Type": JSON})
    return Message(b"".join([head, *chunks]), {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))})


def describe_shared(name: str, tensor: SharedTensor) -> dict[str, Any]:
    """The entry of a tensor that lies in shared memory."""
    parameters = {
        "shared_memory_region": tensor.place.region,
        "shared_memory_offset": tensor.place.offset,
        "shared_memory_byte_size": tensor.place.byte_size,
    }
    return {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": parameters}


def _entry(name: str, array: np.ndarray, **content: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array), "shape": list(array.shape), **content}


def parse(body: bytes | memoryview, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """Split a message into its JSON object and its binary part.

    :param body: all of it
    :param header_length: content of the header of that name; None: no binary part
    :raises ProtocolError: if it is not such a message
    """
    view = memoryview(body)
    length = len(view)
    if header_length is not None:
        if not (re.fullmatch("[0-9]{1,18}", header_length) and int(header_length) <= len(view)):
            raise ProtocolError(f"{HEADER_LENGTH}: {header_length[:50]!r} must be a number up to {len(view)}")
        length = int(header_length)
    return _json_object(view[:length]), view[length:]


def read_tensors(header: Mapping[str, Any], tensors: str, binary: memoryview) -> dict[str, np.ndarray | SharedTensor]:
    """The tensors of a message, views where they are binary.

    :param header: of :func:`parse`
    :param tensors: ``inputs`` or ``outputs``
    :param binary: of :func:`parse`
    :raises ProtocolError: naming the first tensor that is not as the protocol says
    """
    found: dict[str, np.ndarray | SharedTensor] = {}
    entries = header.get(tensors)
    if not isinstance(entries, list):
        raise ProtocolError(f"the message has no list of {tensors}")
    at = 0
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ProtocolError(f"every entry of {tensors} must be an object with a name")
        name = entry["name"][:100]
        if name in found:
            raise ProtocolError(f"tensor {name!r} comes twice")
        datatype, shape, parameters = entry.get("datatype"), entry.get("shape"), _parameters(entry)
        check_header(datatype, shape, name)
        if "shared_memory_region" in parameters:
            place = _place(parameters, f"tensor {name!r}")
            found[name] = SharedTensor(place, str(datatype), tuple(shape or ()))
        elif "binary_data_size" in parameters:
            size = _natural(parameters, "binary_data_size", f"tensor {name!r}")
            if at + size > len(binary):
                raise ProtocolError(f"tensor {name!r}: {len(binary) - at} bytes are left of the {size} announced")
            found[name] = from_bytes(binary[at : at + size], str(datatype), shape or (), name)
            at += size
        elif "data" in entry:
            found[name] = from_json(entry["data"], str(datatype), shape or (), name)
        else:
            raise ProtocolError(f"tensor {name!r} has neither data nor binary_data_size nor shared_memory_region")
    if at != len(binary):
        raise ProtocolError(f"{len(binary) - at} bytes of the message belong to no tensor")
    return found


def parse_request(body: bytes | memoryview, header_length: str | None, labels: Collection[str]) -> Request:
    """The inference request that a message is.

    :param body: all of it
    :param header_length: content of the header of that name; None: no binary part
    :param labels: outputs that there are
    :raises ProtocolError: with what is wrong
    """
    header, binary = parse(body, header_length)
    inputs = read_tensors(header, "inputs", binary)
    identity = header.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ProtocolError("id must be a string")
    parameters, owner = _parameters(header), "the request"
    generation = None
    if "shared_memory_generation" in parameters:
        generation = Generation(
            _text(parameters, "shared_memory_generation_region", owner),
            _natural(parameters, "shared_memory_generation_offset", owner),
            _natural(parameters, "shared_memory_generation", owner),
        )
    return Request(
        inputs,
        _outputs(header.get("outputs"), _flag(parameters, "binary_data_output", owner, False), labels),
        identity,
        _text(parameters, "client_id", owner) if "client_id" in parameters else "",
        _natural(parameters, "sequence", owner) if "sequence" in parameters else None,
        _natural(parameters, "timeout", owner) / 1e6 if "timeout" in parameters else inf,  # microseconds, as in Triton
        generation,
    )


def parse_region(body: bytes) -> RegionRequest:
    """The request to register a region that a message is: ``{"key": "/name", "offset": 0, "byte_size": 1024}``.

    :raises ProtocolError: with what is wrong
    """
    content, owner = _json_object(body), "the region"
    return RegionRequest(
        _text(content, "key", owner), _natural(content, "offset", owner, 0), _natural(content, "byte_size", owner)
    )


def _outputs(entries: Any, binary: bool, labels: Collection[str]) -> list[Output]:
    if entries is None:
        return [Output(name, binary, None) for name in sorted(labels)]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ProtocolError("outputs must be a list of objects")
    outputs: dict[str, Output] = {}
    for entry in entries:
        name, parameters = entry.get("name"), _parameters(entry)
        if not isinstance(name, str) or name not in labels:
            raise ProtocolError(f"output {str(name)[:50]!r} is unknown; the teacher gives {', '.join(sorted(labels))}")
        if name in outputs:
            raise ProtocolError(f"output {name!r} is asked for twice")
        owner = f"output {name!r}"
        shared = any(key.startswith("shared_memory_") for key in parameters)
        place = _place(parameters, owner) if shared else None
        outputs[name] = Output(name, _flag(parameters, "binary_data", owner, binary), place)
    return list(outputs.values())


def _json_object(content: bytes | memoryview) -> dict[str, Any]:
    try:
        found = json.loads(bytes(content), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the message is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ProtocolError(f"the message must be a JSON object, got {type(found).__name__}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ProtocolError("parameters must be an object")
    return parameters


def _place(parameters: Mapping[str, Any], owner: str) -> Place:
    return Place(
        _text(parameters, "shared_memory_region", owner),
        _natural(parameters, "shared_memory_offset", owner, 0),
        _natural(parameters, "shared_memory_byte_size", owner),
    )


def _text(fields: Mapping[str, Any], key: str, owner: str) -> str:
    value = fields.get(key)
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ProtocolError(f"{owner}: {key} must be a string of at most {MAX_TEXT} characters")
    return value


def _natural(fields: Mapping[str, Any], key: str, owner: str, default: int | None = None) -> int:
    value = fields.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ProtocolError(f"{owner}: {key} must be a whole number >= 0, got {str(value)[:50]!r}")
    return value


def _flag(fields: Mapping[str, Any], key: str, owner: str, default: bool) -> bool:
    value = fields.get(key, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"{owner}: {key} must be true or false, got {str(value)[:50]!r}")
    return value
