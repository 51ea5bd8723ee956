"""A store of past labels and their observations, on the device where they fit. Shape letters: T steps, E environments."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.type_aliases import TensorDict

T = TypeVar("T")
Observation = np.ndarray | dict[str, np.ndarray]
CHUNK = 64
"""Pairs that are copied, written or read at a time."""
USABLE = 0.8
"""Share of a device's free memory that a replay may take: networks, gradients and rollouts need some too."""
PATIENCE = 60.0
"""Seconds that a batch may take to come from the host's memory."""
GIB = 2**30
DEVICES = ("auto", "cuda", "cpu")
"""What :func:`choose_device` chooses by."""


class Pairs(NamedTuple):
    """A batch of the label replay."""

    observations: th.Tensor | TensorDict
    """``(n, ...)``, in the data type in which the environments gave them."""
    labels: dict[str, th.Tensor]
    """Label name to ``(n, ...)``"""


class LabelReplay:
    """The last ``capacity`` (observation, label) pairs: labels do not depend on the student, so they stay valid.

    Dataset aggregation as in DAgger (Ross et al., 2011), for the imitation term only. In the host's memory, pages are taken
    only as pairs come.

    :param capacity: number of pairs to keep
    :param device: where they lie
    """

    def __init__(self, capacity: int, device: th.device | str = "cpu") -> None:
        self.capacity = capacity
        self.device = th.device(device)
        self.size = 0
        self._next = 0
        self._arrays: dict[str, th.Tensor] = {}

    def extend(self, observations: Observation, labels: dict[str, np.ndarray], where: np.ndarray | None = None) -> None:
        """Append n pairs; the oldest make room. Nothing of their size is allocated on the way.

        :param observations: ``(n, ...)``, or a dict of such arrays; with ``where`` ``(T, E, ...)``
        :param labels: label name to ``(n, ...)`` or ``(T, E, ...)``
        :param where: ``(T, E)`` bool, True n times: the pairs to append, step by step; None: all
        """
        if not isinstance(observations, dict):
            observations = {"": observations}
        columns = {f"obs/{k}": v for k, v in observations.items()} | {f"label/{k}": v for k, v in labels.items()}
        if where is None:
            where = np.ones(len(next(iter(columns.values()))), bool)
        found = np.nonzero(where)
        n = len(found[0])
        found = tuple(index[-self.capacity :] for index in found)
        rows = th.from_numpy((self._next + np.arange(n)[-self.capacity :]) % self.capacity).to(self.device)
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = self._empty(values.shape[where.ndim :], values.dtype)
            for start in range(0, len(rows), CHUNK):
                part = slice(start, start + CHUNK)
                chunk = th.from_numpy(values[tuple(index[part] for index in found)])
                self._arrays[name].index_copy_(0, rows[part], chunk.to(self.device))
        self._next = (self._next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, n: int, device: th.device | None = None) -> Pairs:
        """Draw n pairs uniformly, with replacement.

        :param n: number of pairs
        :param device: where they are to lie; None: the replay's
        """
        rows = self._draw(n)
        return _pairs({name: _gathered(values, rows).to(device) for name, values in self._arrays.items()})

    def batches(self, n_batches: int, n: int, device: th.device) -> Iterator[Pairs]:
        """Draw n pairs ``n_batches`` times, as :meth:`sample` would.

        From the host's memory to another device, the next batch is gathered and on its way while this one is in use.

        :param n_batches: how often
        :param n: number of pairs
        :param device: where the batches are to lie
        """
        if device == self.device:
            return (self.sample(n) for _ in range(n_batches))
        transfer = _Transfer(self._arrays, n, device)
        fetched = prefetched(lambda: transfer.start(self._draw(n)), n_batches)
        return (_pairs(transfer.finish(batch)) for batch in fetched)

    def save(self, path: str) -> None:
        """Write all pairs to an ``.npz`` file."""
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            for name, values in {"next": th.tensor(self._next), **self._arrays}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    filled = values if name == "next" else values[: self.size]
                    descr = np.lib.format.dtype_to_descr(values.new_empty(0).numpy(force=True).dtype)
                    header = {"descr": descr, "fortran_order": False, "shape": tuple(filled.shape)}
                    np.lib.format.write_array_header_1_0(stream, header)
                    for part in filled.reshape(-1, *values.shape[1:]).split(CHUNK):
                        stream.write(part.numpy(force=True).tobytes())

    def load(self, path: str) -> None:
        """Take all pairs from a file written by :meth:`save` with the same capacity.

        :raises ValueError: if the file holds more pairs than fit
        """
        with np.load(path, allow_pickle=False) as file:
            start = int(file["next"])
        n, arrays = 0, {}
        with zipfile.ZipFile(path) as archive:
            for entry in set(archive.namelist()) - {"next.npy"}:
                with archive.open(entry) as stream:
                    shape, dtype = _read_header(stream, path)
                    if (n := shape[0]) > self.capacity:
                        raise ValueError(f"label replay {path!r} holds {n} pairs, but label_replay={self.capacity}")
                    array = arrays[entry.removesuffix(".npy")] = self._empty(shape[1:], dtype)
                    _read_into(array[:n], stream, dtype, path)
        self._arrays = arrays
        self.size, self._next = n, (start if n == self.capacity else n)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype) -> th.Tensor:
        rows = (self.capacity, *shape)
        if self.device.type == "cpu":
            return th.from_numpy(np.empty(rows, dtype))
        return th.empty(rows, dtype=th.from_numpy(np.empty(0, dtype)).dtype, device=self.device)

    def _draw(self, n: int) -> np.ndarray:
        return np.random.randint(self.size, size=n)  # noqa: NPY002  (SB3 seeds the global generator)


