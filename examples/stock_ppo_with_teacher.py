"""Stock SB3 PPO with a teacher looking over its shoulder: our wrapper in an existing training script.

VecTeacher goes around the VecEnv; the student trains as before, and every transition's info dict says what the teacher
would have done. Here a callback logs how far the student is from its teacher; nothing is distilled.

    python examples/stock_ppo_with_teacher.py --timesteps 4096
"""

from __future__ import annotations

import argparse

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from rpd_sb3.envs import make_vec_env
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import make_teacher


class TeacherDistance(BaseCallback):
    """Logs ``rollout/teacher_distance``: mean distance of the student's actions to the teacher's, over one rollout."""

    def _on_rollout_start(self) -> None:
        self.steps: list[tuple[np.ndarray, list[dict]]] = []

    def _on_step(self) -> bool:
        self.steps.append((self.locals["clipped_actions"], self.locals["infos"]))
        return True

    def _on_rollout_end(self) -> None:
        # np.asarray waits for the teacher; by the end of the rollout the answers have long arrived.
        distances = [
            np.linalg.norm(action - np.asarray(info["teacher_action"]))
            for actions, infos in self.steps
            for action, info in zip(actions, infos, strict=True)
        ]
        self.logger.record("rollout/teacher_distance", np.mean(distances))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="PickCube-v1")
    parser.add_argument("--timesteps", type=int, default=4096)
    args = parser.parse_args()

    teacher = make_teacher("scripted", args.env)
    venv = VecTeacher(make_vec_env(args.env, n_envs=8, seed=0, teacher=teacher.spec), teacher)
    model = PPO("MlpPolicy", venv, n_steps=128, verbose=1, device="cpu")
    model.learn(args.timesteps, callback=TeacherDistance())
    venv.close()
    teacher.close()


if __name__ == "__main__":
    main()
