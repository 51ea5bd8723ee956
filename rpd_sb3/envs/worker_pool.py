"""WorkerPoolVecEnv: many environments in a few worker processes. N is the number of environments."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import (
    CloudpickleWrapper,
    VecEnvIndices,
    VecEnvObs,
    VecEnvStepReturn,
)

PRELOAD = "rpd_sb3.envs.worker"
CLOSE_TIMEOUT = 10.0
"""Seconds that the workers get to close before they are terminated."""


class WorkerPoolVecEnv(VecEnv):
    """Steps N environments in as many worker processes as there are cores, each with an equal share of them.

    SB3's SubprocVecEnv starts one process for each environment; with more environments than cores that costs memory,
    start-up time and, for environments of about 2 ms per step, a third of the throughput. An exception in an
    environment arrives here with its traceback, and a worker that dies is an error, not a wait.

    :param env_fns: one function for each environment
    :param n_workers: number of processes; None: one per core, at most N
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env]], n_workers: int | None = None) -> None:
        self.closed = False
        n_workers = min(len(env_fns), n_workers or os.cpu_count() or 1)
        self._rows = np.array_split(np.arange(len(env_fns)), n_workers)
        # The fork server imports the simulator once; its children start in milliseconds and share the memory.
        mp.set_forkserver_preload([PRELOAD])
        context = mp.get_context("forkserver")
        self._remotes: list[Connection] = []
        self._processes = []
        for rows in self._rows:
            remote, worker_remote = context.Pipe()
            fns = CloudpickleWrapper([env_fns[i] for i in rows])
            process = context.Process(target=_work, args=(worker_remote, fns), daemon=True)
            process.start()
            worker_remote.close()
            self._remotes.append(remote)
            self._processes.append(process)
        spaces = [self._receive(worker) for worker in range(n_workers)][0]
        super().__init__(len(env_fns), *spaces)

    def step_async(self, actions: np.ndarray) -> None:
        for worker, rows in enumerate(self._rows):
            self._send(worker, "step", actions[rows])

    def step_wait(self) -> VecEnvStepReturn:
        results = [self._receive(worker) for worker in range(len(self._rows))]
        obs, rewards, dones, infos, reset_infos = zip(*results, strict=True)
        self.reset_infos = [info for part in reset_infos for info in part]
        return (
            _concatenate(obs),
            np.concatenate(rewards),
            np.concatenate(dones),
            [info for part in infos for info in part],
        )

    def reset(self) -> VecEnvObs:
        for worker, rows in enumerate(self._rows):
            self._send(worker, "reset", [self._seeds[i] for i in rows], [self._options[i] for i in rows])
        results = [self._receive(worker) for worker in range(len(self._rows))]
        obs, reset_infos = zip(*results, strict=True)
        self.reset_infos = [info for part in reset_infos for info in part]
        self._reset_seeds()
        self._reset_options()
        return _concatenate(obs)

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

    def _send(self, worker: int, command: str, *data: Any) -> None:
        try:
            self._remotes[worker].send((command, data))
        except OSError as error:
            raise self._died(worker) from error

    def _receive(self, worker: int) -> Any:
        try:
            failed, result = self._remotes[worker].recv()
        except (EOFError, OSError) as error:
            raise self._died(worker) from error
        if failed:
            raise RuntimeError(f"environment worker {worker} failed:\n{result}")
        return result

    def _died(self, worker: int) -> RuntimeError:
        self._processes[worker].join(1.0)
        code = self._processes[worker].exitcode
        return RuntimeError(f"environment worker {worker} of {len(self._rows)} died with exit code {code}")


def _concatenate(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def _work(remote: Connection, env_fns: CloudpickleWrapper) -> None:
    """A worker's life: build its share of the environments, obey, answer ``(failed, result)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    try:
        venv = DummyVecEnv(env_fns.var)
        remote.send((False, (venv.observation_space, venv.action_space)))
    except Exception:
        remote.send((True, traceback.format_exc()))
        return
    while True:
        try:
            command, data = remote.recv()
        except (EOFError, OSError):
            break
        try:
            answer: tuple[bool, Any] = (False, _obey(venv, command, data))
        except Exception:
            answer = (True, traceback.format_exc())
        try:
            remote.send(answer)
        except OSError:  # nobody listens any more
            break
        except Exception:
            remote.send((True, traceback.format_exc()))  # an answer that cannot be pickled
    venv.close()


def _obey(venv: DummyVecEnv, command: str, data: tuple[Any, ...]) -> Any:
    if command == "step":
        obs, rewards, dones, infos = venv.step(data[0])
        return obs, rewards, dones, infos, venv.reset_infos
    if command == "reset":
        venv._seeds, venv._options = data
        return venv.reset(), venv.reset_infos
    name, local, args, kwargs = data
    if name == "get_images":
        return venv.get_images()
    if name == "has_attr":
        return [venv.has_attr(*args)] * len(local)
    result = getattr(venv, name)(*args, indices=local, **kwargs)
    return [None] * len(local) if result is None else result
