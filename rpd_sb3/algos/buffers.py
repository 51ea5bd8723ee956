"""SB3's rollout buffers without their copies and with teacher labels, and what the losses see.

Shape letters: T steps, E environments, B minibatch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.type_aliases import TensorDict
from stable_baselines3.common.vec_env import VecNormalize

from rpd_sb3.contract.teacher import EXECUTED_ACTION, INFO_PREFIX, TEACHER_ACTED


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
    teacher_acted: th.Tensor
    """``(B,)`` bool: True where ``actions`` are the teacher's: nothing there is known of the student's return."""
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
    """Stores for each transition what the teacher said and did; the label of step t is added with step t."""

    buffer_size: int
    n_envs: int
    gamma: float
    actions: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray
    episode_starts: np.ndarray

    def reset(self) -> None:
        self._infos: list[list[dict[str, Any]]] = []
        self._executed: list[tuple[int, int, np.ndarray]] = []
        self.teacher_acted = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        self.labels: dict[str, np.ndarray] = {}
        self.labelled = np.zeros((self.buffer_size, self.n_envs), dtype=bool)
        super().reset()  # type: ignore[misc]

    def add_labels(self, infos: list[dict[str, Any]], names: frozenset[str]) -> None:
        """Remember the labels of one step, whose values may still be on their way, and where the teacher acted.

        :param infos: E info dicts of the step, with ``teacher_<name>`` where a label was asked for
        :param names: labels to keep
        """
        step = len(self._infos)
        for env, info in enumerate(infos):
            if info.get(TEACHER_ACTED, False):
                self.teacher_acted[step, env] = True
                self._executed.append((step, env, info[EXECUTED_ACTION]))
        self._infos.append(
            [{name: info[key] for name in names if (key := INFO_PREFIX + name) in info} for info in infos]
        )

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: np.ndarray) -> None:
        """As SB3 does it for the student's transitions; a take-over ends their lambda-return with the value there.

        Where the teacher acted, the advantage is 0 and the return is the value: its rewards are not the student's.
        """
        rewards, starts = self.rewards, self.episode_starts
        if self.teacher_acted.any():
            taken = np.zeros_like(self.teacher_acted)  # the teacher acts at the next step of the same episode
            taken[:-1] = self.teacher_acted[1:] & (starts[1:] == 0)
            self.rewards, self.episode_starts = rewards.copy(), starts.copy()
            self.rewards[:-1] += self.gamma * self.values[1:] * taken[:-1]
            self.episode_starts[1:] += taken[:-1]
        super().compute_returns_and_advantage(last_values, dones)  # type: ignore[misc]
        self.rewards, self.episode_starts = rewards, starts
        self.advantages[self.teacher_acted] = 0.0
        self.returns[self.teacher_acted] = self.values[self.teacher_acted]

    def gather_labels(self, names: frozenset[str]) -> float:
        """Wait for all labels of the rollout and turn them into arrays ``labels[name]`` (T, E, ...).

        The actions become those that were executed.

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
        for step, env, action in self._executed:
            self.actions[step, env] = np.reshape(action, -1)
        return 1.0 - int(self.labelled.sum()) / asked if asked else 0.0

    def _get_samples(self, batch_inds: np.ndarray, env: VecNormalize | None = None) -> LabelledSamples:
        samples: Any = super()._get_samples(batch_inds, env)  # type: ignore[misc]
        env_inds, step_inds = np.divmod(batch_inds, self.buffer_size)  # SB3 flattens environment by environment
        at = (step_inds, env_inds)
        to_torch = self.to_torch  # type: ignore[attr-defined]
        labels = {name: to_torch(values[at]) for name, values in self.labels.items()}
        return LabelledSamples(*samples, labels, to_torch(self.labelled[at]), to_torch(self.teacher_acted[at]))  # type: ignore[call-arg]


class LabelledRolloutBuffer(_LabelsMixin, CompactRolloutBuffer):  # type: ignore[misc]
    """:class:`CompactRolloutBuffer` with teacher labels."""


class LabelledDictRolloutBuffer(_LabelsMixin, CompactDictRolloutBuffer):  # type: ignore[misc]
    """:class:`CompactDictRolloutBuffer` with teacher labels."""
