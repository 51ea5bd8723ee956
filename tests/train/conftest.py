"""Two small runs that many tests look at; those that change a folder copy it."""

from pathlib import Path

import pytest

from tests.support.train_helpers import ppo, rpd, save_teacher, trained


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.zip")


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 steps without a teacher."""
    return trained(ppo(tmp_path_factory.mktemp("ppo"), "--save-freq", "64"))


@pytest.fixture(scope="session")
def rpd_run(tmp_path_factory: pytest.TempPathFactory, teacher_file: Path) -> Path:
    """160 steps with a teacher, a label replay, checkpoints and films."""
    argv = rpd(tmp_path_factory.mktemp("rpd"), teacher_file, "--save-freq", "64", "--seed", "3")
    argv.remove("--no-video")
    return trained([*argv, "label_replay:300"])


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    return tmp_path / "logs"
