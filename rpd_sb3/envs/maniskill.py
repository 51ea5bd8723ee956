"""ManiSkill tasks as plain Gymnasium environments: numpy, one episode at a time, reproducible per seed.

Shape letters: H and W pixels, S state values, A action dimensions.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import cv2
import gymnasium as gym
import mani_skill.envs  # noqa: F401  (registers the tasks)
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from mani_skill.utils import common
from mani_skill.utils.gym_utils import find_max_episode_steps_value
from mani_skill.utils.logging_utils import logger as maniskill_logger
from mani_skill.utils.wrappers import CPUGymWrapper

from rpd_sb3.contract.names import check_choice
from rpd_sb3.contract.privileged import SIZE as PRIVILEGED_SIZE
from rpd_sb3.contract.privileged import field_slices
from rpd_sb3.contract.teacher import TEACHER_PREFIX, sees_images
from rpd_sb3.envs.agents import use_fast_agent
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.envs.visuals import VISUALS, use_light_visuals

PROPRIOCEPTION_SIZE = 9 + 9 + 7  # joint positions, joint velocities, pose of the tool centre point
PROPRIOCEPTION_SPACE = spaces.Box(-np.inf, np.inf, (PROPRIOCEPTION_SIZE,), np.float32)

# A warning for authors of scenes; some tasks log it three times for each environment.
maniskill_logger.addFilter(lambda record: "No initial pose set" not in record.getMessage())


class View(NamedTuple):
    """What an environment's observations hold, and how its episodes end."""

    obs: str
    """Student's view: ``state``, ``rgb`` or ``rgb+state`` (image and proprioception)."""
    camera: str
    image_size: int
    on_success: str
    """``terminate`` the episode, ``truncate`` it (the RPD authors bootstrap the value on success too),
    or ``continue`` until the time limit (evaluation)."""
    teacher_inputs: tuple[str, ...] = ()
    """Inputs given under ``teacher/``: ``privileged``, ``state``, ``images.<camera>``; ``instruction`` is an attribute."""
    teacher_image_size: int | None = None
    """Side of the teacher's image; None: the student's. The student's is then a downscaled copy."""
    visuals: str = "full"
    """``full``, as ManiSkill ships the scene, or ``light`` (:mod:`rpd_sb3.envs.visuals`)."""
    crop: tuple[float, float, float] | None = None
    """Left, top and side of the square that the student sees, as shares of the camera's image; None: all of it."""

    @property
    def renders(self) -> bool:
        return self.obs != "state" or self.shows_teacher

    @property
    def needs_state(self) -> bool:
        return self.obs == "state" or "state" in self.teacher_inputs

    @property
    def shows_teacher(self) -> bool:
        """True if the teacher looks at the camera's image, so that all of it is rendered."""
        return sees_images(self.teacher_inputs)

    @property
    def observed_inputs(self) -> tuple[str, ...]:
        return tuple(name for name in self.teacher_inputs if name != "instruction")

    @property
    def render_size(self) -> int:
        return self.teacher_image_size or self.image_size


@cache
def human_camera(env_id: str) -> dict[str, Any]:
    """Pose and field of view of the task's side-view camera (``human`` in the RPD paper, section III-B)."""
    env = gym.make(env_id, obs_mode="none", sim_backend="physx_cpu", render_backend="cpu")
    config = env.unwrapped.scene.human_render_cameras["render_camera"].config  # type: ignore[attr-defined]
    pose = config.pose.raw_pose[0].tolist()
    env.close()
    return {"pose": pose, "fov": config.fov}


def make_maniskill(
    env_id: str,
    view: View,
    reward: str,
    control_mode: str,
    render_mode: str | None = None,
    sensor_configs: dict[str, Any] | None = None,
    **env_kwargs: Any,
) -> gym.Env:
    """One ManiSkill task on the CPU behind the plain Gymnasium API.

    :param env_id: a ManiSkill id, e.g. ``PickCube-v1``
    :param view: what student and teacher see
    :param reward: ``sparse`` (1 on success, else 0) or ``dense`` (ManiSkill's normalized_dense)
    :param control_mode: name of a ManiSkill controller
    :param render_mode: Gymnasium's; ``rgb_array`` for videos
    :param sensor_configs: overrides for ManiSkill's cameras, on top of those of ``view``: ``{base_camera: {pose: [...]}}``
        moves the one that is looked through, and keeps its field of view and size
    :param env_kwargs: further arguments of the ManiSkill environment
    """
    if env_id == "StackCube-v1":
        # Its default robot carries a second camera whose image does not fit the first one's.
        env_kwargs.setdefault("robot_uids", "panda")
    if view.renders:
        base_camera = {"width": view.render_size, "height": view.render_size}
        if view.camera == "human":
            base_camera |= human_camera(env_id)
        given = sensor_configs or {}
        sensor_configs = given | {"base_camera": base_camera | given.get("base_camera", {})}
    with torch.inference_mode():
        env = gym.make(
            env_id,
            obs_mode="state" if view.needs_state else "none",  # the adapter renders its one camera itself
            reward_mode="sparse" if reward == "sparse" else "normalized_dense",
            control_mode=control_mode,
            sim_backend="physx_cpu",
            render_backend="cuda" if torch.cuda.is_available() else "cpu",
            render_mode=render_mode,
            sensor_configs=sensor_configs or {},
            **env_kwargs,
        )
        return ManiSkillAdapter(env_id, CPUGymWrapper(env), view)


