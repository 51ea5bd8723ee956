"""Training throughput paired against SB3's PPO: same environment, same settings, same process, taking turns.

    python benchmarks/throughput.py

Three learners train side by side, a few rollouts at a time in random order, so that whatever else the machine does meets
all of them alike: SB3's PPO, our loop without a teacher, and RPD with the scripted teacher in this process. Prints the
median over all turns of each one's environment steps per second, and of the ratio to SB3's PPO in the same round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3 import PPO

from rpd_sb3.algos import RPD
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.envs import make_vec_env
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import make_teacher

RESULTS = Path(__file__).parent / "results" / "throughput.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PickCube-v1")
    parser.add_argument("--n-envs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    th.set_num_threads(1)
    settings: dict[str, Any] = {
        "n_steps": 64,
        "batch_size": 64,
        "n_epochs": 8,
        "policy_kwargs": {"net_arch": [256, 256], "log_std_init": -2.0},
        "device": "cpu",
        "seed": 0,
    }
    teacher = make_teacher("scripted", args.env)
    plain = make_vec_env(args.env, args.n_envs, seed=0)
    taught = VecTeacher(make_vec_env(args.env, args.n_envs, seed=0, teacher=teacher.spec), teacher)
    learners: dict[str, PPO] = {
        "SB3 PPO": PPO("MlpPolicy", plain, **settings),
        "without a teacher": OnPolicyDistillation("MlpPolicy", plain, **settings),
        "RPD, scripted teacher": RPD("MlpPolicy", taught, **settings),
    }
    steps = 2 * args.n_envs * settings["n_steps"]
    fps: dict[str, list[float]] = {name: [] for name in learners}
    for round_number in range(args.rounds + 1):
        for name in random.sample(list(learners), len(learners)):
            learners[name]._last_obs = None  # learners that share environments start from a reset
            start = time.perf_counter()
            learners[name].learn(steps, reset_num_timesteps=round_number == 0)
            if round_number > 0:  # the first one warms up
                fps[name].append(steps / (time.perf_counter() - start))
    base = fps["SB3 PPO"]
    records = {
        name: {
            "fps": statistics.median(values),
            "ratio": statistics.median(a / b for a, b in zip(values, base, strict=True)),
            "ratios": [round(a / b, 3) for a, b in zip(values, base, strict=True)],
        }
        for name, values in fps.items()
    }
    print("| training loop | speed, SB3's PPO = 1 |\n|---|---|")
    for name, record in records.items():
        print(f"| {name} | {record['ratio']:.3f} |")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(vars(args) | {"results": records}, indent=1) + "\n")
    plain.close()
    taught.close()
    teacher.close()


if __name__ == "__main__":
    main()
