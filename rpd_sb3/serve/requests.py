"""From an inference request of the protocol to a query, and from labels to its response."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rpd_sb3.contract.teacher import Labels, Query, TeacherSpec
from rpd_sb3.serve.batch import PendingQuery
from rpd_sb3.serve.regions import Regions
from rpd_sb3.wire.messages import Generation, Message, Request, SharedTensor, build, describe_shared, parse_request
from rpd_sb3.wire.shared_memory import check_generation
from rpd_sb3.wire.spec import ASKERS_INPUTS, input_form
from rpd_sb3.wire.tensors import ProtocolError, as_objects, datatype_of, from_bytes, to_bytes

MAX_ROWS = 4096
"""Rows of one request."""
ACCEPTED = {"FP32": ("FP16", "FP32", "FP64"), "INT64": ("INT64", "INT32")}
"""What is converted to the datatype of an input; others must be as they are."""


def read_request(
    body: bytes, header_length: str | None, spec: TeacherSpec, regions: Regions
) -> tuple[Request, PendingQuery]:
    """An inference request that suits the teacher, and the query that it makes.

    :param body: of the request
    :param header_length: the header of that name
    :param spec: of the teacher
    :param regions: shared memory that clients have registered
    :raises ProtocolError: with what is wrong
    :raises StaleGeneration: if the query in shared memory has been overwritten already
    """
    request = parse_request(body, header_length, spec.labels)
    for output in request.outputs:
        if output.place is not None:
            regions.view(output.place, output.name)  # before the teacher works for nothing
    still_valid = _generation_check(request.generation, regions)
    try:
        arrays = _inputs(request, spec, regions)
    except ProtocolError:
        still_valid()  # a query that is being overwritten may be nonsense
        raise
    still_valid()
    if spec.stateful and not (request.client_id and "env_id" in arrays and "episode_start" in arrays):
        raise ProtocolError(
            f"teacher {spec.name!r} has a memory: it needs the parameter client_id and the inputs env_id and episode_start"
        )
    if "action" in arrays and "action_tokens" in arrays:
        raise ProtocolError("the inputs 'action' and 'action_tokens' exclude each other")
    n = max(map(len, arrays.values()))
    query = Query(
        inputs={name: arrays[name] for name in spec.inputs},
        env_ids=arrays.get("env_id", np.arange(n)),
        episode_starts=arrays.get("episode_start", np.zeros(n, bool)),
        actions=arrays.get("action_tokens", arrays.get("action")),
    )
    deadline = time.monotonic() + request.timeout
    return request, PendingQuery(query, request.client_id, request.sequence, deadline, still_valid)


def write_response(request: Request, labels: Labels, model: str, regions: Regions) -> Message:
    """The response to a request.

    :param labels: the teacher's answer
    :param model: name under which it is served
    :raises ProtocolError: if an output does not fit where the client wants it
    """
    header: dict[str, Any] = {"model_name": model}
    if request.id is not None:
        header["id"] = request.id
    binary: dict[str, np.ndarray] = {}
    plain: dict[str, np.ndarray] = {}
    shared: list[dict[str, Any]] = []
    for name, as_bytes, place in request.outputs:
        array = labels[name]
        if place is not None:
            content, view = to_bytes(array), regions.view(place, name)
            if len(content) > len(view):
                raise ProtocolError(f"output {name!r} has {len(content)} bytes, but {len(view)} are set aside for it")
            view[: len(content)] = content
            shared.append(describe_shared(name, SharedTensor(place, datatype_of(array), array.shape)))
        elif as_bytes:
            binary[name] = array
        else:
            plain[name] = array
    return build(header, "outputs", binary, plain=plain, entries=shared)


def _generation_check(generation: Generation | None, regions: Regions) -> Callable[[], None]:
    if generation is None:
        return lambda: None
    region = regions.get(generation.region)
    if generation.offset % 8 or generation.offset + 8 > region.byte_size:
        raise ProtocolError(f"shared_memory_generation_offset {generation.offset} is not in the region")
    return lambda: check_generation(region, generation.offset, generation.number)


def _inputs(request: Request, spec: TeacherSpec, regions: Regions) -> dict[str, np.ndarray]:
    """The request's inputs as the teacher takes them, all of N rows."""
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in request.inputs.items():
        if name not in spec.inputs and name not in ASKERS_INPUTS:
            known = ", ".join([*spec.inputs, *ASKERS_INPUTS])
            raise ProtocolError(f"input {name!r} is unknown; teacher {spec.name!r} takes {known}")
        if isinstance(tensor, SharedTensor):
            arrays[name] = from_bytes(regions.view(tensor.place, name), tensor.datatype, tensor.shape, name)
        else:
            arrays[name] = tensor
    for name in spec.inputs:
        if name not in arrays:
            raise ProtocolError(f"input {name!r} is missing; teacher {spec.name!r} needs {', '.join(spec.inputs)}")
    rows = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    if len(set(rows.values())) != 1 or not 1 <= max(rows.values()) <= MAX_ROWS:
        raise ProtocolError(f"all inputs must have the same number of rows, 1 to {MAX_ROWS}, got {rows}")
    return {name: _checked(name, array, spec) for name, array in arrays.items()}


def _checked(name: str, array: np.ndarray, spec: TeacherSpec) -> np.ndarray:
    """An input (N, ...) as the teacher takes it: float32, int64, bool, uint8 or Python's strings."""
    datatype, shape = input_form(name, spec)
    accepted = ACCEPTED.get(datatype, (datatype,))
    if datatype_of(array) not in accepted:
        raise ProtocolError(f"input {name!r} must be {' or '.join(accepted)}, got {datatype_of(array)}")
    row = array.shape[1:]
    if shape is not None and (len(row) != len(shape) or any(w not in (-1, n) for w, n in zip(shape, row))):
        wanted = ", ".join(["N", *("any" if n == -1 else str(n) for n in shape)])
        raise ProtocolError(f"input {name!r} must have shape [{wanted}], got {list(array.shape)}")
    if datatype == "BYTES":
        try:
            return as_objects([item.decode() for item in array])
        except UnicodeDecodeError as error:
            raise ProtocolError(f"input {name!r} is not UTF-8: {error}") from error
    if datatype == "INT64":
        return array.astype(np.int64, copy=False)
    if datatype != "FP32":
        return array
    with np.errstate(over="ignore"):
        numbers = array.astype(np.float32, copy=False)
    if not (finite := np.isfinite(numbers)).all():
        raise ProtocolError(f"input {name!r}, row {int(np.argwhere(~finite)[0][0])}, is not finite as a float32")
    return numbers
