"""What is installed where: the service next to a VLA, the students' side in an environment of its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rpd_sb3.serve import __main__ as serve
from rpd_sb3.train import __main__ as train
from tests.support import ROOT
from tests.support.packages import BLOCK, packages
from tests.support.serving_helpers import free_port, is_ready, serving_process

MODULES = {"PyYAML": "yaml", "stable-baselines3": "stable_baselines3", "sb3-contrib": "sb3_contrib"}


def hide(modules: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make child processes believe that these packages are not installed."""
    (folder / "sitecustomize.py").write_text(BLOCK.format(absent=modules))
    monkeypatch.setenv("PYTHONPATH", str(folder))


def test_the_service_runs_without_the_students_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = packages("options.extras_require", "teacher-server")
    students = [name for name in packages("options", "install_requires") if name not in server]
    assert {"torch", "stable-baselines3"} <= set(students)
    hide([MODULES.get(name, name) for name in students], tmp_path, monkeypatch)
    port = free_port()
    with serving_process("--teacher", "scripted", "--env", "PickCube-v1", port=port):
        assert is_ready(f"http://127.0.0.1:{port}")


def test_a_service_that_lacks_a_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.3", "rpd_sb3[teacher-server]; extra == 'dev'", "numpy; extra == 'teacher-server'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: [*lines, "uvicorn ; extra == 'teacher-server'"])
    assert serve.advice() == "pip install numpy uvicorn"
    hide(["prometheus_client"], tmp_path, monkeypatch)
    with serving_process("--teacher", "scripted", "--env", "PickCube-v1", port=free_port()) as process:
        assert process.wait(10) == 2
        assert process.stderr is not None
        message = process.stderr.read().decode()
    assert message.startswith("error: No module named 'prometheus_client'; ")
    assert message.count("\n") == 1


def test_training_says_that_the_students_side_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "stable_baselines3" else real(name, package)

    monkeypatch.setattr("rpd_sb3.cli.common.importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find_spec)))
    assert train.main(["--algo", "ppo", "--env", "PickCube-v1"]) == 2
    assert capsys.readouterr().err.startswith("error: students need stable_baselines3, which is not installed here")


@pytest.mark.parametrize("extra", ["teacher-server", "openpi", "export", "maniskill", "dev"])
def test_what_make_installs_is_pinned(extra: str) -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = {re.sub(r"[_.]", "-", name.split("[")[0]).lower() for name in packages("options.extras_require", extra)}
    assert asked - {"rpd-sb3"} <= pinned
