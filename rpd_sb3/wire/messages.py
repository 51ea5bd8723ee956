"""Inference requests and responses of the Open Inference Protocol v2, as bytes.

A message is a JSON object, followed by the raw content of the tensors that it says are binary. The header
``Inference-Header-Content-Length`` tells how long the JSON is; without it, all of the body is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from rpd_sb3.wire.tensors import ProtocolError, check_header, datatype_of, from_bytes, from_json, to_bytes, to_json

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"
JSON = "application/json"


class Message(NamedTuple):
    """One message, ready to send."""

    body: bytes
    headers: dict[str, str]


class SharedTensor(NamedTuple):
    """A tensor that lies in a shared memory region instead of in the message."""

    region: str
    offset: int
    byte_size: int
    datatype: str
    shape: tuple[int, ...]


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
    :param plain: tensors to be sent as JSON
    :param entries: descriptions of tensors whose content is elsewhere
    :raises ProtocolError: for a plain tensor that JSON cannot hold
    """
    described = list(entries)
    chunks = [to_bytes(array) for array in arrays.values()]
    for (name, array), chunk in zip(arrays.items(), chunks):
        described.append(_describe(name, array, parameters={"binary_data_size": len(chunk)}))
    for name, array in (plain or {}).items():
        described.append(_describe(name, array, data=to_json(array, name)))
    head = json.dumps({**header, tensors: described}).encode()
    if not chunks:
        return Message(head, {"Content-Type": JSON})
    return Message(b"".join([head, *chunks]), {"Content-Type": BINARY, HEADER_LENGTH: str(len(head))})


def describe_shared(name: str, tensor: SharedTensor) -> dict[str, Any]:
    """The entry of a tensor that lies in shared memory."""
    place = {
        "shared_memory_region": tensor.region,
        "shared_memory_offset": tensor.offset,
        "shared_memory_byte_size": tensor.byte_size,
    }
    return {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape), "parameters": place}


def _describe(name: str, array: np.ndarray, **content: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype_of(array), "shape": list(array.shape), **content}


def parse(body: bytes | memoryview, header_length: str | None) -> tuple[dict[str, Any], memoryview]:
    """Split a message into its JSON object and its binary part.

    :param body: all of it
    :param header_length: content of the header of that name; None: no binary part
    :raises ProtocolError: if it is no such message
    """
    view = memoryview(body)
    length = len(view)
    if header_length is not None:
        if not (re.fullmatch("[0-9]{1,18}", header_length) and int(header_length) <= len(view)):
            raise ProtocolError(f"{HEADER_LENGTH}: {header_length[:50]!r} must be a number up to {len(view)}")
        length = int(header_length)
    try:
        header = json.loads(bytes(view[:length]), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the message is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ProtocolError(f"the message must be a JSON object, got {type(header).__name__}")
    return header, view[length:]


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
        datatype, shape, parameters = entry.get("datatype"), entry.get("shape"), parameters_of(entry)
        check_header(datatype, shape, name)
        if "shared_memory_region" in parameters:
            found[name] = shared_tensor(name, parameters, str(datatype), tuple(shape or ()))
        elif "binary_data_size" in parameters:
            size = whole_number(parameters, "binary_data_size", name)
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


def shared_tensor(name: str, parameters: Mapping[str, Any], datatype: str, shape: tuple[int, ...]) -> SharedTensor:
    """Where a tensor lies in shared memory.

    :raises ProtocolError: if region, offset or size are not as the protocol says
    """
    region = parameters["shared_memory_region"]
    if not isinstance(region, str):
        raise ProtocolError(f"tensor {name!r}: shared_memory_region must be a name")
    offset = whole_number(parameters, "shared_memory_offset", name, default=0)
    return SharedTensor(region, offset, whole_number(parameters, "shared_memory_byte_size", name), datatype, shape)


def parameters_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The ``parameters`` of a request or a tensor, which may be missing.

    :raises ProtocolError: if they are no object
    """
    parameters = entry.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ProtocolError("parameters must be an object")
    return parameters


def whole_number(parameters: Mapping[str, Any], key: str, owner: str, default: int | None = None) -> int:
    """A number >= 0 among parameters.

    :raises ProtocolError: if it is missing without a default, or something else
    """
    value = parameters.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise ProtocolError(f"{owner}: {key} must be a whole number >= 0, got {str(value)[:50]!r}")
    return value


def flag(parameters: Mapping[str, Any], key: str, owner: str, default: bool = False) -> bool:
    """True or false among parameters.

    :raises ProtocolError: if it is something else
    """
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise ProtocolError(f"{owner}: {key} must be true or false, got {str(value)[:50]!r}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
