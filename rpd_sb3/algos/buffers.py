"""SB3's rollout buffers without their copies and with teacher labels, a store of past labels, and what the losses see.

Shape letters: T steps, E environments, B minibatch.
"""

from __future__ import annotations

import zipfile
from typing import IO, Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from rpd_sb3.contract.teacher import INFO_PREFIX

Observation = np.ndarray | dict[str, np.ndarray]
CHUNK = 64
"""Pairs that the label replay copies at a time."""
READ_BYTES = 2**22
"""Bytes that the label replay reads from a file at a time."""


class LabelledSamples(NamedTuple):
    """A minibatch of SB3's rollout buffer with the teacher's labels."""

    observations: th.Tensor | TensorDict
    actions: th.Tensor
    old_values: th.Tensor
    old_log_prob: th.Tensor
    advantages: th.Tensor
    returns: th.Tensor
    labels: dict[str, th.Tensor]
    """Label name to ``(B, ...)``; zero where there is no label."""
    labelled: th.Tensor
    """``(B,)`` bool: True where the teacher has answered."""
    replayed: bool = False
    """True for pairs of the label replay: values, log_prob, advantages and returns of the rollout are empty."""


class Student(NamedTuple):
    """The student on a minibatch, with gradients."""

    distribution: Distribution
    """Action distribution of the B observations."""
    values: th.Tensor
    """``(B,)``; empty for pairs of the label replay."""
    log_prob: th.Tensor
    """``(B,)`` of the actions that were taken; empty for pairs of the label replay."""
    entropy: th.Tensor | None
    """``(B,)``; None if it has no closed form."""


class Imitation(NamedTuple):
    """What to imitate, and how the student would act there."""

    distribution: Distribution
    """The student's action distribution of n observations."""
    labels: dict[str, th.Tensor]
    """Label name to ``(n, ...)``"""
    labelled: th.Tensor
    """``(n,)`` bool: True where the teacher has answered."""


class _CompactMixin:
    """Keeps observations environment by environment, in one place for all rollouts.

    SB3's buffers flatten ``(T, E, ...)`` environment by environment before an update, which copies all observations, so
    that a rollout of images needs its memory twice; here that is a view of what is there.
    """

    buffer_size: int
    n_envs: int
    obs_shape: Any
    observation_space: spaces.Space

    def reset(self) -> None:
        shapes: dict[str | None, tuple[int, ...]]
        wanted = self.obs_shape
        shapes = wanted if isinstance(wanted, dict) else {None: wanted}
        if not hasattr(self, "_stores"):
            rows, space = (self.n_envs, self.buffer_size), self.observation_space
            dtypes = {key: (space if key is None else space[key]).dtype for key in shapes}  # type: ignore[index]
            self._stores = {key: np.zeros((*rows, *shape), dtypes[key]) for key, shape in shapes.items()}
        self.obs_shape = {} if isinstance(wanted, dict) else (0,)  # SB3 makes its observations anew: let them be empty
        super().reset()  # type: ignore[misc]
        self.obs_shape = wanted
        views = {key: store.swapaxes(0, 1) for key, store in self._stores.items()}
        self.observations = views if isinstance(wanted, dict) else views[None]


class CompactRolloutBuffer(_CompactMixin, RolloutBuffer):  # type: ignore[misc]
    """:class:`RolloutBuffer` that an update does not copy."""


class CompactDictRolloutBuffer(_CompactMixin, DictRolloutBuffer):  # type: ignore[misc]
    """:class:`DictRolloutBuffer` that an update does not copy."""


def use_compact_buffer(model: Any) -> None:
    """Exchange SB3's own rollout buffer for one that an update does not copy; what the model learns and saves stays.

    :param model: one that has just been made or loaded; any but PPO, TRPO and the like stay as they are
    """
    classes: dict[Any, Any] = {RolloutBuffer: CompactRolloutBuffer, DictRolloutBuffer: CompactDictRolloutBuffer}
    old: Any = getattr(model, "rollout_buffer", None)
    if type(old) not in classes:
        return
    compact = classes[type(old)]
    size, spaces_of = old.buffer_size, (old.observation_space, old.action_space)
    others = {name: getattr(old, name) for name in ("device", "gae_lambda", "gamma", "n_envs")}
    model.rollout_buffer = old = None  # frees its memory before there is another one
    model.rollout_buffer = compact(size, *spaces_of, **others)


