"""The hand's pose, computed in less time: the same bits as ManiSkill's."""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController
from mani_skill.utils.structs import Pose

from rpd_sb3.envs import make_env
from rpd_sb3.envs.controllers import pose_at_base


def random_pose(rng: np.random.Generator) -> sapien.Pose:
    quaternion = rng.normal(size=4)
    return sapien.Pose(rng.normal(size=3), quaternion / np.linalg.norm(quaternion))


def test_the_pose_has_the_bits_of_maniskills() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        base, hand = random_pose(rng), random_pose(rng)
        theirs = (Pose.create(base).inv() * Pose.create(hand)).raw_pose[0].numpy()
        ours = pose_at_base(base, hand)
        assert ours.tobytes() == theirs.tobytes(), (base, hand)


def test_the_arms_controller_uses_it_also_in_a_scene_that_is_built_again() -> None:
    env = make_env("PushCube-v1")
    for options in (None, {"reconfigure": True}):
        env.reset(seed=0, options=options)
        env.step(np.full(7, 0.3, np.float32))
        arm: Any = env.unwrapped.agent.controller.controllers["arm"]  # type: ignore[attr-defined]
        assert type(arm).ee_pose_at_base is not PDEEPosController.ee_pose_at_base
        theirs = PDEEPosController.ee_pose_at_base.fget(arm)  # type: ignore[attr-defined]
        assert arm.ee_pose_at_base.raw_pose.numpy().tobytes() == theirs.raw_pose.numpy().tobytes()
    env.close()


def test_other_controllers_stay_as_they_are() -> None:
    env = make_env("PushCube-v1", control_mode="pd_joint_delta_pos")
    env.reset(seed=0)
    kinds = [type(c).__module__ for c in env.unwrapped.agent.controller.controllers.values()]  # type: ignore[attr-defined]
    assert all(module.startswith("mani_skill.") for module in kinds)
    env.close()