class ManiSkillAdapter(gym.Wrapper):
    """One ManiSkill environment with views for student and teacher, ends of episodes as asked for, and seeds for each episode.

    ``info`` carries ``is_success`` at every step, and ``success_once`` and ``success_at_end`` at the last one.
    After ``reset(seed=s)`` the seeds of all later episodes follow from ``s`` alone: not from the steps taken, other
    environments, or the global generators that ManiSkill itself draws from.
    """

    def __init__(self, env_id: str, env: CPUGymWrapper, view: View) -> None:
        super().__init__(env)
        self.view = view
        self.task = TASKS.get(env_id)
        self._scene: Any = env.unwrapped
        self._episode_seeds = np.random.default_rng()
        self._slices = field_slices()
        self._success_once = False
        if "privileged" in view.teacher_inputs and self.task is None:
            raise ValueError(
                f"env {env_id!r} has no privileged state for a scripted teacher; tasks that have: {', '.join(TASKS)}"
            )
        self._prepare_scene()
        self.action_space = env.action_space
        self.observation_space = self._spaces(env.observation_space)

    @property
    def instruction(self) -> str:
        """The instruction for a VLA (paper, Table I); empty for a task that is not the paper's."""
        return self.task.instruction if self.task else ""

    @property
    def spec(self) -> EnvSpec | None:  # type: ignore[override]
        """Gymnasium's, with the time limit, which ManiSkill keeps to itself."""
        spec = super().spec
        if spec is not None and spec.max_episode_steps is None:
            spec.max_episode_steps = find_max_episode_steps_value(self.env)
        return spec

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self._episode_seeds = np.random.default_rng(seed)
        else:
            seed = int(self._episode_seeds.integers(2**31))
        with torch.inference_mode():
            raw, raw_info = self.env.reset(seed=seed, options=options)
            if raw_info["reconfigure"]:
                self._prepare_scene()
            self._success_once = False
            return self._observation(raw), {"is_success": False}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        with torch.inference_mode():
            raw, reward, _, truncated, raw_info = self.env.step(np.asarray(action, np.float32))
            obs = self._observation(raw)
        success = bool(raw_info["success"])
        self._success_once |= success
        truncated = bool(truncated)
        terminated = False
        if success and self.view.on_success == "terminate":
            terminated, truncated = True, False
        elif success and self.view.on_success == "truncate":
            truncated = True
        info = {"is_success": success}
        if terminated or truncated:
            info |= {"success_once": self._success_once, "success_at_end": success}
        return obs, float(reward), terminated, truncated, info

    def _prepare_scene(self) -> None:
        """What is to be done whenever ManiSkill has built the scene."""
        use_fast_agent(self._scene.agent)
        view = self.view
        if view.renders and view.camera == "human":
            self._unhide()
        if view.renders and view.visuals == "light":
            use_light_visuals(self._scene.scene.sub_scenes[0])
        if view.renders and view.crop is not None and not view.shows_teacher:
            self._render_crop_only(*view.crop)

    def _render_crop_only(self, left: float, top: float, side: float) -> None:
        """Spend all pixels of the camera on a square of its image: the same rays, more closely.

        :param left: of the square, as a share of the image
        :param top: likewise
        :param side: likewise
        """
        (camera,) = self._scene.scene.sensors["base_camera"].camera._render_cameras
        cx, cy = (camera.cx - left * camera.width) / side, (camera.cy - top * camera.height) / side
        camera.set_perspective_parameters(
            camera.near, camera.far, camera.fx / side, camera.fy / side, cx, cy, camera.skew
        )

    def _unhide(self) -> None:
        """Show what ManiSkill hides from its sensors: PickCube's goal marker (paper, section III-B)."""
        hidden = self._scene._hidden_objects
        for actor in hidden:
            actor.show_visual()
        hidden.clear()

    def _spaces(self, state: spaces.Space) -> spaces.Space:
        """Of the observations.

        :param state: ManiSkill's space: that of the state, or nothing if nobody reads it
        """
        view = self.view
        image = spaces.Box(0, 255, (view.image_size, view.image_size, 3), np.uint8)
        student: dict[str, spaces.Space] = {"state": state} if view.obs == "state" else {"rgb": image}
        if view.obs == "rgb+state":
            student["state"] = PROPRIOCEPTION_SPACE
        teacher: dict[str, spaces.Space] = {}
        for name in view.observed_inputs:
            space: spaces.Space
            if name == "privileged":
                space = spaces.Box(-np.inf, np.inf, (PRIVILEGED_SIZE,), np.float32)
            elif name == "state":
                space = state
            else:
                space = spaces.Box(0, 255, (view.render_size, view.render_size, 3), np.uint8)
            teacher[TEACHER_PREFIX + name] = space
        if len(student) == 1 and not teacher:
            return next(iter(student.values()))
        return spaces.Dict(student | teacher)

    def _observation(self, state: Any) -> Any:
        view = self.view
        frame = self.render_frame() if view.renders else None
        obs = {"state": state} if view.obs == "state" else {"rgb": self._student_image(frame)}
        if view.obs == "rgb+state":
            obs["state"] = self._proprioception()
        if len(obs) == 1 and not view.observed_inputs:
            return next(iter(obs.values()))
        for name in view.observed_inputs:
            value: Any = self._privileged() if name == "privileged" else state if name == "state" else frame
            obs[TEACHER_PREFIX + name] = value
        return obs

    def render_frame(self) -> np.ndarray:
        """What the camera sees now, ``(H, W, 3)`` uint8.

        ManiSkill's own would come with the camera's matrices and a state that nobody reads.
        """
        for actor in self._scene._hidden_objects:
            actor.hide_visual()
        scene = self._scene.scene
        scene.update_render(update_sensors=True, update_human_render_cameras=False)
        sensor = scene.sensors["base_camera"]
        sensor.capture()
        (picture,) = sensor.camera.get_picture(["Color"])
        frame = sensor.config.shader_config.texture_transforms["Color"](picture)["rgb"]
        return np.ascontiguousarray(common.to_numpy(frame)[0])

    def _student_image(self, frame: Any) -> np.ndarray:
        size = self.view.image_size
        if self.view.crop is not None and self.view.shows_teacher:
            left, top, side = (round(share * frame.shape[0]) for share in self.view.crop)
            frame = frame[top : top + side, left : left + side]
        if frame.shape[0] == size:
            return frame
        return cv2.resize(frame, (size, size), interpolation=cv2.INTER_AREA)

    def _proprioception(self) -> np.ndarray:
        """Joint positions and velocities and the tool's pose, (25,), which a real arm measures too."""
        agent = self._scene.agent
        parts = (agent.robot.qpos[0], agent.robot.qvel[0], agent.tcp.pose.raw_pose[0])
        return np.concatenate([common.to_numpy(part) for part in parts]).astype(np.float32)

    def _privileged(self) -> np.ndarray:
        """The vector laid out in :mod:`rpd_sb3.contract.privileged`, (S,)."""
        assert self.task is not None
        # SAPIEN's own objects: ManiSkill's make batched tensors of each pose, which took a tenth of the whole step.
        robot = self._scene.agent.robot._objs[0]
        to_base = robot.root_pose.inv()
        out = np.zeros(PRIVILEGED_SIZE, np.float32)

        def put_pose(field: str, pose: Any) -> None:
            out[self._slices[field]] = (*pose.p, *pose.q)

        put_pose("tcp_pose", to_base * self._scene.agent.tcp._objs[0].entity_pose)
        out[self._slices["gripper"]] = robot.qpos[-2:].mean()
        target = getattr(self._scene, self.task.object)
        put_pose("object_pose", to_base * target._objs[0].pose)
        velocity = to_base.to_transformation_matrix()[:3, :3] @ target._bodies[0].linear_velocity
        out[self._slices["object_velocity"]] = velocity
        if self.task.tool is not None:
            put_pose("tool_pose", to_base * getattr(self._scene, self.task.tool)._objs[0].pose)
        if self.task.goal is not None:
            out[self._slices["goal"]] = (to_base * getattr(self._scene, self.task.goal)._objs[0].pose).p
        return out


