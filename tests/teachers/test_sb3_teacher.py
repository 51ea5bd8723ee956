"""A saved SB3 policy as a teacher."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from sb3_contrib import RecurrentPPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import make_teacher


@pytest.mark.parametrize("algorithm", [PPO, SAC])
def test_it_answers_with_the_deterministic_action(algorithm: type, tmp_path: Path) -> None:
    model = algorithm("MlpPolicy", "Pendulum-v1", seed=0)
    model.save(tmp_path / "model.zip")
    teacher = make_teacher(f"sb3:{tmp_path / 'model.zip'}", "Pendulum-v1")
    venv = VecTeacher(DummyVecEnv([lambda: gym.make("Pendulum-v1")] * 3), teacher)
    obs = venv.reset()
    np.testing.assert_array_equal(venv.label()["action"], model.predict(obs, deterministic=True)[0])
    teacher.close()


def test_a_distilled_student_can_teach_again(tmp_path: Path) -> None:
    PPO("MlpPolicy", "Pendulum-v1", seed=0).save(tmp_path / "first.zip")
    teacher = make_teacher(f"sb3:{tmp_path / 'first.zip'}", "Pendulum-v1")
    student = RPD(
        "MlpPolicy", VecTeacher(DummyVecEnv([lambda: gym.make("Pendulum-v1")]), teacher), n_steps=64, batch_size=32
    )
    student.learn(64)
    student.save(tmp_path / "second.zip")
    second = make_teacher(f"sb3:{tmp_path / 'second.zip'}", "Pendulum-v1")
    assert second.spec.action_space == student.action_space
    for each in (teacher, second):
        each.close()


class Picture(gym.Env):
    observation_space = spaces.Box(0, 255, (40, 52, 3), np.uint8)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (40, 52, 3), np.uint8), {}

    def step(self, action):
        return self.reset()[0], 0.0, False, False, {}


def test_an_image_policy_asks_for_its_camera_at_its_size(tmp_path: Path) -> None:
    model = PPO("CnnPolicy", Picture(), n_steps=8, batch_size=8)
    model.save(tmp_path / "model.zip")
    teacher = make_teacher(f"sb3:{tmp_path / 'model.zip'}", "Picture-v0", camera="base")
    assert teacher.spec.inputs == ("images.base",)
    assert teacher.spec.image_sizes == {"base": (40, 52)}
    venv = VecTeacher(DummyVecEnv([Picture] * 2), teacher)
    venv.reset()
    assert venv.label()["action"].shape == (2, 2)
    teacher.close()


def test_a_recurrent_policy_is_refused(tmp_path: Path) -> None:
    RecurrentPPO("MlpLstmPolicy", "Pendulum-v1", n_steps=8, batch_size=8).save(tmp_path / "model.zip")
    with pytest.raises(ValueError, match="is recurrent: its answer depends on a history"):
        make_teacher(f"sb3:{tmp_path / 'model.zip'}", "Pendulum-v1")


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model '.*none\.zip' does not exist"):
        make_teacher(f"sb3:{tmp_path / 'none.zip'}", "Pendulum-v1")
    (tmp_path / "text.zip").write_text("not a zip")
    with pytest.raises(ValueError, match="is not a zip file written by SB3's save"):
        make_teacher(f"sb3:{tmp_path / 'text.zip'}", "Pendulum-v1")
