"""SB3's rollout buffers plus teacher labels, a store of past labels, and what the losses see of them.

Shape letters: T steps, E environments, B minibatch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

Observation = np.ndarray | dict[str, np.ndarray]


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


class Student(NamedTuple):
    """The student on a minibatch, with gradients."""

    distribution: Distribution
    """Action distribution of the B observations."""
    values: th.Tensor
    """``(B,)``"""
    log_prob: th.Tensor
    """``(B,)`` of the actions that were taken."""
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
            [{name: info[key] for name in names if (key := f"teacher_{name}") in info} for info in infos]
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
                for name, value in values.items():
                    if name not in self.labels:
                        self.labels[name] = np.zeros((self.buffer_size, self.n_envs, *value.shape), np.float32)
                    if came:
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


class LabelledRolloutBuffer(_LabelsMixin, RolloutBuffer):  # type: ignore[misc]
    """:class:`RolloutBuffer` with teacher labels."""


class LabelledDictRolloutBuffer(_LabelsMixin, DictRolloutBuffer):  # type: ignore[misc]
    """:class:`DictRolloutBuffer` with teacher labels."""


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

    def extend(self, observations: Observation, labels: dict[str, np.ndarray]) -> None:
        """Append n pairs; the oldest make room.

        :param observations: ``(n, ...)``, or a dict of such arrays
        :param labels: label name to ``(n, ...)``
        """
        if not isinstance(observations, dict):
            observations = {"": observations}
        columns = {f"obs/{k}": v for k, v in observations.items()} | {f"label/{k}": v for k, v in labels.items()}
        n = len(next(iter(columns.values())))
        rows = (self._next + np.arange(n)[-self.capacity :]) % self.capacity
        for name, values in columns.items():
            if name not in self._arrays:
                self._arrays[name] = np.zeros((self.capacity, *values.shape[1:]), values.dtype)
            self._arrays[name][rows] = values[-self.capacity :]
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
            columns = {k: file[k] for k in file.files if k != "next"}
            start = int(file["next"])
        n = len(next(iter(columns.values()))) if columns else 0
        if n > self.capacity:
            raise ValueError(f"label replay {path!r} holds {n} pairs, but label_replay={self.capacity}")
        for name, values in columns.items():
            self._arrays[name] = np.zeros((self.capacity, *values.shape[1:]), values.dtype)
            self._arrays[name][:n] = values
        self.size, self._next = n, (start if n == self.capacity else n)