def _pairs(columns: dict[str, th.Tensor]) -> Pairs:
    observations = {k[4:]: v for k, v in columns.items() if k.startswith("obs/")}
    labels = {k[6:]: v for k, v in columns.items() if k.startswith("label/")}
    return Pairs(observations.get("", observations), labels)


def _gathered(values: th.Tensor, rows: np.ndarray) -> th.Tensor:
    """The rows, in new memory. On the host NumPy's one thread is faster and steadier than PyTorch's several."""
    if values.device.type == "cpu":
        return th.from_numpy(values.numpy()[rows])
    return values.index_select(0, th.from_numpy(rows).to(values.device))


def prefetched(make: Callable[[], T], n: int) -> Iterator[T]:
    """What ``make`` returns n times, in that order; a thread makes the next one while this one is in use.

    :param make: called by one thread at a time
    :param n: number of calls
    """
    with ThreadPoolExecutor(1, "label-replay") as pool:
        futures = [pool.submit(make)] if n > 0 else []
        for i in range(n):
            ready = futures.pop().result(timeout=PATIENCE)
            if i + 1 < n:
                futures.append(pool.submit(make))
            yield ready


class _Transfer:
    """Batches on their way from the host's memory to a device, through two pinned buffers and a stream of their own.

    :param arrays: of the replay, in the host's memory
    :param n: pairs of a batch
    :param device: where to
    """

    def __init__(self, arrays: dict[str, th.Tensor], n: int, device: th.device) -> None:
        self.arrays = arrays
        self.device = device
        self._cuda = device.type == "cuda"
        self._stream = th.cuda.Stream(device) if self._cuda else None
        self._buffers = [
            {name: th.empty((n, *v.shape[1:]), dtype=v.dtype, pin_memory=self._cuda) for name, v in arrays.items()}
            for _ in range(2)
        ]
        self._copied: list[Any] = [None, None]
        """The end of the last copy out of each buffer."""

    def start(self, rows: np.ndarray) -> tuple[dict[str, th.Tensor], Any]:
        """Gather rows and send them.

        :param rows: of the replay
        :return: for :meth:`finish`
        """
        buffer, copied = self._buffers.pop(0), self._copied.pop(0)
        if copied is not None:
            copied.synchronize()
        for name, values in self.arrays.items():
            np.take(values.numpy(), rows, axis=0, out=buffer[name].numpy(), mode="clip")  # other modes need a copy
        with th.cuda.stream(self._stream):
            batch = {name: v.to(self.device, non_blocking=True) for name, v in buffer.items()}
            copied = self._stream.record_event() if self._stream is not None else None
        self._buffers.append(buffer)
        self._copied.append(copied)
        return batch, copied

    def finish(self, sent: tuple[dict[str, th.Tensor], Any]) -> dict[str, th.Tensor]:
        """The batch, for use on the device's current stream."""
        batch, copied = sent
        if copied is not None:
            current = th.cuda.current_stream(self.device)
            current.wait_event(copied)
            for values in batch.values():  # its memory belongs to the other stream, which must not reuse it too early
                values.record_stream(current)
        return batch


