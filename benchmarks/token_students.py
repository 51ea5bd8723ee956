"""What an update and a sample of the token policies cost, next to SB3's policy for the same action space.

    python benchmarks/token_students.py               # one thread, results/token_students.json
    python benchmarks/token_students.py --threads 2   # print only, as with any argument

An update is the forward and backward pass of one PPO minibatch, with and without the optimizer's step; a sample is
``policy(obs)`` for all environments. The policies take turns and the median counts: other load on the machine is shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy

from rpd_sb3.students import AutoregressivePolicy, TokenPolicy

RESULTS = Path(__file__).parent / "results" / "token_students.json"
POLICIES = (ActorCriticPolicy, TokenPolicy, AutoregressivePolicy)
BATCH_SIZE, N_ENVS, STATE_SIZE, N_TOKENS, N_BINS = 256, 64, 42, 7, 256
REPEATS, WARM_UP = 60, 5


def update(policy: ActorCriticPolicy, obs: th.Tensor, actions: th.Tensor, step: bool) -> None:
    """One minibatch of PPO with all its terms.

    :param policy: what to update
    :param obs: (BATCH_SIZE, STATE_SIZE)
    :param actions: (BATCH_SIZE, N_TOKENS)
    :param step: clip the gradient and step the optimizer as well
    """
    values, log_prob, entropy = policy.evaluate_actions(obs, actions)
    assert entropy is not None
    advantages, returns = obs[:, 0], obs[:, 1]
    ratio = th.exp(log_prob - log_prob.detach())
    surrogate = th.min(advantages * ratio, advantages * ratio.clamp(0.8, 1.2)).mean()
    loss = -surrogate - 0.01 * entropy.mean() + 0.5 * (values.flatten() - returns).square().mean()
    policy.optimizer.zero_grad()
    loss.backward()
    if step:
        th.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        policy.optimizer.step()


@th.no_grad()
def sample(policy: ActorCriticPolicy, obs: th.Tensor) -> None:
    """One step of a rollout, without the environments."""
    policy(obs)


def median_ms(tasks: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Median duration of each task in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(WARM_UP + REPEATS):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(statistics.median(values[WARM_UP:]), 2) for name, values in times.items()}


def measure(threads: int) -> dict[str, Any]:
    """All numbers, with what they depend on."""
    th.set_num_threads(threads)
    th.manual_seed(0)
    observation_space = spaces.Box(-1.0, 1.0, (STATE_SIZE,), np.float32)
    action_space = spaces.MultiDiscrete([N_BINS] * N_TOKENS)
    policies = {
        each.__name__: each(observation_space, action_space, lambda _: 3e-4, net_arch=[256, 256]) for each in POLICIES
    }
    obs, actions = th.randn(BATCH_SIZE, STATE_SIZE), th.randint(N_BINS, (BATCH_SIZE, N_TOKENS))
    update_ms = median_ms({name: partial(update, p, obs, actions, step=False) for name, p in policies.items()})
    step_ms = median_ms({name: partial(update, p, obs, actions, step=True) for name, p in policies.items()})
    sample_ms = median_ms({name: partial(sample, p, obs[:N_ENVS]) for name, p in policies.items()})
    rows = [
        {
            "policy": name,
            "parameters": sum(parameter.numel() for parameter in policy.parameters()),
            "update_ms": update_ms[name],
            "update_ratio": round(update_ms[name] / update_ms["TokenPolicy"], 2),
            "update_and_step_ms": step_ms[name],
            "sample_ms": sample_ms[name],
        }
        for name, policy in policies.items()
    ]
    shape = {"batch_size": BATCH_SIZE, "n_envs": N_ENVS, "state": STATE_SIZE, "tokens": N_TOKENS, "bins": N_BINS}
    return {"threads": threads, "torch": th.__version__, "machine": platform.machine(), **shape, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"| policy | parameters | update of {results['batch_size']}, ms | ratio | with optimizer step, ms "
        f"| sample of {results['n_envs']}, ms |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in results["rows"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    results = measure(parser.parse_args().threads)
    print(table(results))
    if len(sys.argv) == 1:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
