"""ManiSkill behind the plain Gymnasium API: views, episode ends, seeds. These tests run the real simulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.env_checker import check_env

from rpd_sb3.contract.teacher import LocalTeacher, TeacherSpec
from rpd_sb3.envs import make_env, make_vec_env
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.labelling import TeacherWrapper
from rpd_sb3.labelling.vec_teacher import VecTeacher
from rpd_sb3.teachers import Query, make_teacher

HORIZONS = {"RollBall-v1": 80, "PullCubeTool-v1": 100}
ACTIONS = spaces.Box(-1, 1, (7,), np.float32)


def spec(*inputs: str, **kwargs: Any) -> TeacherSpec:
    return TeacherSpec("test", frozenset({"action"}), inputs, ACTIONS, **kwargs)


@pytest.fixture(scope="module")
def pick_cube() -> Iterator[gym.Env]:
    env = make_env("PickCube-v1", teacher=spec("privileged"))
    yield env
    env.close()


@pytest.fixture(scope="module")
def renderer() -> Iterator[None]:
    """Keeps shaders and meshes loaded; without an environment that renders, the next one compiles them again (5 s)."""
    env = make_env("PushCube-v1", obs="rgb", image_size=8)
    yield
    env.close()


def rollout(env: gym.Env, seed: int | None, n: int, action_seed: int = 0) -> list[np.ndarray]:
    """Observations of n random steps after a reset."""
    rng = np.random.default_rng(action_seed)
    obs, _ = env.reset(seed=seed)
    states = [obs["state"]]
    for _ in range(n):
        obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 7))
        states.append(obs["state"])
        if terminated or truncated:
            break
    return states


@pytest.mark.parametrize("task", list(TASKS))
def test_every_task_runs_to_its_time_limit_and_reports_success(task: str) -> None:
    env = make_env(task)
    assert env.observation_space.shape == env.reset(seed=0)[0].shape
    assert env.action_space == ACTIONS
    steps, done = 0, False
    while not done:
        _, reward, terminated, truncated, info = env.step(np.array([0, 0, 0.2, 0, 0, 0, 1], np.float32))
        steps, done = steps + 1, terminated or truncated
        assert reward == 0.0
        assert info["is_success"] is False
    assert (steps, truncated, terminated) == (HORIZONS.get(task, 50), True, False)
    assert (info["success_once"], info["success_at_end"]) == (False, False)
    env.close()


def test_a_seed_fixes_an_episode_whatever_came_before(pick_cube: gym.Env) -> None:
    first = rollout(pick_cube, seed=3, n=20)
    rollout(pick_cube, seed=4, n=13, action_seed=1)
    again = rollout(pick_cube, seed=3, n=20)
    np.testing.assert_array_equal(first, again)


def test_later_episodes_follow_from_the_seed_alone(pick_cube: gym.Env) -> None:
    pick_cube.reset(seed=3)
    second = pick_cube.reset()[0]["state"]
    third = pick_cube.reset()[0]["state"]
    rollout(pick_cube, seed=3, n=7)
    np.random.seed(123)  # noqa: NPY002  (the generator that ManiSkill draws from)
    np.testing.assert_array_equal(pick_cube.reset()[0]["state"], second)
    np.testing.assert_array_equal(pick_cube.reset()[0]["state"], third)
    assert not np.array_equal(second, third)


def play_expert(env: gym.Env, n: int) -> list[tuple[float, bool, bool, dict[str, Any]]]:
    teacher = make_teacher("scripted", "PickCube-v1")
    obs, _ = env.reset(seed=10_000)
    steps: list[tuple[float, bool, bool, dict[str, Any]]] = []
    for _ in range(n):
        query = Query({"privileged": obs["teacher/privileged"][None]}, np.array([0]), np.array([False]))
        obs, *rest = env.step(teacher.submit(query).result()["action"][0])
        steps.append(tuple(rest))  # type: ignore[arg-type]
        if rest[1] or rest[2]:
            break
    teacher.close()
    return steps


@pytest.mark.parametrize(
    ("on_success", "terminated", "truncated"), [("terminate", True, False), ("truncate", False, True)]
)
def test_success_ends_the_episode_as_asked(on_success: str, terminated: bool, truncated: bool) -> None:
    env = make_env("PickCube-v1", on_success=on_success, teacher=spec("privileged"))
    steps = play_expert(env, 50)
    assert len(steps) < 50
    assert steps[-1][:3] == (1.0, terminated, truncated)
    assert steps[-1][3]["is_success"] is steps[-1][3]["success_once"] is True
    env.close()


def test_evaluation_goes_on_after_success() -> None:
    env = make_env("PickCube-v1", on_success="continue", teacher=spec("privileged"))
    steps = play_expert(env, 60)
    assert len(steps) == 50
    assert sum(reward for reward, *_ in steps) > 5, "each successful step is rewarded"
    assert steps[-1][1:3] == (False, True)
    env.close()


def test_dense_reward_is_shaped() -> None:
    env = make_env("PickCube-v1", reward="dense")
    env.reset(seed=0)
    rewards = [env.step(np.array([0, 0, -0.3, 0, 0, 0, 1], np.float32))[1] for _ in range(5)]
    assert all(0 < reward < 1 for reward in rewards)
    assert len(set(rewards)) == 5
    env.close()


def test_a_camera_can_be_moved_and_keeps_its_size_and_field_of_view(renderer: None) -> None:
    from rpd_sb3.envs.maniskill import human_camera

    pose = [*np.array(human_camera("PushCube-v1")["pose"]) + [0, 0, 0.1, 0, 0, 0, 0]]
    frames = []
    for override in ({}, {"base_camera": {"pose": pose}}):
        env = make_env("PushCube-v1", obs="rgb", image_size=84, sensor_configs=override)
        frames.append(env.reset(seed=0)[0].astype(int))
        camera = env.unwrapped.scene.sensors["base_camera"].config
        assert (camera.width, camera.height, camera.fov) == (84, 84, 1)
        env.close()
    assert np.abs(frames[0] - frames[1]).mean() > 5


def test_a_crop_is_a_part_of_the_cameras_image_in_more_detail(renderer: None) -> None:
    whole, crop = make_env("PickCube-v1", obs="rgb", image_size=128), (32 / 128, 56 / 128, 0.5)
    part = make_env("PickCube-v1", obs="rgb", image_size=64, crop=crop)
    for options in ({}, {"reconfigure": True}):
        (frame, _), (cut, _) = (env.reset(seed=1, options=options) for env in (whole, part))
        differs = (frame[56:120, 32:96] != cut).any(axis=-1)
        assert differs.mean() < 0.01, "the same rays; edges of triangles fall to either side"
    whole.close()
    part.close()


def test_a_crop_of_what_the_teacher_sees_is_cut_out_of_it(renderer: None) -> None:
    looks = spec("images.human", image_sizes={"human": (96, 96)})
    env = make_env("PickCube-v1", obs="rgb", image_size=48, crop=[0.25, 0.5, 0.5], teacher=looks)
    obs, _ = env.reset(seed=0)
    np.testing.assert_array_equal(obs["rgb"], obs["teacher/images.human"][48:96, 24:72])
    env.close()


def test_the_time_limit_is_in_the_spec(pick_cube: gym.Env) -> None:
    assert pick_cube.spec is not None
    assert pick_cube.spec.max_episode_steps == 50


def test_images_have_the_asked_size_and_show_the_goal_marker(renderer: None) -> None:
    env = make_env("PickCube-v1", obs="rgb+state", image_size=128)
    assert env.observation_space["rgb"] == spaces.Box(0, 255, (128, 128, 3), np.uint8)  # type: ignore[index]
    obs, _ = env.reset(seed=1)
    assert obs["state"].shape == (25,)
    red, green, blue = obs["rgb"].astype(int).transpose(2, 0, 1)
    assert ((green > 1.5 * red) & (green > 1.5 * blue) & (green > 60)).sum() > 10, "the green sphere"
    env.close()


@pytest.mark.parametrize("task", list(TASKS))
def test_a_student_of_any_task_sees_frames_and_itself_but_nothing_of_the_scripted_teachers(
    task: str, renderer: None
) -> None:
    teacher = make_teacher("scripted", task)
    options: dict[str, Any] = {"obs": "rgb+state", "image_size": 128, "teacher": teacher.spec}
    venv = VecTeacher(make_vec_env(task, 1, seed=3, vec_env="dummy", **options), teacher)
    image, joints = spaces.Box(0, 255, (128, 128, 3), np.uint8), spaces.Box(-np.inf, np.inf, (25,), np.float32)
    assert venv.observation_space == spaces.Dict({"rgb": image, "state": joints})
    assert set(venv.venv.observation_space.spaces) == {"rgb", "state", "teacher/privileged"}  # type: ignore[attr-defined]
    frames = []
    for seed in (3, 4, 3):
        venv.seed(seed)
        obs: Any = venv.reset()
        assert venv.observation_space.contains({key: values[0] for key, values in obs.items()})
        frames.append(obs["rgb"])
    assert frames[0].std() > 10, "it shows something"
    np.testing.assert_array_equal(frames[0], frames[2])
    assert (frames[0] != frames[1]).any()
    venv.close()


def test_the_side_view_differs_from_the_base_camera(renderer: None) -> None:
    frames = []
    for camera in ("human", "base"):
        env = make_env("PushCube-v1", obs="rgb", camera=camera, image_size=64)
        frames.append(env.reset(seed=1)[0].astype(int))
        env.close()
    assert np.abs(frames[0] - frames[1]).mean() > 5


def test_stack_cube_has_one_camera(renderer: None) -> None:
    env = make_env("StackCube-v1", obs="rgb", image_size=64)
    assert env.reset(seed=0)[0].shape == (64, 64, 3)
    assert list(env.unwrapped.scene.sensors) == ["base_camera"]  # type: ignore[attr-defined]
    env.close()


def test_a_teacher_with_images_sees_them_at_its_size_and_is_told_what_to_do(renderer: None) -> None:
    class Looker(LocalTeacher):
        spec = spec("images.human", "instruction", image_sizes={"human": (96, 96)})

        def label(self, query: Query) -> dict[str, np.ndarray]:
            self.query = query
            return {"action": np.zeros((len(query.env_ids), 7), np.float32)}

    teacher = Looker()
    venv = make_vec_env("PushCube-v1", 2, seed=0, vec_env="dummy", teacher=teacher.spec, obs="rgb", image_size=48)
    wrapped = VecTeacher(venv, teacher, wait=True)
    assert wrapped.reset().shape == (2, 48, 48, 3)
    wrapped.step(np.zeros((2, 7), np.float32))
    assert teacher.query.inputs["images.human"].shape == (2, 96, 96, 3)
    assert list(teacher.query.inputs["instruction"]) == ["push the cube away from the robot base"] * 2
    wrapped.close()
    teacher.close()


def test_student_without_images_does_not_limit_the_size_of_the_teachers(renderer: None) -> None:
    env = make_env("PushCube-v1", teacher=spec("images.human", image_sizes={"human": (64, 64)}))
    assert env.observation_space["teacher/images.human"].shape == (64, 64, 3)
    env.close()


def test_the_teachers_wrapper_around_maniskill_passes_check_env() -> None:
    teacher = make_teacher("scripted", "PickCube-v1")
    env = TeacherWrapper(make_env("PickCube-v1", teacher=teacher.spec), teacher)
    check_env(env)
    env.close()
    teacher.close()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"obs": "depth"}, "obs='depth' is unknown; choose one of state, rgb"),
        ({"reward": "shaped"}, "reward='shaped' is unknown"),
        ({"camera": "wrist"}, "camera='wrist' is unknown"),
        ({"on_success": "stop"}, "on_success='stop' is unknown"),
        (
            {"obs": "rgb", "crop": [0.6, 0.2, 0.5]},
            r"crop=\[0.6, 0.2, 0.5\] must be left, top and side of a square within",
        ),
        ({"obs": "rgb", "crop": 0.5}, "crop=0.5 must be three numbers"),
        ({"image_size": 4}, "image_size=4 must be between 8 and"),
        ({"teacher": spec("images.wrist")}, "the teacher asks for 'images.wrist', but env 'PickCube-v1'.*images.human"),
        ({"teacher": spec("privileged", env_id="PushCube-v1")}, "only knows env 'PushCube-v1', not 'PickCube-v1'"),
        ({"teacher": spec("privileged", control_mode="pd_joint_pos")}, "gives actions for control_mode='pd_joint_pos'"),
        ({"teacher": spec("privileged", rotation="euler_xyz")}, "gives rotation='euler_xyz'.*takes 'axis_angle'"),
    ],
)
def test_options_that_do_not_exist_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_env("PickCube-v1", **kwargs)


def test_other_gymnasium_environments_are_made_too() -> None:
    env = make_env("CartPole-v1")
    assert env.reset(seed=0)[0].shape == (4,)
    with pytest.raises(ValueError, match="'CartPole-v1' is not a ManiSkill task: it has no option obs"):
        make_env("CartPole-v1", obs="rgb")
    with pytest.raises(ValueError, match="unknown to ManiSkill and Gymnasium; did you mean 'PickCube-v1'"):
        make_env("PickCub-v1")
