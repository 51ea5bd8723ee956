"""WorkerPoolVecEnv: many environments in a few worker processes, which write observations into memory that all share.

Shape letter: N environments.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from copy import copy
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    CloudpickleWrapper,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)
from stable_baselines3.common.vec_env.util import dict_to_obs, obs_space_info

from rpd_sb3.contract.cores import n_cores

PRELOAD = ["rpd_sb3.envs.factory", "rpd_sb3.envs.maniskill"]
"""Modules that the fork server imports once for all workers; one that is not installed is left out."""
CLOSE_TIMEOUT = 10.0
"""Seconds that the workers get to close before they are terminated."""
ALIGNMENT = 64
"""Each array in the shared memory begins at a multiple of this many bytes."""
Rows = dict[Any, np.ndarray]
"""SB3's key of each part of an observation (None if there is only one) to an array of N rows."""


class PendingRows(NamedTuple):
    """A step of some environments that is being made."""

    rows: np.ndarray
    """(n,) environments, those of one worker after those of another."""
    commands: list[tuple[int, int]]
    """Workers that make it, and the number of the command that each has got."""


class WorkerPoolVecEnv(VecEnv):
    """Steps N environments in as many worker processes as there are cores, each with an equal share of them.

    SB3's SubprocVecEnv starts one process for each environment; with more environments than cores that costs memory,
    start-up time and, for environments of about 2 ms per step, a third of the throughput. An exception in an
    environment arrives here with its traceback, and a worker that dies is an error, not a wait.
    Observations, terminal ones too, lie in memory that all processes share; everything else is pickled.

    Some environments can be stepped while others wait for their actions: :meth:`step_rows_async`. The workers make such
    steps in the order in which they get them.

    :param env_fns: one function for each environment
    :param n_workers: number of processes; None: one per core that this process may use, at most N
    :raises RuntimeError: if an environment cannot be made
    :raises ValueError: if the environments show different things
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], n_workers: int | None = None) -> None:
        self.closed = False
        n_workers = min(len(env_fns), n_workers or n_cores())
        self._rows = np.array_split(np.arange(len(env_fns)), n_workers)
        # The fork server imports the simulator once; its children start in milliseconds and share the memory.
        mp.set_forkserver_preload(PRELOAD)
        context = mp.get_context("forkserver")
        self._remotes: list[Connection] = []
        self._processes = []
        self._sent = [0] * n_workers  # commands so far: a worker's answer carries the number of its command
        self._received = [-1] * n_workers  # number of the last answer
        for rows in self._rows:
            remote, worker_remote = context.Pipe()
            fns = CloudpickleWrapper([env_fns[i] for i in rows])
            process = context.Process(target=_work, args=(worker_remote, fns), daemon=True)
            process.start()
            worker_remote.close()
            self._remotes.append(remote)
            self._processes.append(process)
        try:
            of_workers = [self._receive(worker) for worker in range(n_workers)]
            super().__init__(len(env_fns), *of_workers[0])
            self._share([obs_space for obs_space, _ in of_workers])
        except BaseException:
            self.close()
            raise

    def _share(self, obs_spaces: Sequence[gym.Space]) -> None:
        """Map one block of memory for the observations of all environments, in this process and in the workers."""
        space = self.observation_space
        for worker, other in enumerate(obs_spaces):
            if obs_space_info(other) != obs_space_info(space):
                raise ValueError(
                    f"WorkerPoolVecEnv: env 0 shows {space}, but env {self._rows[worker][0]} shows {other}; all "
                    "environments must show arrays of the same shapes and types"
                )
        memory = os.memfd_create("rpd_sb3-observations")
        try:
            self._block = map_block(memory, space, self.num_envs)
            for worker, rows in enumerate(self._rows):
                self._send(worker, "share", self.num_envs, int(rows[0]))
                try:
                    send_handle(self._remotes[worker], memory, self._processes[worker].pid)
                except OSError as error:
                    raise self._died(worker) from error
        finally:
            os.close(memory)
        for worker in range(len(self._rows)):
            self._receive(worker)

    def step_async(self, actions: np.ndarray) -> None:
        commands = [(worker, self._send(worker, "step", None, actions[rows])) for worker, rows in enumerate(self._rows)]
        self._pending = PendingRows(np.arange(self.num_envs), commands)

    def step_wait(self) -> VecEnvStepReturn:
        rewards, dones, infos = self.step_rows_wait(self._pending)
        return self.read_observations(), rewards, dones, infos

    def halves(self, order: np.ndarray) -> list[np.ndarray]:
        """The environments in two turns, so that one half can step while somebody decides on the actions of the other.

        :param order: ``(N,)`` of each worker's environments, those with the smaller numbers are in the first turn
        :return: environments of the turns; one that has none is left out
        """
        turns: tuple[list[np.ndarray], list[np.ndarray]] = [], []
        for worker, rows in enumerate(self._rows):
            sorted_rows = rows[np.argsort(order[rows], kind="stable")]
            middle = (
                len(rows) + (worker + 1) % 2
            ) // 2  # of odd numbers, every other worker has the greater half first
            turns[0].append(np.sort(sorted_rows[:middle]))
            turns[1].append(np.sort(sorted_rows[middle:]))
        return [rows for rows in map(np.concatenate, turns) if len(rows)]

    def step_rows_async(self, rows: np.ndarray, actions: np.ndarray) -> PendingRows:
        """Step some environments; none of them may have a step that was not waited for.

        :param rows: ``(n,)`` environments, sorted
        :param actions: ``(n, ...)``
        """
        commands = []
        for worker, mine in enumerate(self._rows):
            wanted = slice(*np.searchsorted(rows, (mine[0], mine[-1] + 1)))
            if len(rows[wanted]):
                commands.append((worker, self._send(worker, "step", rows[wanted] - mine[0], actions[wanted])))
        return PendingRows(rows, commands)

    def step_rows_wait(self, pending: PendingRows) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Wait for a step of some environments; steps that were begun before it must have been waited for.

        :param pending: result of :meth:`step_rows_async`
        :return: rewards and dones ``(n,)``, and n infos; :meth:`read_observations` has the observations
        """
        results = [self._receive(worker, number) for worker, number in pending.commands]
        rewards, dones, parts, reset_infos = zip(*results, strict=True)
        ended, infos = np.concatenate(dones), [info for part in parts for info in part]
        begun = [info for part in reset_infos for info in part]
        for i in np.flatnonzero(ended):
            env = int(pending.rows[i])
            infos[i]["terminal_observation"] = self._block.read_terminal(env)
            self.reset_infos[env] = begun[i]
        return np.concatenate(rewards), ended, infos

    def read_observations(self, rows: np.ndarray | None = None) -> VecEnvObs:
        """A copy of the current observations.

        :param rows: ``(n,)`` environments, none of which is being stepped; None: all
        """
        return self._block.read_current(rows)

    def reset(self) -> VecEnvObs:
        for worker, rows in enumerate(self._rows):
            self._send(worker, "reset", [self._seeds[i] for i in rows], [self._options[i] for i in rows])
        results = [self._receive(worker) for worker in range(len(self._rows))]
        self.reset_infos = [info for reset_infos in results for info in reset_infos]
        self._reset_seeds()
        self._reset_options()
        return self.read_observations()

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        for remote in self._remotes:
            remote.close()  # ends the worker's next recv or send, also one that waits for us to read an answer
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.terminate()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self._call("get_images", None)

    def has_attr(self, attr_name: str) -> bool:
        return all(self._call("has_attr", None, attr_name))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return self._call("get_attr", indices, attr_name)

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        self._call("set_attr", indices, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        return self._call("env_method", indices, method_name, *method_args, **method_kwargs)

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        return self._call("env_is_wrapped", indices, wrapper_class)

    def _call(self, name: str, indices: VecEnvIndices, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a method of each worker's VecEnv for the wanted environments; one result each, in the order asked."""
        wanted = list(self._get_indices(indices))
        asked = []
        for worker, rows in enumerate(self._rows):
            local = [i - rows[0] for i in rows if i in wanted]
            if local:
                self._send(worker, "call", name, local, args, kwargs)
                asked.append((worker, [int(rows[0] + i) for i in local]))
        results: dict[int, Any] = {}
        for worker, rows_asked in asked:
            values = self._receive(worker)
            results.update(zip(rows_asked, values, strict=True))
        return [results[i] for i in wanted]

    def _send(self, worker: int, command: str, *data: Any) -> int:
        """Give a worker a command; its number is returned."""
        self._sent[worker] += 1
        try:
            self._remotes[worker].send((self._sent[worker], command, data))
        except OSError as error:
            raise self._died(worker) from error
        return self._sent[worker]

    def _receive(self, worker: int, number: int | None = None) -> Any:
        """The answer to a command of the worker. Older ones, left unread by an exception in between, are dropped.

        :param number: of the command; None: the last one
        """
        wanted = self._sent[worker] if number is None else number
        if self._received[worker] >= wanted:
            raise RuntimeError(f"environment worker {worker}: the answer to a step was dropped by a later command")
        while self._received[worker] < wanted:
            try:
                self._received[worker], failed, result = self._remotes[worker].recv()
            except (EOFError, OSError) as error:
                raise self._died(worker) from error
        if failed:
            raise RuntimeError(f"environment worker {worker} failed:\n{result}")
        return result

    def _died(self, worker: int) -> RuntimeError:
        self._processes[worker].join(1.0)
        code = self._processes[worker].exitcode
        return RuntimeError(f"environment worker {worker} of {len(self._rows)} died with exit code {code}")


def _work(remote: Connection, env_fns: CloudpickleWrapper) -> None:
    """The program of a worker: make its share of the environments, obey commands, answer ``(number, failed, result)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        venv = SharedDummyVecEnv(env_fns.var)
        remote.send((0, False, (venv.observation_space, venv.action_space)))
    except Exception:
        remote.send((0, True, traceback.format_exc()))
        return
    while True:
        try:
            number, command, data = remote.recv()
        except (EOFError, OSError):
            break
        try:
            if command == "share":
                data = (recv_handle(remote), *data)
            answer: tuple[int, bool, Any] = (number, False, _obey(venv, command, data))
        except Exception:
            answer = (number, True, traceback.format_exc())
        try:
            remote.send(answer)
        except OSError:  # the parent has closed the pipe
            break
        except Exception:
            remote.send((number, True, traceback.format_exc()))  # an answer that cannot be pickled
    venv.close()


def _obey(venv: SharedDummyVecEnv, command: str, data: tuple[Any, ...]) -> Any:
    if command == "step":
        return venv.step_rows(*data)
    if command == "reset":
        venv._seeds, venv._options = data
        venv.reset()
        return venv.reset_infos
    if command == "share":
        memory, n_envs, first_row = data
        venv.share(map_block(memory, venv.observation_space, n_envs), first_row)
        os.close(memory)
        return None
    name, local, args, kwargs = data
    if name == "get_images":
        return venv.get_images()
    if name == "has_attr":
        return [venv.has_attr(*args)] * len(local)
    result = getattr(venv, name)(*args, indices=local, **kwargs)
    return [None] * len(local) if result is None else result


class ObservationBlock(NamedTuple):
    """Where the environments' processes write their observations, and the parent reads them.

    The memory has no name, so nothing is left behind by processes that are killed, and the size of ``/dev/shm`` does not
    matter. It needs no lock: a worker writes between a command and its answer, the parent reads after the answer.
    """

    space: spaces.Space
    current: Rows
    terminal: Rows
    """Last observations of the episodes that ended in this step; other rows mean nothing."""

    def read_current(self, rows: np.ndarray | None) -> VecEnvObs:
        """A copy of the current observations of these rows, as SB3's VecEnvs give them; None: of all."""
        if rows is None:
            return dict_to_obs(self.space, {key: values.copy() for key, values in self.current.items()})
        return dict_to_obs(self.space, {key: values[rows] for key, values in self.current.items()})

    def read_terminal(self, env: int) -> VecEnvObs:
        """A copy of the terminal observation of one environment."""
        return dict_to_obs(self.space, {key: values[env].copy() for key, values in self.terminal.items()})


def map_block(memory: int, space: spaces.Space, n_envs: int) -> ObservationBlock:
    """The block in this process.

    :param memory: descriptor of memory, which gets the size of the block; may be closed afterwards
    :param space: of one environment's observation
    :param n_envs: N
    """
    keys, shapes, dtypes = obs_space_info(space)
    current: Rows = {}
    terminal: Rows = {}
    arrays = []
    size = 0
    for half in (current, terminal):
        for key in keys:
            shape, dtype = (n_envs, *shapes[key]), np.dtype(dtypes[key])
            arrays.append((half, key, shape, dtype, size))
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
    size = max(size, 1)
    os.truncate(memory, size)
    mapped = mmap.mmap(memory, size)
    for half, key, shape, dtype, offset in arrays:
        half[key] = np.ndarray(shape, dtype, mapped, offset)
    return ObservationBlock(space, current, terminal)


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
        self._alone = [self._only(row) for row in range(self.num_envs)]

    def _only(self, row: int) -> SharedDummyVecEnv:
        """A VecEnv of one of our environments, which writes where we do."""
        one, at = copy(self), slice(row, row + 1)
        one.num_envs, one.envs = 1, self.envs[at]
        one.buf_obs = {key: values[at] for key, values in self.buf_obs.items()}  # type: ignore[assignment]
        one._terminal = {key: values[at] for key, values in self._terminal.items()}
        one.buf_rews, one.buf_dones = self.buf_rews[at], self.buf_dones[at]
        one.buf_infos, one.reset_infos = [{}], [{}]
        return one

    def step_rows(self, rows: np.ndarray | None, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, list, list]:
        """Step some environments.

        :param rows: ``(n,)`` of our environments; None: all
        :param actions: ``(n, ...)``
        :return: rewards and dones ``(n,)``, n infos, and n infos of the last reset
        """
        if rows is None:
            _, rewards, dones, infos = self.step(actions)
            return rewards, dones, infos, self.reset_infos
        envs = [self._alone[row] for row in rows]
        steps = [env.step(actions[i : i + 1])[1:] for i, env in enumerate(envs)]
        parts, ended, infos_of = zip(*steps)
        reset_infos = [env.reset_infos[0] for env in envs]
        return np.concatenate(parts), np.concatenate(ended), [info for (info,) in infos_of], reset_infos

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
