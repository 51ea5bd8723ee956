"""Going on with a run, in its folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
import yaml
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer

from rpd_sb3.algos.buffers import CompactRolloutBuffer
from rpd_sb3.train import folder as runs
from rpd_sb3.train.args import TrainArgs
from rpd_sb3.train.build import build
from rpd_sb3.train.hyperparams import check_section
from tests.support.train_helpers import NAME, progress_of, result_of, sentence, trained


def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of a run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / run.parent.name / run.name))


def test_resume_goes_on_in_the_same_folder(rpd_run: Path, tmp_path: Path) -> None:
    folder = copied(rpd_run, tmp_path)
    with np.load(folder / f"{NAME}_label_replay.npz") as file:
        labels = len(file["label/action"])
    assert trained(["--resume", str(folder), "-n", "256", "--no-video"]) == folder
    result = result_of(folder)
    assert (result["timesteps"], result["resumed_at"], result["teacher_queries"]) == (256, 160, 96)
    assert yaml.safe_load((folder / "config.yml").read_text())["n_timesteps"] == 256
    assert len((folder / "command.txt").read_text().splitlines()) == 2
    with np.load(folder / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160, 192, 256]
        assert file["results"].shape == (6, 3)
    steps = [int(row["time/total_timesteps"]) for row in progress_of(folder)]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 256)
    with np.load(folder / f"{NAME}_label_replay.npz") as file:
        assert (labels, len(file["label/action"])) == (160, 256)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_resume_after_a_crash_drops_what_came_after_the_checkpoint(ppo_run: Path, tmp_path: Path) -> None:
    folder = copied(ppo_run, tmp_path)
    for name in (f"{NAME}.zip", "rl_model_128_steps.zip", "best_model.zip"):
        (folder / name).unlink()
    trained(["--resume", str(folder), "--no-video"])
    assert (result_of(folder)["resumed_at"], result_of(folder)["timesteps"]) == (64, 160)
    with np.load(folder / "evaluations.npz") as file:
        assert file["timesteps"].tolist() == [0, 64, 128, 160]
    rollouts = [int(row["time/total_timesteps"]) for row in progress_of(folder) if row["time/fps"]]
    assert rollouts == [32, 64, 96, 128, 160]


def test_resume_continues_the_weights(ppo_run: Path, tmp_path: Path) -> None:
    run = runs.load_run(copied(ppo_run, tmp_path))
    args = TrainArgs.restore(run.args, run.folder / "args.yml")
    config = check_section(run.config, run.algo)
    config.n_timesteps = 1000
    setup = build(args, config, run, [])
    assert setup.model.env is not None
    assert setup.model.env._seeds == [160, 161]  # not the first episodes again
    assert isinstance(setup.model.rollout_buffer, CompactRolloutBuffer)  # type: ignore[attr-defined]
    saved = PPO.load(run.last_model)
    assert saved.rollout_buffer_class is RolloutBuffer  # SB3 alone can load it
    assert all(th.equal(a, b) for a, b in zip(setup.model.policy.parameters(), saved.policy.parameters(), strict=True))
    state = setup.model.policy.optimizer.state_dict()["state"]
    assert all(
        th.equal(state[i]["exp_avg"], s["exp_avg"]) for i, s in saved.policy.optimizer.state_dict()["state"].items()
    )
    setup.closing.close()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "160"], "has 160 timesteps already; ask for more than that with -n"),
        (["-n", "500", "--seed", "1"], "goes on with seed=0, but 1 is given"),
        (["-n", "500", "-params", "gamma:0.5"], "goes on with params="),
    ],
)
def test_resume_that_contradicts_the_run(
    ppo_run: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in ppo_run.rglob("*") if path.is_file()}
    assert message in sentence(["--resume", str(ppo_run), *argv], capsys)
    assert {path: path.read_bytes() for path in ppo_run.rglob("*") if path.is_file()} == before


def test_resume_needs_a_whole_model(ppo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied(ppo_run, tmp_path)
    argv = ["--resume", str(folder), "-n", "500"]
    model = folder / f"{NAME}.zip"
    model.write_bytes(model.read_bytes()[:1000])
    assert f"{NAME}.zip' is not a zip file" in sentence(argv, capsys)
    for path in folder.glob("*.zip"):
        path.unlink()
    assert "holds no model to resume from" in sentence(argv, capsys)


def rewrite_args(folder: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    args = yaml.safe_load((folder / "args.yml").read_text()) | changes
    (folder / "args.yml").write_text(yaml.safe_dump({key: args[key] for key in args if key not in drop}))


def test_run_of_another_version_can_be_resumed(ppo_run: Path, tmp_path: Path) -> None:
    folder = copied(ppo_run, tmp_path)
    rewrite_args(folder, {"colour": "red"}, drop=("video", "seed", "obs", "teacher_kwargs"))
    trained(["--resume", str(folder), "-n", "192", "--seed", "0", "--no-video"])  # 0 is the default, as before
    args = yaml.safe_load((folder / "args.yml").read_text())
    assert list(args) == list(TrainArgs.__dataclass_fields__)
    assert (args["seed"], args["obs"], args["teacher_kwargs"], args["n_envs"]) == (0, None, [], 2)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "many", "args.yml: seed='many' must be a whole number"),
        ("seed", -1, "--seed -1 must be at least 0"),
    ],
)
def test_arguments_of_a_run_are_checked(
    ppo_run: Path, tmp_path: Path, key: str, value: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(ppo_run, tmp_path)
    rewrite_args(folder, {key: value})
    assert message in sentence(["--resume", str(folder), "-n", "500"], capsys)