class _LabelsMixin:
    """Stores for each transition what the teacher said about it; the label of step t is added with step t."""

    buffer_size: int
    n_envs: int

    def reset(self) -> None:
        self._infos: list[list[dict[str, Any]]] = []
        self.labels: dict[str, np.ndarray] = {}
        self.labelled = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        super().reset()  # type: ignore[misc]

    def add_labels(self, infos: list[dict[str, Any]], names: frozenset[str]) -> None:
        """Remember the labels of one step; values may still be on their way.

        :param infos: E info dicts of the step, with ``teacher_<name>`` where a label was asked for
        :param names: labels to keep
        """
        self._infos.append(
            [{name: info[key] for name in names if (key := INFO_PREFIX + name) in info} for info in infos]
        )

    def gather_labels(self, names: frozenset[str]) -> float:
        """Wait for all labels of the rollout and turn them into arrays ``labels[name]`` (T, E, ...).

        :param names: labels to gather
        :return: share of labels that were asked for and did not come
        :raises TeacherError: passed on from the teacher
        """
        assert len(self._infos) == self.buffer_size, "labels and transitions are out of step"
        asked = 0
        for step, row in enumerate(self._infos):
            for env, entry in enumerate(row):
                if not entry:
                    continue
                asked += 1
                values = {name: np.asarray(entry[name], dtype=np.float32) for name in names}
                # A skipped label is NaN; a teacher's own NaN is an error before this.
                came = not any(np.isnan(value).any() for value in values.values())
                self.labelled[step, env] = came
                for name, value in values.items() if came else ():
                    if name not in self.labels:
                        self.labels[name] = np.zeros((self.buffer_size, self.n_envs, *value.shape), np.float32)
                    self.labels[name][step, env] = value
        self._infos = []
        return 1.0 - int(self.labelled.sum()) / asked if asked else 0.0

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> LabelledSamples:
        samples: Any = super()._get_samples(batch_inds, env)  # type: ignore[misc]
        env_inds, step_inds = np.divmod(batch_inds, self.buffer_size)  # SB3 flattens environment by environment
        at = (step_inds, env_inds)
        to_torch = self.to_torch  # type: ignore[attr-defined]
        labels = {name: to_torch(values[at]) for name, values in self.labels.items()}
        return LabelledSamples(*samples, labels, to_torch(self.labelled[at]))  # type: ignore[call-arg]


class LabelledRolloutBuffer(_LabelsMixin, CompactRolloutBuffer):  # type: ignore[misc]
    """:class:`CompactRolloutBuffer` with teacher labels."""


class LabelledDictRolloutBuffer(_LabelsMixin, CompactDictRolloutBuffer):  # type: ignore[misc]
    """:class:`CompactDictRolloutBuffer` with teacher labels."""


class LabelReplay:
    """The last ``capacity`` (observation, label) pairs: labels do not depend on the student, so they stay valid.

    Dataset aggregation as in DAgger (Ross et al., 2011), for the imitation term only.

    :param capacity: number of pairs to keep
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._arrays: dict[str, np.ndarray] = {}

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
        rows = (self._next + np.arange(n)[-self.capacity :]) % self.capacity
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = np.zeros((self.capacity, *values.shape[where.ndim :]), values.dtype)
            for start in range(0, len(rows), CHUNK):
                part = slice(start, start + CHUNK)
                self._arrays[name][rows[part]] = values[tuple(index[part] for index in found)]
        self._next = (self._next + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, n: int) -> tuple[Observation, dict[str, np.ndarray]]:
        """Draw n pairs uniformly, with replacement.

        :param n: number of pairs
        :return: observations and labels, first dimension n
        """
        rows = np.random.randint(self.size, size=n)  # noqa: NPY002  (SB3 seeds the global generator)
        observations = {k[4:]: v[rows] for k, v in self._arrays.items() if k.startswith("obs/")}
        labels = {k[6:]: v[rows] for k, v in self._arrays.items() if k.startswith("label/")}
        return observations.get("", observations), labels

    def save(self, path: str) -> None:
        """Write all pairs to an ``.npz`` file."""
        columns: dict[str, Any] = {name: values[: self.size] for name, values in self._arrays.items()}
        np.savez(path, next=self._next, **columns)

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
                    array = arrays[entry.removesuffix(".npy")] = np.zeros((self.capacity, *shape[1:]), dtype)
                    _read_into(array[:n], stream, path)
        self._arrays = arrays
        self.size, self._next = n, (start if n == self.capacity else n)


def _read_header(stream: IO[bytes], path: str) -> tuple[tuple[int, ...], np.dtype]:
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran_order, dtype = read[np.lib.format.read_magic(stream)](stream)
    if fortran_order or dtype.hasobject or not shape:
        raise ValueError(f"label replay {path!r} was not written by LabelReplay.save")
    return shape, dtype


def _read_into(rows: np.ndarray, stream: IO[bytes], path: str) -> None:
    """Fill rows with what follows, in parts: ``np.load`` would make an array of its own first."""
    memory = rows.reshape(-1).view(np.uint8)
    for start in range(0, memory.size, READ_BYTES):
        part = memory[start : start + READ_BYTES]
        data = stream.read(part.size)
        if len(data) < part.size:
            raise ValueError(f"label replay {path!r} ends too early; it is damaged")
        part[:] = np.frombuffer(data, np.uint8)
