"""Tensors of the Open Inference Protocol v2: datatypes, raw bytes (the binary tensor data extension) and JSON lists.

Source: KServe's "Open Inference Protocol", Triton's "Binary Tensor Data Extension". Numbers are little endian, row major;
a BYTES element is four bytes of length and its content.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

DATATYPES = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
    "BYTES": np.dtype(object),
}
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
MAX_STRING = 4096
"""Bytes of one element of a BYTES tensor: an instruction is a sentence."""
MAX_DIMS = 8
MAX_ELEMENTS = 2**40


class ProtocolError(ValueError):
    """A message that is not as the protocol says."""


def datatype_of(array: np.ndarray) -> str:
    """The protocol's name for an array's dtype; strings are BYTES.

    :raises ProtocolError: if it has none
    """
    name = "BYTES" if array.dtype.kind in "US" else _NAMES.get(array.dtype)
    if name is not None:
        return name
    raise ProtocolError(f"arrays of {array.dtype} cannot be sent; the protocol knows {', '.join(DATATYPES)}")


def to_bytes(array: np.ndarray) -> bytes | memoryview:
    """Raw content of an array; a view where the array is contiguous already."""
    if datatype_of(array) != "BYTES":
        return np.ascontiguousarray(array).data.cast("B") if array.size else b""
    items = [item.encode() if isinstance(item, str) else bytes(item) for item in array.ravel().tolist()]
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def from_bytes(data: bytes | memoryview, datatype: str, shape: Sequence[int], name: str) -> np.ndarray:
    """An array over raw content, without a copy; BYTES become an object array of ``bytes``.

    :raises ProtocolError: if length, datatype and shape do not fit
    """
    dtype, size = check_header(datatype, shape, name)
    if datatype != "BYTES":
        if len(data) != size * dtype.itemsize:
            raise ProtocolError(f"tensor {name!r}: {len(data)} bytes for {datatype} {list(shape)}")
        if datatype == "BOOL" and (np.frombuffer(data, np.uint8) > 1).any():
            raise ProtocolError(f"tensor {name!r}: a BOOL must be 0 or 1")
        return np.frombuffer(data, dtype).reshape(shape)
    items: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(items) < size:
        (length,) = struct.unpack_from("<I", data, at)
        _check_length(length, name)
        items.append(bytes(data[at + 4 : at + 4 + length]))
        at += 4 + length
    if len(items) != size or at != len(data):
        raise ProtocolError(f"tensor {name!r}: {len(data)} bytes do not hold {size} length-prefixed BYTES")
    return as_objects(items).reshape(shape)


def as_objects(items: Sequence[Any]) -> np.ndarray:
    """An array (N,) of these objects; an array of NumPy's own strings would hold N times the longest."""
    array = np.empty(len(items), object)
    array[:] = items
    return array


def from_json(data: Any, datatype: str, shape: Sequence[int], name: str) -> np.ndarray:
    """An array from a list, flat or nested as the shape says.

    :raises ProtocolError: if elements, datatype and shape do not fit
    """
    dtype, size = check_header(datatype, shape, name)
    if datatype == "FP16":
        raise ProtocolError(f"tensor {name!r} is FP16, which has no JSON form; send it as binary data")
    if not isinstance(data, list):
        raise ProtocolError(f"tensor {name!r}: data must be a list, got {type(data).__name__}")
    items = _flatten(data, shape, size, name)
    kinds = {"O": (str,), "b": (bool,), "f": (int, float)}.get(dtype.kind, (int,))
    for item in items:
        if not isinstance(item, kinds) or (isinstance(item, bool) and datatype != "BOOL"):
            raise ProtocolError(f"tensor {name!r}: {str(item)[:50]!r} is not {datatype}")
    if datatype == "BYTES":
        try:
            strings = [item.encode() for item in items]
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ProtocolError(f"tensor {name!r} is not Unicode text: {error.reason}") from error
        _check_length(max(map(len, strings), default=0), name)
        return as_objects(strings).reshape(shape)
    try:
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            if any(not limits.min <= item <= limits.max for item in items):
                raise OverflowError
        with np.errstate(over="ignore"):
            numbers = np.array(items, dtype)
        if dtype.kind == "f" and not np.isfinite(numbers).all():
            raise OverflowError
    except OverflowError as error:
        raise ProtocolError(f"tensor {name!r}: a number does not fit {datatype}") from error
    return numbers.reshape(shape)


def check_header(datatype: Any, shape: Any, name: str) -> tuple[np.dtype, int]:
    """dtype and number of elements.

    :raises ProtocolError: for an unknown datatype or an impossible shape
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise ProtocolError(
            f"tensor {name!r}: datatype {str(datatype)[:50]!r} is unknown; known are {', '.join(DATATYPES)}"
        )
    whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    # The product without zeros: NumPy refuses (0, 2**62, 2) too.
    if not whole or min(shape, default=0) < 0 or len(shape) > MAX_DIMS or math.prod(filter(None, shape)) > MAX_ELEMENTS:
        raise ProtocolError(f"tensor {name!r}: shape {str(shape)[:100]} must be at most {MAX_DIMS} whole numbers >= 0")
    return DATATYPES[datatype], math.prod(shape)


def _check_length(length: int, name: str) -> None:
    if length > MAX_STRING:
        raise ProtocolError(f"tensor {name!r}: an element of {length} bytes; at most {MAX_STRING} are taken")


def _flatten(data: list[Any], shape: Sequence[int], size: int, name: str) -> list[Any]:
    items: list[Any] = data
    if any(isinstance(item, list) for item in data):
        items = [data]
        for n in shape:
            if not all(isinstance(item, list) and len(item) == n for item in items):
                raise ProtocolError(f"tensor {name!r}: data is neither flat nor nested as {list(shape)} says")
            items = [inner for item in items for inner in item]
    if len(items) != size:
        raise ProtocolError(f"tensor {name!r}: {len(items)} elements where the shape has {size}")
    return items
