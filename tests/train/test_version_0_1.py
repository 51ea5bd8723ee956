"""What version 0.1 has saved, before its modules moved, loads and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from stable_baselines3 import PPO

from rpd_sb3.algos import OPD, RPD
from rpd_sb3.algos.curriculum import CosineSchedule
from rpd_sb3.evaluate.__main__ import main as evaluate
from rpd_sb3.train.__main__ import main as train
from tests.support import ROOT
from tests.support.token_helpers import GaussianTeacher, TokenTeacher, make_venv

SAVED = ROOT / "tests" / "data" / "version_0_1"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SAVED / "run", tmp_path / "run"))


def test_a_run_is_resumed(run: Path) -> None:
    assert train(["--resume", str(run), "-n", "128"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert (result["resumed_at"], result["timesteps"], result["complete"]) == (64, 128, True)
    model = RPD.load(run / "Pendulum-v1.zip")
    assert model.num_timesteps == 128
    with np.load(run / "Pendulum-v1_label_replay.npz") as replay:
        assert len(replay["label/action"]) == 64


def test_a_run_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--model last -n 1 --n-envs 1 --vec-env dummy --seed 10000 --json -"
    assert evaluate(["--run", str(run), *options.split()]) == 0
    now = json.loads(capsys.readouterr().out)["mean_return"]
    then = json.loads((run / "result.json").read_text())["student"]["mean_return"]
    assert now == pytest.approx(then, rel=1e-4)


def test_a_hand_over_that_has_happened_stays() -> None:
    model = OPD.load(SAVED / "models" / "opd.zip", env=make_venv(TokenTeacher(), reward=1.0))
    curriculum = model.curriculum
    assert (curriculum.reward_leads, curriculum.residual_coef, curriculum._handed_over_at) == (True, 0.5, 0.5)
    model.learn(32, reset_num_timesteps=False)
    assert model.curriculum.reward_leads


def test_a_hand_over_to_come_is_kept() -> None:
    model = OPD.load(SAVED / "models" / "opd_plateau.zip", env=make_venv(TokenTeacher(), reward=1.0))
    hand_over = model.curriculum.hand_over
    assert hand_over is not None
    assert (hand_over.on, hand_over.value, hand_over.success_rates) == ("plateau", 3, [0.0])
    assert not model.curriculum.reward_leads
    assert model.curriculum.surrogate_coef == 0


def test_a_success_cutoff_is_kept() -> None:
    teacher = GaussianTeacher(lambda points: (points, np.ones_like(points)))
    model = RPD.load(SAVED / "models" / "rpd.zip", env=make_venv(teacher, tokens=False))
    curriculum = model.curriculum
    assert (curriculum.reward_leads, curriculum.learning_rate(1.0), curriculum.surrogate_coef) == (True, 1e-5, 1.0)
    curriculum.update(0, 1.0, 0.0)
    assert not curriculum.reward_leads
    model.learn(32, reset_num_timesteps=False)


def test_stable_baselines3_loads_a_baseline_with_our_schedule() -> None:
    model = PPO.load(SAVED / "models" / "ppo_cosine.zip")
    assert isinstance(model.learning_rate, CosineSchedule)
    assert np.isfinite(model.predict(np.zeros(3, np.float32))[0]).all()