def pair_bytes(observation_space: spaces.Space, action_space: spaces.Space, labels: Iterable[str]) -> int:
    """What one pair takes: the observation, what the student did, and the labels.

    :param observation_space: of the student
    :param action_space: of the student
    :param labels: names; ``action`` and ``std`` are of an action's shape, ``logits`` of its bins, all others are numbers
    """
    numbers = {"action": _size(action_space), "std": _size(action_space)}
    if isinstance(action_space, spaces.MultiDiscrete):
        numbers["logits"] = action_space.nvec.size * int(action_space.nvec.max())
    label_bytes = sum(numbers.get(name, 1) for name in labels) * np.dtype(np.float32).itemsize
    return _bytes(observation_space) + _bytes(action_space) + label_bytes


def _size(space: spaces.Space) -> int:
    return math.prod(space.shape or ())


def _bytes(space: spaces.Space) -> int:
    if isinstance(space, spaces.Dict):
        return sum(_bytes(part) for part in space.values())
    return _size(space) * np.dtype(space.dtype).itemsize


def choose_device(wanted: str, model_device: th.device, n_bytes: int) -> th.device:
    """Where a replay lies: ``auto`` is the model's device if it fits there, else the host.

    :param wanted: one of :data:`DEVICES`
    :param model_device: of the student
    :param n_bytes: of the full replay
    """
    if wanted == "cpu" or model_device.type != "cuda" and wanted == "auto":
        return th.device("cpu")
    if wanted == "auto" and n_bytes > USABLE * (free_bytes(model_device) or 0):
        return th.device("cpu")
    return model_device if model_device.type == "cuda" else th.device("cuda")


def check_fits(who: str, capacity: int, bytes_per_pair: int, device: th.device, model_device: th.device) -> None:
    """Check that a replay that is still empty has room.

    :param who: name of the algorithm
    :param capacity: pairs
    :param bytes_per_pair: of :func:`pair_bytes`
    :param device: of the replay
    :param model_device: of the student
    :raises ValueError: if not
    """
    if device.type == "cuda" and model_device.type != "cuda":
        raise ValueError(f"{who}: replay_device='cuda' needs the student there too, but it is on {model_device}")
    free = free_bytes(device)
    if free is not None and capacity * bytes_per_pair > USABLE * free:
        raise ValueError(
            f"{who}: label_replay={capacity} needs {capacity * bytes_per_pair / GIB:.2f} GiB on {device}, of whose "
            f"{free / GIB:.2f} GiB of free memory it may take {USABLE:.0%}; use label_replay={int(USABLE * free / bytes_per_pair)}"
        )


def free_bytes(device: th.device) -> int | None:
    """Memory of a device that can still be had; on the host, within the limits of the container. None: not known.

    :param device: ``cpu`` or a CUDA device
    """
    if device.type == "cuda":
        return th.cuda.mem_get_info(device)[0]
    return _least([_available_bytes(), _container_bytes("/sys/fs/cgroup")])


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _available_bytes() -> int | None:
    """Memory that the kernel could give without swapping."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_bytes(root: str) -> int | None:
    """What the memory limit of this control group (version 2 or 1) leaves."""
    versions = (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    )
    for limit, usage, stat, cached in versions:
        try:
            allowed, used = (Path(root, name).read_text().strip() for name in (limit, usage))
            lines = dict(line.split() for line in Path(root, stat).read_text().splitlines())
        except OSError:
            continue
        # Files that were read lately count as used, and make room at once.
        return None if allowed == "max" else int(allowed) - int(used) + int(lines.get(cached, 0))
    return None


def _read_header(stream: IO[bytes], path: str) -> tuple[tuple[int, ...], np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = read[np.lib.format.read_magic(stream)](stream)
    if fortran_order or dtype.hasobject or not shape:
        raise ValueError(f"label replay {path!r} was not written by LabelReplay.save")
    return shape, dtype


def _read_into(rows: th.Tensor, stream: IO[bytes], dtype: np.dtype, path: str) -> None:
    """Fill rows with what follows, in parts: ``np.load`` would make an array of its own first."""
    for part in rows.split(CHUNK) if len(rows) else ():
        data = stream.read(part.numel() * dtype.itemsize)
        if len(data) < part.numel() * dtype.itemsize:
            raise ValueError(f"label replay {path!r} ends too early; it is damaged")
        part.copy_(th.from_numpy(np.frombuffer(bytearray(data), dtype).reshape(part.shape)))
