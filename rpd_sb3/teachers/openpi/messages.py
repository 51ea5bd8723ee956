"""Messages to and from an openpi server: MessagePack with arrays, and images as its policies expect them.

An array is a map of the binary keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``. Source: openpi's
``openpi_client.msgpack_numpy``, version 0.1.2. Only numbers and booleans are read: no objects, no strings, no records,
nothing that is executed.
"""

from __future__ import annotations

import math
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from rpd_sb3.wire.tensors import MAX_DIMS, ProtocolError

DTYPES = {
    order + kind: np.dtype(order + kind)
    for orders, kinds in (("|", "b1 i1 u1"), ("<>", "i2 i4 i8 u2 u4 u8 f2 f4 f8"))
    for order in orders
    for kind in kinds.split()
}
"""``dtype.str`` to dtype: what may be read. NumPy never parses what a server has written."""


def pack(message: Any) -> bytes:
    """A message as bytes.

    :param message: maps with str keys, lists, strings, numbers, None and arrays of numbers or booleans
    :raises TypeError: for anything else
    """
    packed: bytes = msgpack.packb(message, default=_encode)
    return packed


def unpack(data: bytes) -> Any:
    """The message that these bytes are; its arrays are views of the bytes, read only.

    :raises ProtocolError: if they are not MessagePack, or hold an array that is not as it says
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except ProtocolError:
        raise
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        raise ProtocolError(f"not MessagePack: {error or type(error).__name__}") from error


def resize_with_pad(image: np.ndarray, size: int) -> np.ndarray:
    """A square image: scaled until it fits, bilinear, then centred on black, as openpi's clients do before they send.

    Source: openpi's ``image_tools.resize_with_pad``, which follows TensorFlow's function of that name.

    :param image: (H, W, 3) uint8
    :param size: pixels
    :return: (size, size, 3) uint8
    """
    height, width = image.shape[:2]
    if height == width == size:
        return image
    scale = max(height, width) / size
    inner = max(int(height / scale), 1), max(int(width / scale), 1)
    small = Image.fromarray(image).resize(inner[::-1], Image.Resampling.BILINEAR)
    top, left = (size - inner[0]) // 2, (size - inner[1]) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + inner[0], left : left + inner[1]] = np.asarray(small)
    return square


def _encode(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)) or value.dtype.str not in DTYPES:
        kind = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
        raise TypeError(f"{kind} cannot be sent; expected numbers, booleans, text, or arrays of numbers or booleans")
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _decode(content: dict[Any, Any]) -> Any:
    if b"__ndarray__" in content:
        return _array(content.get(b"data"), _dtype(content), content.get(b"shape"))
    if b"__npgeneric__" in content:
        return _dtype(content).type(content.get(b"data"))
    return content


def _dtype(content: dict[Any, Any]) -> np.dtype:
    name = content.get(b"dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise ProtocolError(f"arrays of dtype {str(name)[:50]!r} are not read; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def _array(data: Any, dtype: np.dtype, shape: Any) -> np.ndarray:
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in shape)
    if not whole or len(shape) > MAX_DIMS or min(shape, default=0) < 0:
        raise ProtocolError(f"shape {str(shape)[:100]} must be at most {MAX_DIMS} whole numbers >= 0")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise ProtocolError(f"{size} for an array of {dtype} and shape {shape}")
    if dtype.kind == "b" and any(np.frombuffer(data, np.uint8) > 1):
        raise ProtocolError("a boolean must be 0 or 1")
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # (0, 2**62, 2): NumPy refuses it although there is nothing in it
        raise ProtocolError(f"shape {shape} is too large") from error
