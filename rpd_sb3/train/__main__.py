"""Train a student: ``python -m rpd_sb3.train --algo rpd_ppo --env PickCube-v1 --teacher scripted``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rpd_sb3.cli.common import Command, Parser, add_vec_env_flag, check_at_least, parse_and_run, whole_number
from rpd_sb3.contract.names import TEACHER_HELP
from rpd_sb3.train.args import ALGORITHMS, AT_LEAST, MAY_CHANGE, TrainArgs


def make_parser() -> Parser:
    """Every flag; those that are not given leave no trace, so that --resume can tell."""
    parser = Parser(prog="python -m rpd_sb3.train", description=__doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--algo", help=f"{', '.join(ALGORITHMS[:-1])} or {ALGORITHMS[-1]}")
    add("--env", metavar="ID", help="ManiSkill or Gymnasium id")
    add("--teacher", help=f"{TEACHER_HELP} [that of the config]")
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
    add(
        "--section",
        help="section of the config [the first of <env>-<obs>-<reward>, <env>-<obs>, <env>-<reward>, <env>, default]",
    )
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
    return parse_and_run(argv, make_parser, check, set_up)


def check(args: argparse.Namespace) -> None:
    """Check what can be checked without PyTorch.

    :param args: the flags that are given, and ``resume``
    :raises ValueError: with what is wrong
    """
    given = vars(args)
    check_at_least(given, AT_LEAST)
    for key in ("algo", "env"):
        if "resume" not in given and key not in given:
            raise ValueError(f"--{key} is missing, e.g. --algo rpd_ppo --env PickCube-v1")


def set_up(args: argparse.Namespace) -> Command:
    """A training run, ready to start; nothing is written before everything is built.

    :param args: the flags that are given, ``resume``, and the words of the command line as ``argv``
    :raises ValueError: with what is wrong
    """
    # Late, so that --help and misspelt flags are answered at once.
    from rpd_sb3.algos import find_algo
    from rpd_sb3.contract.secrets import redact
    from rpd_sb3.envs.factory import check_env_id
    from rpd_sb3.train import folder as runs
    from rpd_sb3.train.build import build, resolve_config
    from rpd_sb3.train.hyperparams import check_section
    from rpd_sb3.train.run import TrainingRun

    given = dict(vars(args))
    argv = given.pop("argv")
    folder = given.pop("resume", None)
    if folder is None:
        new = TrainArgs(**given)
        check_env_id(new.env)
        return TrainingRun(build(new, resolve_config(new), None, argv))
    saved = runs.with_secrets(runs.load_run(folder), given)
    old = TrainArgs.restore(saved.args, saved.folder / "args.yml")
    for key, value in given.items():
        if key not in MAY_CHANGE and value != getattr(old, key):
            raise ValueError(
                f"--resume {folder} goes on with {key}={getattr(old, key)!r}, but {redact(value)!r} is given; start a new run for that"
            )
    config = check_section(saved.config | {"env_kwargs": saved.env_kwargs}, find_algo(old.algo))
    config.n_timesteps = given.get("n_timesteps", config.n_timesteps)
    return TrainingRun(build(replace(old, **given), config, saved, argv))


if __name__ == "__main__":
    sys.exit(main())
