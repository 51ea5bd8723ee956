"""POSIX shared memory of one machine: regions of two processes, and a ring of slots in one of them.

Regions are files of ``/dev/shm`` (Linux), mapped directly: ``multiprocessing.shared_memory`` would have a tracker
process delete them when *either* side exits. The creator unlinks its region as soon as the other side has mapped it,
so that the kernel frees it when the last of both is gone, however they end. Until it ends, the creator holds a lock on
the region, which works across containers, where process numbers do not.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import re
import secrets
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rpd_sb3.wire.messages import Place, SharedTensor
from rpd_sb3.wire.tensors import datatype_of, to_bytes

FOLDER = Path("/dev/shm")
PREFIX = "rpd_sb3-"
ALIGNMENT = 64
GENERATION = np.dtype("<u8")
_KEY = re.compile(r"/?[A-Za-z0-9_.\-]{1,200}\Z")


class SharedMemoryError(ValueError):
    """A region that cannot be made or mapped."""


class StaleGeneration(RuntimeError):
    """The slot was written again before, or while, it was read."""


class Region:
    """Part of a shared memory object, mapped.

    :param fd: of the object; the region keeps a copy
    :param byte_size: to map
    :param offset: in the object
    :raises SharedMemoryError: if the address space is full
    """

    def __init__(self, fd: int, byte_size: int, offset: int = 0) -> None:
        self.byte_size = byte_size
        try:
            self.view = memoryview(mmap.mmap(fd, offset + byte_size))[offset:]
        except OSError as error:
            raise SharedMemoryError(f"{byte_size / 2**20:.0f} MiB cannot be mapped: {error}") from error
        self.fd = os.dup(fd)
        weakref.finalize(self, os.close, self.fd)

    def array(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in the region, not a copy."""
        return np.frombuffer(self.view, dtype, math.prod(shape), offset).reshape(shape)


def create(byte_size: int) -> tuple[str, Region]:
    """Make a region under a new name; only this user may open it.

    :return: its key, and the region
    :raises SharedMemoryError: if there is no shared memory, or not enough
    """
    try:
        key, fd = _new_object()
    except OSError as error:
        raise SharedMemoryError(f"no shared memory here: {error}") from error
    try:
        _reserve(fd, byte_size)
        return key, Region(fd, byte_size)
    except SharedMemoryError:
        unlink(key)
        raise
    finally:
        os.close(fd)


def _reserve(fd: int, byte_size: int, offset: int = 0) -> None:
    """Have the memory before it is used: writing to a sparse file that does not fit kills the process."""
    try:
        os.posix_fallocate(fd, offset, byte_size)
    except OSError as error:
        raise SharedMemoryError(f"no {byte_size / 2**20:.0f} MiB of shared memory: {error}") from error


def _new_object() -> tuple[str, int]:
    while True:
        key = f"/{PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        fd = os.open(FOLDER / key[1:], os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_SH)
        if os.fstat(fd).st_nlink:
            return key, fd
        os.close(fd)  # the sweep() of another process came between these lines


def attach(key: str, offset: int, byte_size: int) -> Region:
    """Map a region that another process of this user has made.

    :param key: its name
    :param offset: where the region begins
    :param byte_size: its length
    :raises SharedMemoryError: if there is none, it is shorter than that, or another user's
    """
    if not _KEY.match(key):
        raise SharedMemoryError(f"{key[:50]!r} is not a name of a shared memory object")
    try:
        fd = os.open(FOLDER / key.lstrip("/"), os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise SharedMemoryError(f"there is no shared memory object {key!r} here: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise SharedMemoryError(f"shared memory object {key!r} belongs to another user")
        if not 0 < byte_size <= status.st_size - offset:
            end = f"{byte_size} from {offset} on" if offset else byte_size
            raise SharedMemoryError(f"shared memory object {key!r} has {status.st_size} bytes, not {end}")
        _reserve(fd, byte_size, offset)
        return Region(fd, byte_size, offset)
    finally:
        os.close(fd)


def unlink(key: str) -> None:
    """Remove the name; the memory goes with the last mapping."""
    (FOLDER / key.lstrip("/")).unlink(missing_ok=True)


def sweep() -> list[str]:
    """Remove regions whose maker was killed between making and unlinking.

    :return: their keys
    """
    removed = []
    for path in FOLDER.glob(f"{PREFIX}*") if FOLDER.is_dir() else ():
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # unlinked meanwhile, or another user's
            continue
        try:
            if os.fstat(fd).st_uid == os.geteuid() and _lock(fd):
                unlink(path.name)
                removed.append(f"/{path.name}")
        finally:
            os.close(fd)
    return removed


def maker_is_gone(key: str, region: Region) -> bool:
    """True if the region, attached here under this key, is one of :func:`create`'s, and that process has ended."""
    gone = key.lstrip("/").startswith(PREFIX) and _lock(region.fd)
    if gone:
        fcntl.flock(region.fd, fcntl.LOCK_UN)
    return gone


def _lock(fd: int) -> bool:
    """Lock the object; False if another process has."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


class Slot(NamedTuple):
    """Part of a ring: a generation counter and room for the tensors of one query."""

    ring: Ring
    offset: int

    def counter(self) -> np.ndarray:
        """The generation, as an array of one."""
        return self.ring.region.array(self.offset, (1,), GENERATION)

    def write(self, arrays: Mapping[str, np.ndarray]) -> tuple[int, dict[str, SharedTensor], dict[str, np.ndarray]]:
        """Copy a query into the slot; a reader of the old one notices by the generation.

        :return: the new generation, where each tensor lies, and arrays over them
        """
        counter = self.counter()
        counter[0] += 1
        at, tensors, views = self.offset + ALIGNMENT, {}, {}
        for name, array in arrays.items():
            content = np.frombuffer(to_bytes(array), np.uint8) if datatype_of(array) == "BYTES" else array
            place = Place(self.ring.name, at, content.nbytes)
            tensors[name] = SharedTensor(place, datatype_of(array), array.shape)
            view = self.ring.region.array(at, content.shape, content.dtype)
            np.copyto(view, content)
            views[name] = array if content is not array else view
            at += padded(content.nbytes)
        return int(counter[0]), tensors, views


class Ring:
    """Slots of equal size in one region, for queries that are on their way at the same time.

    :param n_slots: queries at a time
    :param slot_size: bytes of the largest query, see :func:`query_size`
    :raises SharedMemoryError: if there is no shared memory, or not enough
    """

    def __init__(self, n_slots: int, slot_size: int) -> None:
        sweep()
        self.slot_size = slot_size
        self.key, self.region = create(n_slots * slot_size)
        self.name = self.key.lstrip("/")
        self.n_slots = n_slots
        self.free = [Slot(self, i * slot_size) for i in range(n_slots)]

    @property
    def idle(self) -> bool:
        """True if no query is in any slot."""
        return len(self.free) == self.n_slots


def query_size(arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes that a slot needs for these tensors."""
    contents = [len(to_bytes(a)) if datatype_of(a) == "BYTES" else a.nbytes for a in arrays.values()]
    return ALIGNMENT + sum(padded(n) for n in contents)


def padded(n: int) -> int:
    """``n`` up to the next cache line, so that tensors are aligned."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def check_generation(region: Region, offset: int, generation: int) -> None:
    """Check that a slot still holds the query that was announced.

    :raises StaleGeneration: if it does not
    """
    found = int(region.array(offset, (1,), GENERATION)[0])
    if found != generation:
        raise StaleGeneration(f"the shared memory slot is at generation {found}, but the query was {generation}")
