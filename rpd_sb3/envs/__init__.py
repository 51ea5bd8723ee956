"""Environments: ManiSkill's tasks and any other Gymnasium id."""

from rpd_sb3.envs.action_tokens import ActionTokens
from rpd_sb3.envs.factory import make_env, make_vec_env
from rpd_sb3.envs.groups import EpisodeSeeds

__all__ = ["ActionTokens", "EpisodeSeeds", "make_env", "make_vec_env"]
