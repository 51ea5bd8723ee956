"""Train a student: ``python -m rpd_sb3.train --algo rpd_ppo --env PickCube-v1 --teacher scripted``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rpd_sb3.cli.common import (
    Job,
    Parser,
    add_vec_env_flag,
    check_at_least,
    check_training_side,
    run_command,
    whole_number,
)

DEFAULTS: dict[str, Any] = {
    "algo": None,
    "env": None,
    "teacher": None,
    "teacher_kwargs": [],
    "seed": 0,
    "n_timesteps": None,
    "params": [],
    "obs": None,
    "env_kwargs": [],
    "conf_file": None,
    "section": None,
    "n_envs": None,
    "vec_env": "subproc",
    "device": "auto",
    "num_threads": None,
    "eval_freq": 10_000,
    "eval_episodes": 50,
    "n_eval_envs": 8,
    "save_freq": 0,
    "log_folder": "logs",
    "tensorboard_log": None,
    "progress": None,
    "verbose": 0,
    "video": True,
}
AT_LEAST = {"eval_episodes": 1, "n_eval_envs": 1, "num_threads": 1, "seed": 0, "verbose": 0}
MAY_CHANGE = {
    "n_timesteps",
    "vec_env",
    "device",
    "num_threads",
    "eval_freq",
    "n_eval_envs",
    "save_freq",
    "progress",
    "verbose",
    "video",
}
"""Flags that may be given together with --resume; the others are those of the run."""


def make_parser() -> Parser:
    """Every flag; those that are not given leave no trace, so that --resume can tell."""
    parser = Parser(prog="python -m rpd_sb3.train", description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--algo", help="opd, rpd_ppo, ppd, road, grpo, sft, ppo, recurrent_ppo or trpo")
    add("--env", metavar="ID", help="ManiSkill or Gymnasium id")
    add("--teacher", help="scripted, sb3:FILE, http://HOST:PORT[,...] or MODULE:CLASS [that of the config]")
    add("--teacher-kwargs", nargs="+", metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("--seed", type=whole_number, help="[0]")
    add("-n", "--n-timesteps", type=whole_number, metavar="N", help="environment steps, e.g. 1e5 [that of the config]")
    add(
        "-params",
        "--hyperparams",
        dest="params",
        nargs="+",
        metavar="K:V",
        help="change the config, e.g. gamma:0.8 policy_kwargs.log_std_init:-1",
    )
    add("--obs", help="state, rgb or rgb+state: short for --env-kwargs obs:... [that of the config]")
    add("--env-kwargs", nargs="+", metavar="K:V", help="options of the environment, e.g. reward:dense obs:rgb")
    add("-conf", "--conf-file", metavar="FILE", help="config [zoo_configs/<algo>.yml]")
    add("--section", help="section of the config [<env>-<reward>, <env> or default]")
    add("--n-envs", type=whole_number, metavar="N", help="environments [that of the config]")
    add_vec_env_flag(parser)
    add("--device", help="auto, cpu, cuda, cuda:1 ... [auto]")
    add("--num-threads", type=whole_number, metavar="N", help="PyTorch's threads [1 for small networks on the CPU]")
    add(
        "--eval-freq",
        type=whole_number,
        metavar="N",
        help="environment steps between evaluations, 0 or -1: only at the end [10000]",
    )
    add("--eval-episodes", type=whole_number, metavar="N", help="[50]")
    add("--n-eval-envs", type=whole_number, metavar="N", help="[8]")
    add("--save-freq", type=whole_number, metavar="N", help="environment steps between checkpoints, 0 or -1: none [0]")
    add("--resume", metavar="RUN_DIR", help="go on with a run, in its folder")
    add("-f", "--log-folder", metavar="DIR", help="[logs]")
    add("-tb", "--tensorboard-log", metavar="DIR", help="[the run folder's tensorboard/]")
    add("-P", "--progress", action=argparse.BooleanOptionalAction, help="progress bar [on a terminal]")
    add("--verbose", type=whole_number, help="1: SB3's tables [0]")
    add("--no-video", dest="video", action="store_false", help="film no episodes at the end")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and return the exit code: 2 for a mistake of the user's, 1 if training failed, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: set_up(argv))


def set_up(argv: Sequence[str]) -> Job:
    """A training run, ready to start; nothing is written before everything stands.

    :raises ValueError: with what is wrong
    """
    check_training_side()
    given = vars(make_parser().parse_args(argv))
    check_at_least(given, AT_LEAST)
    # Late, so that --help and misspelt flags are answered at once.
    from rpd_sb3.algos import find_algo
    from rpd_sb3.contract.secrets import redact
    from rpd_sb3.envs.factory import check_env_id
    from rpd_sb3.train import folder as runs
    from rpd_sb3.train.build import build, resolve_config
    from rpd_sb3.train.hyperparams import check_section
    from rpd_sb3.train.run import Trainer

    folder = given.pop("resume", None)
    if folder is None:
        args = DEFAULTS | given
        for key in ("algo", "env"):
            if args[key] is None:
                raise ValueError(f"--{key} is missing, e.g. --algo rpd_ppo --env PickCube-v1")
        check_env_id(args["env"])
        return Trainer(build(args, resolve_config(args), None, argv))
    saved = runs.with_secrets(runs.load_run(folder), given)
    for key, value in given.items():
        if key not in MAY_CHANGE and value != saved.args.get(key):
            raise ValueError(
                f"--resume {folder} goes on with {key}={saved.args.get(key)!r}, but {redact(value)!r} is given; start a new run for that"
            )
    config = check_section(saved.config, find_algo(saved.args["algo"]))
    config.n_timesteps = given.get("n_timesteps", config.n_timesteps)
    return Trainer(build(DEFAULTS | saved.args | given, config, saved, argv))


if __name__ == "__main__":
    sys.exit(main())
