"""What a student costs."""

from __future__ import annotations

import torch as th
from stable_baselines3 import PPO

from rpd_sb3.train.cost import student_bytes, student_latency, student_parameters
from tests.support.tiny_env import TinyEnv


def test_latency_and_sizes_of_a_student() -> None:
    model = PPO("MlpPolicy", TinyEnv(), seed=0, device="cpu", policy_kwargs={"net_arch": [8]})
    threads = th.get_num_threads()
    th.set_num_threads(2)
    try:
        latency = student_latency(model, n_calls=5)
        assert th.get_num_threads() == 2
    finally:
        th.set_num_threads(threads)
    assert 0 < latency["median"] <= latency["p95"]
    assert (latency["device"], latency["n_calls"]) == ("cpu", 5)
    # Actor and critic: 2 x 8 + 8 and 8 + 1 each, and a log_std.
    assert student_parameters(model) == 2 * (2 * 8 + 8 + 8 + 1) + 1
    assert student_bytes(model) == 4 * student_parameters(model)
