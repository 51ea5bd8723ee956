"""From an inference request of the protocol to a query, and from labels to its response."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from rpd_sb3.contract.teacher import Labels, TeacherSpec
from rpd_sb3.serve.batch import Job
from rpd_sb3.serve.regions import Regions
from rpd_sb3.wire.messages import (
    Message,
    SharedTensor,
    build,
    flag,
    parameters_of,
    parse,
    read_tensors,
    shared_tensor,
    whole_number,
)
from rpd_sb3.wire.shared_memory import check_generation
from rpd_sb3.wire.spec import ASKERS_INPUTS
from rpd_sb3.wire.tensors import ProtocolError, as_objects, datatype_of, to_bytes

MAX_ROWS = 4096
"""Rows of one request."""
FLOATS = ("FP16", "FP32", "FP64")


class Wanted(NamedTuple):
    """An output that the client asks for."""

    name: str
    binary: bool
    shared: dict[str, Any] | None
    """Parameters that say where in shared memory it shall go; None: into the response."""


class Inference(NamedTuple):
    """A request that has been checked."""

    job: Job
    id: str | None
    wanted: list[Wanted]


def read_request(body: bytes, header_length: str | None, spec: TeacherSpec, regions: Regions) -> Inference:
    """Check an inference request, and make it a query.

    :param body: of the request
    :param header_length: the header of that name
    :param spec: of the teacher
    :param regions: shared memory that clients have registered
    :raises ProtocolError: with what is wrong
    :raises StaleGeneration: if the query in shared memory has been overwritten already
    """
    header, binary = parse(body, header_length)
    parameters = parameters_of(header)
    still_valid = _generation_check(parameters, regions)
    try:
        arrays = _arrays(read_tensors(header, "inputs", binary), regions)
        n = _check_inputs(arrays, spec)
        job = _job(arrays, n, parameters, spec)
    except ProtocolError:
        still_valid()  # whoever overwrites a query may make nonsense of it
        raise
    still_valid()
    job.still_valid = still_valid
    wanted = _wanted(header, parameters, spec, regions)
    identity = header.get("id")
    if identity is not None and not isinstance(identity, str):
        raise ProtocolError("id must be a string")
    return Inference(job, identity, wanted)


def _arrays(tensors: Mapping[str, np.ndarray | SharedTensor], regions: Regions) -> dict[str, np.ndarray]:
    return {
        name: regions.read(name, tensor) if isinstance(tensor, SharedTensor) else tensor
        for name, tensor in tensors.items()
    }


def _job(arrays: Mapping[str, np.ndarray], n: int, parameters: Mapping[str, Any], spec: TeacherSpec) -> Job:
    if "action" in arrays and "action_tokens" in arrays:
        raise ProtocolError("the inputs 'action' and 'action_tokens' exclude each other")
    job = Job(
        inputs={name: _content(name, arrays[name]) for name in spec.inputs},
        n=n,
        env_ids=arrays["env_id"].astype(np.int64) if "env_id" in arrays else np.arange(n),
        episode_starts=arrays["episode_start"] if "episode_start" in arrays else np.zeros(n, bool),
        actions=next((_content(name, arrays[name]) for name in ("action_tokens", "action") if name in arrays), None),
        client=_text(parameters, "client_id"),
        sequence=whole_number(parameters, "sequence", "the request") if "sequence" in parameters else None,
        deadline=_deadline(parameters),
    )
    if spec.stateful and not (job.client and "env_id" in arrays and "episode_start" in arrays):
        raise ProtocolError(
            f"teacher {spec.name!r} has a memory: it needs the parameter client_id and the inputs env_id and episode_start"
        )
    return job


def write_response(request: Inference, labels: Labels, model: str, regions: Regions) -> Message:
    """The response to a request.

    :param labels: the teacher's answer
    :param model: name under which it is served
    :raises ProtocolError: if an output does not fit where the client wants it
    """
    header: dict[str, Any] = {"model_name": model, "model_version": "1"}
    if request.id is not None:
        header["id"] = request.id
    binary = {want.name: labels[want.name] for want in request.wanted if want.binary and not want.shared}
    plain = {want.name: labels[want.name] for want in request.wanted if not (want.binary or want.shared)}
    entries = []
    for want in request.wanted:
        if want.shared is not None:
            array = labels[want.name]
            place = shared_tensor(want.name, want.shared, datatype_of(array), array.shape)
            regions.write(want.name, place, to_bytes(array))
            entries.append(
                {"name": want.name, "datatype": place.datatype, "shape": list(place.shape), "parameters": want.shared}
            )
    return build(header, "outputs", binary, plain=plain, entries=entries)


def _check_inputs(arrays: Mapping[str, np.ndarray], spec: TeacherSpec) -> int:
    for name in arrays:
        if name not in spec.inputs and name not in ASKERS_INPUTS:
            known = ", ".join([*spec.inputs, *ASKERS_INPUTS])
            raise ProtocolError(f"input {name!r} is unknown; teacher {spec.name!r} takes {known}")
    for name in spec.inputs:
        if name not in arrays:
            raise ProtocolError(f"input {name!r} is missing; teacher {spec.name!r} needs {', '.join(spec.inputs)}")
    sizes = {name: array.shape[0] if array.ndim else 0 for name, array in arrays.items()}
    n = max(sizes.values(), default=0)
    if not 1 <= n <= MAX_ROWS or len(set(sizes.values())) != 1:
        raise ProtocolError(f"all inputs must have the same number of rows, 1 to {MAX_ROWS}, got {sizes}")
    for name, array in arrays.items():
        _check_input(name, array, spec)
    return n


def _check_input(name: str, array: np.ndarray, spec: TeacherSpec) -> None:
    datatype, row = datatype_of(array), array.shape[1:]
    allowed: tuple[str, ...] = FLOATS
    shape: tuple[int, ...] | None = spec.input_shapes.get(name)
    if name.startswith("images."):
        allowed = ("UINT8",)
        size = spec.image_sizes.get(name.removeprefix("images."))
        if len(row) != 3 or row[2] != 3 or (size is not None and row[:2] != tuple(size)):
            pixels = "H, W" if size is None else f"{size[0]}, {size[1]}"
            raise ProtocolError(f"input {name!r} must have shape (N, {pixels}, 3), got {list(array.shape)}")
        shape = None
    elif name == "instruction":
        allowed, shape = ("BYTES",), ()
    elif name == "env_id":
        allowed, shape = ("INT64", "INT32"), ()
    elif name == "episode_start":
        allowed, shape = ("BOOL",), ()
    elif name == "action_tokens":
        allowed = ("INT64", "INT32")
    if datatype not in allowed:
        raise ProtocolError(f"input {name!r} must be {' or '.join(allowed)}, got {datatype}")
    if shape is not None and row != tuple(shape):
        raise ProtocolError(f"input {name!r} must have shape {['N', *shape]}, got {list(array.shape)}")
    if datatype in FLOATS:
        finite = np.isfinite(_content(name, array))
        if not finite.all():
            raise ProtocolError(f"input {name!r}, row {int(np.argwhere(~finite)[0][0])}, is not finite as a float32")


def _content(name: str, array: np.ndarray) -> np.ndarray:
    if name == "instruction":
        try:
            return as_objects([item.decode() for item in array])
        except UnicodeDecodeError as error:
            raise ProtocolError(f"input {name!r} is not UTF-8: {error}") from error
    if name == "action_tokens":
        return array.astype(np.int64, copy=False)
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False) if array.dtype.kind == "f" else array


def _wanted(
    header: Mapping[str, Any], parameters: Mapping[str, Any], spec: TeacherSpec, regions: Regions
) -> list[Wanted]:
    everything = flag(parameters, "binary_data_output", "the request")
    entries = header.get("outputs")
    if entries is None:
        entries = [{"name": name} for name in sorted(spec.labels)]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ProtocolError("outputs must be a list of objects")
    wanted: list[Wanted] = []
    for entry in entries:
        name, own = entry.get("name"), parameters_of(entry)
        if not isinstance(name, str) or name not in spec.labels:
            known = ", ".join(sorted(spec.labels))
            raise ProtocolError(f"output {str(name)[:50]!r} is unknown; teacher {spec.name!r} gives {known}")
        if name in [want.name for want in wanted]:
            raise ProtocolError(f"output {name!r} is asked for twice")
        shared = {key: own[key] for key in own if key.startswith("shared_memory_")} or None
        if shared is not None:
            if "shared_memory_region" not in shared:
                raise ProtocolError(f"output {name!r}: shared_memory_region is missing")
            regions.check_place(name, shared_tensor(name, shared, "FP32", ()))
        if "classification" in own:
            raise ProtocolError(f"output {name!r}: the classification extension is not supported")
        wanted.append(Wanted(name, flag(own, "binary_data", f"output {name!r}", everything), shared))
    return wanted


def _generation_check(parameters: Mapping[str, Any], regions: Regions) -> Any:
    if "shared_memory_generation" not in parameters:
        return lambda: None
    region = regions.get(_text(parameters, "shared_memory_generation_region"))
    offset = whole_number(parameters, "shared_memory_generation_offset", "the request")
    generation = whole_number(parameters, "shared_memory_generation", "the request")
    if offset % 8 or offset + 8 > region.byte_size:
        raise ProtocolError(f"shared_memory_generation_offset {offset} is not in the region")
    return lambda: check_generation(region, offset, generation)


def _deadline(parameters: Mapping[str, Any]) -> float:
    if "timeout" not in parameters:
        return float("inf")
    return time.monotonic() + whole_number(parameters, "timeout", "the request") / 1e6  # microseconds, as in Triton


def _text(parameters: Mapping[str, Any], key: str) -> str:
    value = parameters.get(key, "")
    if not isinstance(value, str) or len(value) > 200:
        raise ProtocolError(f"{key} must be a string of at most 200 characters")
    return value
