"""Observations of N environments in one anonymous block of memory that several processes map."""

from __future__ import annotations

import math
import mmap
import os
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

ALIGNMENT = 64
Rows = dict[Any, np.ndarray]
"""SB3's key of each part of an observation (None if there is but one) to an array of N rows."""


class ObservationBlock(NamedTuple):
    """Where the environments' processes write their observations, and the parent reads them.

    The memory has no name, so nothing is left behind by processes that are killed, and the size of ``/dev/shm`` does not
    matter. Nobody locks it: a worker writes between a command and its answer, the parent reads after the answer.
    """

    space: spaces.Space
    current: Rows
    terminal: Rows
    """Last observations of the episodes that ended in this step; other rows mean nothing."""

    def read_current(self) -> VecEnvObs:
        """A copy of all current observations, as SB3's VecEnvs give them."""
        return dict_to_obs(self.space, {key: values.copy() for key, values in self.current.items()})

    def read_terminal(self, env: int) -> VecEnvObs:
        """A copy of the terminal observation of one environment."""
        return dict_to_obs(self.space, {key: values[env].copy() for key, values in self.terminal.items()})


def make_memory(space: spaces.Space, n_envs: int) -> int:
    """A descriptor of empty memory for :func:`map_block`.

    :param space: of one environment's observation
    :param n_envs: N
    """
    memory = os.memfd_create("rpd_sb3-observations")
    os.truncate(memory, _plan(space, n_envs)[1])
    return memory


def map_block(memory: int, space: spaces.Space, n_envs: int) -> ObservationBlock:
    """The block in this process.

    :param memory: descriptor of :func:`make_memory` for the same space and number; may be closed afterwards
    :param space: of one environment's observation
    :param n_envs: N
    """
    arrays, size = _plan(space, n_envs)
    mapped = mmap.mmap(memory, size)
    halves: tuple[Rows, Rows] = ({}, {})
    for half, key, shape, dtype, offset in arrays:
        halves[half][key] = np.ndarray(shape, dtype, mapped, offset)
    return ObservationBlock(space, *halves)


def _plan(space: spaces.Space, n_envs: int) -> tuple[list[tuple[int, Any, tuple[int, ...], np.dtype, int]], int]:
    """(half, key, shape, dtype, offset) of all arrays, and the bytes that they need."""
    keys, shapes, dtypes = obs_space_info(space)
    arrays, size = [], 0
    for half in (0, 1):
        for key in keys:
            shape, dtype = (n_envs, *shapes[key]), np.dtype(dtypes[key])
            arrays.append((half, key, shape, dtype, size))
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    return arrays, max(size, 1)


class SharedDummyVecEnv(DummyVecEnv):
    """A DummyVecEnv that writes observations into its rows of a block, once, instead of returning them.

    ``terminal_observation`` goes there too, and out of the infos.
    """

    def share(self, block: ObservationBlock, first_row: int) -> None:
        """Write from now on into as many rows of the block as there are environments.

        :param block: of observations like ours
        :param first_row: of our first environment
        """
        rows = slice(first_row, first_row + self.num_envs)
        self.buf_obs = {key: values[rows] for key, values in block.current.items()}  # type: ignore[assignment]
        self._terminal = {key: values[rows] for key, values in block.terminal.items()}

    def step_wait(self) -> VecEnvStepReturn:
        obs, rewards, dones, infos = super().step_wait()
        for env, info in enumerate(infos):
            terminal = info.pop("terminal_observation", None)
            if dones[env]:
                for key in self.keys:
                    self._terminal[key][env] = terminal if key is None else terminal[key]
        return obs, rewards, dones, infos

    def _obs_from_buf(self) -> Any:
        return None
