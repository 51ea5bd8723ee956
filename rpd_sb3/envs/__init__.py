"""Environments and the wrappers that ask a teacher."""

from rpd_sb3.envs.action_tokens import ActionTokens
from rpd_sb3.envs.factory import make_env, make_vec_env
from rpd_sb3.envs.groups import EpisodeSeeds
from rpd_sb3.envs.teacher_wrapper import TeacherWrapper
from rpd_sb3.envs.vec_teacher import VecTeacher

__all__ = ["ActionTokens", "EpisodeSeeds", "TeacherWrapper", "VecTeacher", "make_env", "make_vec_env"]
