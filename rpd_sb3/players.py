"""Who plays where, from a command line: the student of a run, or a teacher itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from rpd_sb3 import runs
from rpd_sb3.config import merge, parse_pairs
from rpd_sb3.envs.factory import check_env_id
from rpd_sb3.session import check_device, open_teacher, probe, set_threads
from rpd_sb3.teachers import Teacher


class Player(NamedTuple):
    """A student or a teacher, and the environment that it plays in."""

    name: str
    player: BaseAlgorithm | Teacher
    env_id: str
    env_kwargs: dict[str, Any]

    @property
    def model(self) -> BaseAlgorithm | None:
        return self.player if isinstance(self.player, BaseAlgorithm) else None

    @property
    def teacher(self) -> Teacher | None:
        return None if isinstance(self.player, BaseAlgorithm) else self.player


def check_player(args: Any) -> None:
    """Make sure that a command line names one player.

    :param args: with ``run``, ``teacher``, ``teacher_kwargs`` and ``env``
    :raises ValueError: with what is wrong
    """
    if (args.run is None) == (args.teacher is None):
        raise ValueError(
            "name either a run, e.g. --run logs/rpd_ppo/PickCube-v1_1, or a teacher, e.g. --teacher scripted"
        )
    if args.teacher and args.env is None:
        raise ValueError("--env is missing: where shall the teacher act, e.g. --env PickCube-v1")
    if args.run and args.teacher_kwargs:
        raise ValueError("--teacher-kwargs are for --teacher, not for --run")


def open_player(args: Any, closing: ExitStack) -> Player:
    """The player that a command line names; ``closing`` will close it.

    :param args: as in :func:`check_player`, and ``model``, ``device``, ``env_kwargs``
    :raises ValueError: if there is none, or it does not fit the environment
    :raises TeacherError: if a teacher service does not answer
    """
    env_id, env_kwargs = args.env, parse_pairs(args.env_kwargs, "--env-kwargs")
    if env_id:
        check_env_id(env_id)
    if args.teacher:
        teacher_kwargs = parse_pairs(args.teacher_kwargs, "--teacher-kwargs")
        teacher = open_teacher(args.teacher, env_id, teacher_kwargs, closing)
        probe(env_id, env_kwargs, teacher)
        return Player(f"teacher {args.teacher}", teacher, env_id, env_kwargs)
    run = runs.load_run(args.run)
    path = run.best_model if args.model == "best" else run.last_model
    if args.model == "best" and not path.is_file():
        raise ValueError(f"run {args.run!r} has no best_model.zip yet; use --model last")
    model = runs.load_model(run.algo, path, device=check_device(args.device))
    env_id, env_kwargs = env_id or run.args["env"], merge(run.config.get("env_kwargs", {}), env_kwargs)
    space = probe(env_id, env_kwargs, None)
    set_threads(None, str(model.device), space)
    check_observations(model, space, str(path), env_id)
    return Player(str(path), model, env_id, env_kwargs)


def check_observations(model: BaseAlgorithm, space: spaces.Space, name: str, env_id: str) -> None:
    """Make sure that a student can look at what an environment shows.

    :param space: the environment's observations
    :param name: of the student, for the message
    :param env_id: of the environment, for the message
    :raises ValueError: if not
    """
    try:
        model.policy.obs_to_tensor(space.sample())  # also takes channels last
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(
            f"{name} was trained on {model.observation_space}, but env {env_id!r} shows {space}"
        ) from error
