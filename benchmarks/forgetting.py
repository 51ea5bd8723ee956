"""Seen and unseen: a student of two tasks is fine-tuned on one of them. What happens to the other (VLA-OPD, Fig. 3)?

    python benchmarks/forgetting.py            # about 10 minutes a seed; writes benchmarks/results/forgetting.{json,png}

A token policy clones demonstrations of PullCube and PushCube (same observations; the goal tells them apart), too few to be
good. Then it goes on with PullCube alone: SFT on more demonstrations of it, GRPO on its reward, OPD with its teacher. Both
tasks are evaluated along the way. SFT's steps are the transitions that it trains on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from rpd_sb3.algos import GRPO, OPD, SFT
from rpd_sb3.demos import files as demonstrations
from rpd_sb3.demos import record as recording
from rpd_sb3.envs import make_vec_env
from rpd_sb3.episodes.play import Evaluator
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import RunningNorm, TokenPolicy
from rpd_sb3.students.warm_start import load_weights
from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher

RESULTS = Path(__file__).parent / "results" / "forgetting.json"
SEEN, UNSEEN = "PullCube-v1", "PushCube-v1"
NETWORK: dict[str, Any] = {
    "features_extractor_class": RunningNorm,
    "net_arch": [256, 256],
    "activation_fn": th.nn.ReLU,
}
METHODS = {"sft": 200_000, "grpo": 80_000, "opd": 20_000, "opd, small steps": 40_000}
"""Name to number of steps."""
NAMES = {"sft": "SFT", "grpo": "GRPO", "opd": "OPD", "opd, small steps": "OPD, small steps"}


def teach(env_id: str, n_envs: int, seed: int, **kwargs: Any) -> VecTeacher:
    """Environments with action tokens and a scripted teacher."""
    teacher = ScriptedTeacher(env_id, seed=seed, **kwargs)
    venv = make_vec_env(env_id, n_envs, seed=seed, vec_env="dummy", tokens=True, teacher=teacher.spec)
    return VecTeacher(venv, teacher)


def record(env_id: str, n_episodes: int, seed: int) -> demonstrations.Demonstrations:
    """Demonstrations of a slightly noisy teacher."""
    venv = teach(env_id, 8, seed, noise=0.1)
    demos = recording.record(venv, n_episodes, seed=seed)
    venv.close()
    return demos


def merged(
    first: demonstrations.Demonstrations, second: demonstrations.Demonstrations
) -> demonstrations.Demonstrations:
    """The episodes of both."""
    arrays = (np.concatenate([a, b]) for a, b in list(zip(first, second))[:4])
    return demonstrations.Demonstrations(*arrays, None, {"control_mode": first.metadata["control_mode"]})


def fine_tune(method: str, base: Path, more: Path, seed: int) -> BaseAlgorithm:
    """The method on the seen task, ready to learn from the base's weights."""
    common: dict[str, Any] = {"policy_kwargs": NETWORK, "seed": seed, "device": "cpu"}
    if method == "sft":
        venv = make_vec_env(SEEN, 1, vec_env="dummy", tokens=True)
        model: BaseAlgorithm = SFT(TokenPolicy, venv, demonstrations=str(more), learning_rate=3e-4, **common)
    elif method == "grpo":
        venv = make_vec_env(SEEN, 32, seed=seed, vec_env="dummy", tokens=True)
        model = GRPO(TokenPolicy, venv, n_steps=50, batch_size=400, n_epochs=4, learning_rate=3e-4, **common)
    else:
        model = OPD(
            TokenPolicy,
            teach(SEEN, 16, seed, n_bins=256, std=0.1),
            n_steps=64,
            batch_size=64,
            n_epochs=8,
            learning_rate=3e-4 if method == "opd" else 3e-5,
            teacher_floor=0.05,
            **common,
        )
    load_weights(model.policy, base)
    # Statistics that went on with one task alone would shift what the network sees of the other.
    for module in model.policy.modules():
        if isinstance(module, RunningNorm):
            module.freeze()
    return model


class Watch(BaseCallback):
    """Evaluates both tasks at the beginning and ``n_points`` times along training."""

    def __init__(self, evaluators: tuple[Evaluator, Evaluator], n_steps: int, n_points: int) -> None:
        super().__init__()
        self.evaluators, self.every = evaluators, n_steps / n_points
        self.points: list[tuple[int, float, float]] = []

    def _on_training_start(self) -> None:
        self.look()

    def _on_step(self) -> bool:
        if self.num_timesteps >= len(self.points) * self.every:
            self.look()
        return True

    def look(self) -> None:
        """Add a point: steps, success at the seen and at the unseen task."""
        seen, unseen = (evaluator.student(self.model).success_once for evaluator in self.evaluators)
        self.points.append((self.num_timesteps, float(seen or 0.0), float(unseen or 0.0)))
        print(type(self.model).__name__, *self.points[-1], flush=True)


def plot(results: dict[str, list[list[tuple[int, float, float]]]], path: Path) -> None:
    """Success at the unseen task over that at the seen one; the first point of each line is the base."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (method, runs), marker in zip(results.items(), "so^v"):
        points = np.mean([[point[1:] for point in run] for run in runs], axis=0)
        axes.plot(*points.T, marker=marker, label=NAMES[method])
    before = np.mean([run[0][1:] for runs in results.values() for run in runs], axis=0)
    axes.plot(*before, marker="*", markersize=18, color="black", linestyle="", label="before")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel=f"success at {SEEN} (seen)")
    axes.set_ylabel(f"success at {UNSEEN} (unseen)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--demos", type=int, default=150, help="of each task, for the base")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), help="the others stay")
    parser.add_argument("--points", type=int, default=3, help="evaluations along each run")
    args = parser.parse_args()
    th.set_num_threads(1)
    evaluators = tuple(Evaluator(task, {"tokens": True}, n_episodes=48, vec_env="dummy") for task in (SEEN, UNSEEN))
    results: dict[str, list[list[tuple[int, float, float]]]] = {}
    if RESULTS.is_file():
        results = json.loads(RESULTS.read_text())
    results |= {method: [] for method in args.methods}
    with tempfile.TemporaryDirectory() as folder:
        both, more, base = (Path(folder) / name for name in ("both.npz", "more.npz", "base.zip"))
        for seed in args.seeds:
            demonstrations.save(both, merged(*(record(task, args.demos, seed) for task in (SEEN, UNSEEN))))
            demonstrations.save(more, record(SEEN, 2 * args.demos, seed + 1000))
            venv = make_vec_env(SEEN, 1, vec_env="dummy", tokens=True)
            student = SFT(
                TokenPolicy, venv, demonstrations=str(both), learning_rate=1e-3, policy_kwargs=NETWORK, seed=seed
            )
            student.learn(200_000).save(base)
            for method in args.methods:
                model, n_steps = fine_tune(method, base, more, seed), METHODS[method]
                watch = Watch(evaluators, n_steps, args.points)  # type: ignore[arg-type]
                model.learn(n_steps, watch)
                results[method].append(watch.points[: args.points + 1])
                assert model.env is not None
                model.env.close()
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            plot(results, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
