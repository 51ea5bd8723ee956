"""What a student costs: its weights, their bytes, the time of an action."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm

WARM_UP = 10
"""Calls that are not measured."""
BUDGET = 2.0
"""Seconds after which a slow student is not measured again."""


def student_parameters(model: BaseAlgorithm) -> int:
    """Number of weights of the policy, value function included."""
    return sum(parameter.numel() for parameter in model.policy.parameters())


def student_bytes(model: BaseAlgorithm) -> int:
    """Bytes of these weights in memory."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.policy.parameters())


def student_latency(model: BaseAlgorithm, n_calls: int = 200) -> dict[str, Any]:
    """How long ``model.predict`` takes for one observation, with one thread.

    :param model: the student
    :param n_calls: to measure, fewer of a slow student
    :return: ``median`` and ``p95`` in milliseconds, ``device``, ``n_calls`` made
    """
    space = copy.deepcopy(model.observation_space)
    space.seed(0)
    obs = space.sample()
    threads = th.get_num_threads()
    times: list[float] = []
    th.set_num_threads(1)
    try:
        for _ in range(WARM_UP):
            model.predict(obs, deterministic=True)
        until = time.perf_counter() + BUDGET
        while len(times) < n_calls and time.perf_counter() < until or not times:
            start = time.perf_counter()
            model.predict(obs, deterministic=True)
            times.append(1000 * (time.perf_counter() - start))
    finally:
        th.set_num_threads(threads)
    median, p95 = np.percentile(times, [50, 95]).round(4).tolist()
    return {"median": median, "p95": p95, "device": str(model.device), "n_calls": len(times)}
