"""The policy that a command line names: the student of a run, an export, or a teacher."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.cli.config import merge, parse_pairs
from rpd_sb3.contract.device import check_device
from rpd_sb3.contract.secrets import redact
from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs.factory import check_env_id, with_visuals
from rpd_sb3.episodes.play import Actor, student_actor, teacher_actor
from rpd_sb3.export.loading import check_acted, check_observed, export_actor, load_export
from rpd_sb3.export.runtime import Policy
from rpd_sb3.labelling.probe import check_observations, probe
from rpd_sb3.students.device import set_threads
from rpd_sb3.teachers.registry import open_teacher
from rpd_sb3.train import folder as runs


class NamedPolicy(NamedTuple):
    """A student, an export or a teacher, and the environment that it acts in."""

    name: str
    policy: BaseAlgorithm | Policy | Teacher
    env_id: str
    env_kwargs: dict[str, Any]

    @property
    def teacher(self) -> Teacher | None:
        return None if isinstance(self.policy, (BaseAlgorithm, Policy)) else self.policy

    def actor(self, venv: VecEnv) -> Actor:
        """The policy as the episode loop takes it.

        :param venv: of ``env_id``, with the teacher if the policy is one
        :raises ValueError: if the environments do not take an export's actions
        """
        if isinstance(self.policy, BaseAlgorithm):
            return student_actor(self.policy)
        if not isinstance(self.policy, Policy):
            return teacher_actor(venv)
        check_acted(self.policy, venv.action_space, self.name, self.env_id)
        return export_actor(self.policy, venv.observation_space)


def open_policy(args: Any, closing: ExitStack) -> NamedPolicy:
    """Loads the policy that a command line names.

    :param args: of :func:`rpd_sb3.cli.common.add_policy_flags`
    :param closing: will close the policy
    :raises ValueError: if it cannot be loaded, or does not fit the environment
    :raises TeacherError: if a teacher service does not answer
    """
    env_kwargs = parse_pairs(args.env_kwargs, "--env-kwargs")
    if args.env:
        check_env_id(args.env)
    if args.teacher:
        return _open_teacher(args, env_kwargs, closing)
    return _load_export(args, env_kwargs) if args.export else _load_student(args, env_kwargs)


def _open_teacher(args: Any, env_kwargs: dict[str, Any], closing: ExitStack) -> NamedPolicy:
    teacher_kwargs = parse_pairs(args.teacher_kwargs, "--teacher-kwargs")
    teacher = open_teacher(args.teacher, args.env, teacher_kwargs, closing)
    probe(args.env, env_kwargs, teacher)
    return NamedPolicy(f"teacher {redact(args.teacher)}", teacher, args.env, env_kwargs)


def _load_export(args: Any, env_kwargs: dict[str, Any]) -> NamedPolicy:
    name = f"export {args.export}"
    policy = load_export(args.export)
    recorded = policy.manifest["environment"]
    env_id = args.env or recorded["id"]
    check_env_id(env_id)
    # Exports of before there were light visuals are of full ones.
    env_kwargs = merge(with_visuals(recorded["id"], recorded["env_kwargs"], None, default="full"), env_kwargs)
    check_observed(policy, probe(env_id, env_kwargs, None), name, env_id)
    return NamedPolicy(name, policy, env_id, env_kwargs)


def _load_student(args: Any, env_kwargs: dict[str, Any]) -> NamedPolicy:
    run = runs.load_run(args.run)
    path = run.model_file(args.model)
    model = runs.load_model(run.algo, path, device=check_device(args.device))
    env_id = args.env or run.args["env"]
    env_kwargs = merge(run.env_kwargs, env_kwargs)
    space = probe(env_id, env_kwargs, None)
    set_threads(None, str(model.device), space)
    check_observations(model, space, str(path), env_id)
    return NamedPolicy(str(path), model, env_id, env_kwargs)
