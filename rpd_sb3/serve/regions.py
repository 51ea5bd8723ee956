"""The system shared memory extension: regions that clients have registered."""

from __future__ import annotations

import threading
from typing import Any

from rpd_sb3.wire.messages import Place, RegionRequest
from rpd_sb3.wire.shared_memory import Region, attach, maker_is_gone
from rpd_sb3.wire.tensors import ProtocolError

MAX_REGIONS = 256


class UnknownRegion(ProtocolError):
    """The region is not, or no longer, registered here."""


class Regions:
    """Shared memory of clients on this machine, by name."""

    def __init__(self) -> None:
        self._regions: dict[str, tuple[Region, RegionRequest]] = {}
        self._lock = threading.Lock()

    def register(self, name: str, request: RegionRequest) -> None:
        """Map a region.

        :param name: under which inference requests refer to it
        :param request: what is mapped
        :raises ProtocolError: if the name is taken, or too many are registered
        :raises SharedMemoryError: if there is no such shared memory object here
        """
        with self._lock:
            self._forget()
            if name in self._regions:
                raise ProtocolError(f"region {name!r} is registered already; unregister it first")
            if len(self._regions) >= MAX_REGIONS:
                raise ProtocolError(f"{MAX_REGIONS} regions are registered already; unregister some")
            self._regions[name] = (attach(request.key, request.offset, request.byte_size), request)

    def unregister(self, name: str | None) -> None:
        """Forget a region, or all of them; unknown names are not an error, as in Triton."""
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
        return [{"name": key, **request._asdict()} for key, (_, request) in entries if name in (None, key)]

    def get(self, name: str) -> Region:
        """The region of that name.

        :raises UnknownRegion: if there is none
        """
        with self._lock:
            if name not in self._regions:
                raise UnknownRegion(f"shared memory region {name[:100]!r} is not registered")
            return self._regions[name][0]

    def view(self, place: Place, tensor: str) -> memoryview:
        """The bytes where a tensor lies, or goes.

        :param tensor: its name, for errors
        :raises UnknownRegion: if the region is not registered
        :raises ProtocolError: if the place is not inside it
        """
        region = self.get(place.region)
        end = place.offset + place.byte_size
        if end > region.byte_size:
            raise ProtocolError(f"tensor {tensor!r} ends at byte {end} of a region of {region.byte_size}")
        return region.view[place.offset : end]

    def _forget(self) -> None:
        gone = [name for name, (region, request) in self._regions.items() if maker_is_gone(request.key, region)]
        for name in gone:
            del self._regions[name]
