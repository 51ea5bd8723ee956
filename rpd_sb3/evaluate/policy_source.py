"""Who plays where, from a command line: the student of a run, an export of one, or a teacher itself."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.cli.config import merge, parse_pairs
from rpd_sb3.contract.secrets import redact
from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs.factory import check_env_id
from rpd_sb3.episodes.play import Actor, student_actor, teacher_actor
from rpd_sb3.export.loading import check_acted, check_observed, export_actor, load_export
from rpd_sb3.export.runtime import Policy
from rpd_sb3.labelling.probe import check_observations, probe
from rpd_sb3.students.device import check_device, set_threads
from rpd_sb3.teachers.registry import open_teacher
from rpd_sb3.train import folder as runs


class Player(NamedTuple):
    """A student, an export or a teacher, and the environment that it plays in."""

    name: str
    player: BaseAlgorithm | Policy | Teacher
    env_id: str
    env_kwargs: dict[str, Any]

    @property
    def teacher(self) -> Teacher | None:
        return None if isinstance(self.player, (BaseAlgorithm, Policy)) else self.player

    def actor(self, venv: VecEnv) -> Actor:
        """Who plays in these environments.

        :param venv: of ``env_id``, with the teacher if it is to play
        :raises ValueError: if the environments do not take an export's actions
        """
        if isinstance(self.player, BaseAlgorithm):
            return student_actor(self.player)
        if not isinstance(self.player, Policy):
            return teacher_actor(venv)
        check_acted(self.player, venv.action_space, self.name, self.env_id)
        return export_actor(self.player, venv.observation_space)


def open_player(args: Any, closing: ExitStack) -> Player:
    """The player that a command line names; ``closing`` will close it.

    :param args: of :func:`rpd_sb3.cli.common.add_player_flags`, and ``device``
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
        return Player(f"teacher {redact(args.teacher)}", teacher, env_id, env_kwargs)
    if args.export:
        name, policy = f"export {args.export}", load_export(args.export)
        recorded = policy.manifest["environment"]
        env_id, env_kwargs = env_id or recorded["id"], merge(recorded["env_kwargs"], env_kwargs)
        check_env_id(env_id)
        check_observed(policy, probe(env_id, env_kwargs, None), name, env_id)
        return Player(name, policy, env_id, env_kwargs)
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