def check_view(env_id: str, view: View, reward: str) -> None:
    """Checks the options of an environment.

    :param env_id: for the message
    :param view: what student and teacher see
    :param reward: ``sparse`` or ``dense``
    :raises ValueError: for an unknown value of an option, or an input of the teacher that the environment does not have
    """
    owner = f"env {env_id!r}"
    check_choice(owner, "obs", view.obs, ("state", "rgb", "rgb+state"))
    check_choice(owner, "reward", reward, ("sparse", "dense"))
    check_choice(owner, "camera", view.camera, ("human", "base"))
    check_choice(owner, "on_success", view.on_success, ("terminate", "truncate", "continue"))
    check_choice(owner, "visuals", view.visuals, VISUALS)
    if view.crop is not None:
        left, top, side = view.crop
        if not (left >= 0 and top >= 0 and 0 < side <= 1 - max(left, top)):
            raise ValueError(
                f"{owner}: crop={list(view.crop)} must be left, top and side of a square within the image, as shares of it"
            )
    if view.image_size < 8 or view.image_size > view.render_size:
        raise ValueError(
            f"env {env_id!r}: image_size={view.image_size} must be between 8 and the teacher's {view.render_size} pixels"
        )
    available = ("privileged", "state", f"images.{view.camera}", "instruction")
    for name in view.teacher_inputs:
        if name not in available:
            raise ValueError(
                f"the teacher asks for {name!r}, but env {env_id!r} with camera={view.camera!r} gives {', '.join(available)}"
            )
