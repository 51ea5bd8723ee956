"""The system shared memory extension: regions that clients have registered."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from rpd_sb3.wire.messages import SharedTensor, whole_number
from rpd_sb3.wire.shared_memory import Region, attach, maker_is_gone
from rpd_sb3.wire.tensors import ProtocolError, from_bytes

MAX_REGIONS = 256


class UnknownRegion(ProtocolError):
    """The region is not, or no longer, registered here."""


class Regions:
    """Shared memory of clients on this machine, by name."""

    def __init__(self) -> None:
        self._regions: dict[str, tuple[Region, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def register(self, name: str, body: Any) -> None:
        """Map a region.

        :param name: under which inference requests refer to it
        :param body: ``{"key": ..., "offset": 0, "byte_size": ...}``
        :raises ProtocolError: if the body is not like that
        :raises SharedMemoryError: if there is no such shared memory object here
        """
        if not isinstance(body, Mapping) or not isinstance(body.get("key"), str):
            raise ProtocolError('expected {"key": "/name", "offset": 0, "byte_size": 1024}')
        offset = whole_number(body, "offset", f"region {name!r}", default=0)
        byte_size = whole_number(body, "byte_size", f"region {name!r}")
        with self._lock:
            self._forget()
            if name in self._regions:
                raise ProtocolError(f"region {name!r} is registered already; unregister it first")
            if len(self._regions) >= MAX_REGIONS:
                raise ProtocolError(f"{MAX_REGIONS} regions are registered already; unregister some")
            region = attach(body["key"], offset, byte_size)
            self._regions[name] = (region, {"key": body["key"], "offset": offset, "byte_size": byte_size})

    def unregister(self, name: str | None) -> None:
        """Forget a region, or all of them; unknown names are no error, as in Triton."""
        with self._lock:
            if name is None:
                self._regions.clear()
            else:
                self._regions.pop(name, None)

    def status(self, name: str | None = None) -> list[dict[str, Any]]:
        """What is registered.

        :raises UnknownRegion: if ``name`` is not
        """
        if name is not None:
            self.get(name)
        with self._lock:
            self._forget()
            entries = list(self._regions.items())
        return [{"name": key, **place} for key, (_, place) in entries if name in (None, key)]

    def get(self, name: str) -> Region:
        """The region of that name.

        :raises UnknownRegion: if there is none
        """
        with self._lock:
            if name not in self._regions:
                raise UnknownRegion(f"shared memory region {name[:100]!r} is not registered")
            return self._regions[name][0]

    def read(self, name: str, tensor: SharedTensor) -> np.ndarray:
        """A tensor, as a view of the region.

        :raises ProtocolError: if it does not lie in it
        """
        region = self.get(tensor.region)
        self._check(name, tensor, region)
        content = region.view[tensor.offset : tensor.offset + tensor.byte_size]
        return from_bytes(content, tensor.datatype, tensor.shape, name)

    def write(self, name: str, place: SharedTensor, content: bytes | memoryview) -> None:
        """Copy an output to its place.

        :raises ProtocolError: if it does not fit there
        """
        region = self.get(place.region)
        self._check(name, place, region)
        if len(content) > place.byte_size:
            raise ProtocolError(f"output {name!r} has {len(content)} bytes, but {place.byte_size} are set aside for it")
        region.view[place.offset : place.offset + len(content)] = content

    def check_place(self, name: str, place: SharedTensor) -> None:
        """Make sure that there is such a place for an output.

        :raises UnknownRegion: if its region is not registered
        :raises ProtocolError: if it does not lie in it
        """
        self._check(name, place, self.get(place.region))

    def _forget(self) -> None:
        gone = [name for name, (region, place) in self._regions.items() if maker_is_gone(place["key"], region)]
        for name in gone:
            del self._regions[name]

    @staticmethod
    def _check(name: str, tensor: SharedTensor, region: Region) -> None:
        end = tensor.offset + tensor.byte_size
        if end > region.byte_size:
            raise ProtocolError(f"tensor {name!r} ends at byte {end} of a region of {region.byte_size}")
