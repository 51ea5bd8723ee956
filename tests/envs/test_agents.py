"""The robot's numbers, computed in less time: the same bits as ManiSkill's."""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
from mani_skill.agents.controllers.pd_ee_pose import PDEEPosController
from mani_skill.agents.robots.panda.panda import Panda
from mani_skill.utils.structs import Pose

from rpd_sb3.envs import make_env
from rpd_sb3.envs.agents import pose_at_base
from rpd_sb3.teachers import Query, make_teacher


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


def test_a_grasp_is_what_maniskill_calls_one() -> None:
    teacher = make_teacher("scripted", "PickCube-v1")
    env = make_env("PickCube-v1", teacher=teacher.spec, on_success="continue")
    scene: Any = env.unwrapped
    asked = []
    compute = type(scene.agent).is_grasping

    obs, _ = env.reset(seed=0)
    for step in range(25):
        query = Query({"privileged": obs["teacher/privileged"][None]}, np.array([0]), np.array([step == 0]))
        obs = env.step(teacher.submit(query).result()["action"][0])[0]
        for limits in ((), (0.5, 20), (50.0,)):
            ours, theirs = (
                compute(scene.agent, scene.cube, *limits),
                Panda.is_grasping(scene.agent, scene.cube, *limits),
            )
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert bool(ours) == bool(theirs)
            asked.append((limits, bool(ours)))
    assert {((), True), ((), False), ((50.0,), False)} <= set(asked)
    assert compute is not Panda.is_grasping
    env.close()
    teacher.close()
