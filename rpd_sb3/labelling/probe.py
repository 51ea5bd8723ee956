"""Checks before a run begins: whether an environment can be made, and whether teacher and student fit it."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm

from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs import make_env
from rpd_sb3.labelling.views import check_spec, student_space


def probe(env_id: str, env_kwargs: dict[str, Any], teacher: Teacher | None) -> spaces.Space:
    """The student's observation space; makes one environment in this process, where errors have names, and closes it.

    :param env_id: environment
    :param env_kwargs: options of :func:`rpd_sb3.envs.make_env`
    :param teacher: that is to label it; None: no teacher
    :return: observation space
    :raises ValueError: if the environment cannot be made, or the teacher does not fit
    """
    spec = None if teacher is None else teacher.spec
    try:
        env = make_env(env_id, teacher=spec, **env_kwargs)
    except ValueError:
        raise
    except (TypeError, AssertionError, KeyError, AttributeError, ImportError, RuntimeError, gym.error.Error) as error:
        reason = str(error).split(" was raised from the environment creator")[0]
        no_renderer = any(sign in reason for sign in ("vk::", "Vulkan", "rendering device"))
        fix = "; python -m rpd_sb3.doctor says what to install" if no_renderer else ""
        raise ValueError(f"env {env_id!r} cannot be made with {env_kwargs or 'its defaults'}: {reason}{fix}") from error
    try:
        if spec is not None:
            check_spec(spec, env.observation_space, env.action_space)
        return student_space(env.observation_space)
    finally:
        env.close()


def check_observations(model: BaseAlgorithm, space: spaces.Space, name: str, env_id: str) -> None:
    """Check that a student takes the observations of an environment.

    :param model: the student
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
