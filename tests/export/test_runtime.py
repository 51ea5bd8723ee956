"""The module that travels with an export: numpy and onnxruntime alone, and one sentence for every mistake."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpd_sb3.cli.files import write_json
from rpd_sb3.export import runtime
from rpd_sb3.export.card import write_package
from rpd_sb3.export.deploy import input_specs
from rpd_sb3.export.formats import write_onnx
from rpd_sb3.export.manifest import action_spec, file_facts, versions
from tests.export.conftest import Exported
from tests.support import ROOT
from tests.support.export_helpers import POLICIES, change_manifest, observations
from tests.support.packages import BLOCK

pytest.importorskip("onnxruntime")
IMAGE, STATE = np.zeros((36, 40, 3), np.uint8), np.zeros(5, np.float32)
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def both(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a policy that sees an image and a state, ``robot_policy``."""
    folder = tmp_path_factory.mktemp("exports") / "robot"
    folder.mkdir()
    policy = POLICIES["both"]()
    specs = input_specs(policy.observation_space)
    shutil.copy(exported(write_onnx, "both"), folder)
    batch = observations(specs, n=4)
    actions, _ = policy.predict(batch, deterministic=True)
    np.savez(folder / "check.npz", action=actions, **{"obs/" + name: array for name, array in batch.items()})
    manifest = {
        "format_version": 1,
        "format": "onnx",
        "name": "robot_policy",
        "observation": specs,
        "action": action_spec(policy.action_space, None, None),
        "environment": {"id": "Robot-v0", "env_kwargs": {}},
        "training": {"algorithm": "ppo"},
        "success": {"student": {"success_once": 0.5, "ci95": [0.25, 0.75], "n_episodes": 8}, "teacher": None},
        "parity": {"tolerance": 1e-5},
        "versions": versions(),
    }
    write_package(folder, manifest)
    write_json(folder / "policy.json", manifest | {"files": file_facts(folder)})
    return folder


@pytest.fixture
def copied(both: Path, tmp_path: Path) -> Path:
    """A copy of the export that may be changed."""
    shutil.copytree(both, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def policy(both: Path) -> runtime.Policy:
    return runtime.load(both)


# Acting ----------------------------------------------------------------------------------------------------------------


def test_single_observation_and_batch_agree(policy: runtime.Policy) -> None:
    batch = observations(policy.manifest["observation"])
    actions = policy(batch)
    assert (actions.shape, actions.dtype) == ((9, 3), np.float32)
    for i in range(9):
        one = policy.predict({name: array[i] for name, array in batch.items()})
        assert one.shape == (3,)
        np.testing.assert_allclose(one, actions[i], atol=1e-5, rtol=0)


def test_answer_is_new_each_time(policy: runtime.Policy) -> None:
    obs = {"rgb": IMAGE, "state": STATE}
    first = policy(obs)
    kept = first.copy()
    second = policy(obs)
    first += 1
    assert np.array_equal(second, kept)
    assert second.flags.owndata


def test_what_other_programs_give_is_taken(policy: runtime.Policy) -> None:
    """float64, views that are not contiguous, and lists of floats."""
    image = np.random.default_rng(0).integers(0, 256, (36, 80, 3), np.uint8)
    state = [0.5, -1.0, 0.25, 0.0, 2.0]
    views = policy({"state": np.array(state), "rgb": image[:, ::2]})
    assert np.array_equal(views, policy({"rgb": image[:, ::2].copy(), "state": np.array(state, np.float32)}))
    assert np.array_equal(views, policy({"rgb": image[:, ::2], "state": state}))


def test_number_of_threads_does_not_change_the_action(both: Path, policy: runtime.Policy) -> None:
    batch = observations(policy.manifest["observation"])
    np.testing.assert_allclose(runtime.load(both, threads=2)(batch), policy(batch), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("observation", "message"),
    [
        ({"rgb": IMAGE.transpose(2, 0, 1), "state": STATE}, "channels last"),
        ({"rgb": IMAGE[None][:0], "state": STATE[None][:0]}, r"shape \(0, 36, 40, 3\)"),
        ({"rgb": IMAGE, "state": STATE[:4]}, r"shape \(4,\), expected \(5,\) or a batch"),
        ({"rgb": IMAGE / np.float32(255), "state": STATE}, "scales images itself"),
        ({"rgb": IMAGE, "state": np.zeros(5, int)}, "dtype int64"),
        ({"rgb": IMAGE, "state": STATE * np.nan}, "NaN"),
        ({"rgb": IMAGE}, "has rgb, expected rgb, state"),
        ({}, "has nothing"),
        (IMAGE, "expected a mapping"),
        ({"rgb": IMAGE, "state": STATE[None]}, "not of one batch"),
    ],
)
def test_wrong_observation(observation: Any, message: str, policy: runtime.Policy) -> None:
    with pytest.raises(ValueError, match=message):
        policy(observation)


# Checking --------------------------------------------------------------------------------------------------------------


def test_check_compares_with_the_recorded_actions(policy: runtime.Policy) -> None:
    assert policy.check() <= 1e-5


@pytest.mark.parametrize("spoil", [1e-3, np.nan])
def test_check_finds_other_actions(spoil: float, copied: Path) -> None:
    arrays = runtime.read_arrays(copied / "check.npz")
    arrays["action"][-1, 0] += spoil
    np.savez(copied / "check.npz", **arrays)  # type: ignore[arg-type]
    change_manifest(copied, lambda manifest: manifest["files"].update(file_facts(copied)))
    with pytest.raises(ValueError, match="does not act here as it was recorded: actions differ by up to"):
        runtime.load(copied).check()
    assert runtime.main([str(copied)]) == 1


def test_command_checks_and_times(both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runtime.main([str(both), "--threads", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:5] == [
        "robot_policy: ppo on Robot-v0",
        "in       rgb uint8 (36, 40, 3) HWC",
        "in       state float32 (5,) vector",
        "out      action float32 (3,)",
        "success  student 50% [25%, 75%] of 8 episodes",
    ]
    assert lines[5].startswith("check    ok, actions differ by at most ")
    assert re.fullmatch(r"latency  median \d+\.\d+ ms, p95 \d+\.\d+ ms, one observation, 2 threads, .+", lines[6])


# Mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version 2"),
        (lambda m: m.pop("observation"), "no observation"),
        (lambda m: m["observation"][0].pop("dtype"), "no observation.dtype"),
        (lambda m: m.update(observation=[]), "expected a list"),
        (lambda m: m.update(format="torch"), "format 'torch'"),
        (lambda m: m["files"]["policy.onnx"].update(sha256="0"), "sha256"),
        (lambda m: m["files"].pop("policy.onnx"), "sha256"),
        (lambda m: m["observation"][0].update(name="camera"), r"\('rgb'.*policy.json says \[\('camera'"),
        (lambda m: m["observation"][0].update(dtype="float32"), r"tensor\(uint8\).*policy.json says .*tensor\(float\)"),
        (lambda m: m["action"].update(shape=[7]), r"\('action', \[3\].*policy.json says .*\[7\]"),
    ],
)
def test_manifest_that_does_not_fit(
    change: Change, message: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(copied, change)
    with pytest.raises(ValueError, match=message):
        runtime.load(copied)
    assert runtime.main([str(copied)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize("text", ["", "[1, 2]", "not json", '{"format_version": 1,'])
def test_manifest_that_is_none(text: str, copied: Path) -> None:
    (copied / "policy.json").write_text(text)
    with pytest.raises(ValueError, match="is not JSON|has format_version None"):
        runtime.load(copied)


@pytest.mark.parametrize(("keep", "hash_fits"), [(-1, False), (-1, True), (100, True), (0, True)])
def test_truncated_graph(keep: int, hash_fits: bool, copied: Path) -> None:
    graph = copied / "policy.onnx"
    graph.write_bytes(graph.read_bytes()[:keep])
    if hash_fits:
        change_manifest(copied, lambda manifest: manifest["files"].update(file_facts(copied)))
    with pytest.raises(ValueError, match="is not a policy that onnxruntime can run" if hash_fits else "is damaged"):
        runtime.load(copied)


@pytest.mark.parametrize(
    ("name", "message"),
    [("policy.onnx", "has no policy.onnx; export the run again"), ("policy.json", "has no policy.json")],
)
def test_missing_file(name: str, message: str, copied: Path) -> None:
    (copied / name).unlink()
    with pytest.raises(ValueError, match=message):
        runtime.load(copied)


def test_folder_or_threads_that_do_not_exist(both: Path) -> None:
    with pytest.raises(
        ValueError, match="export 'nix' does not exist; expected a folder made by python -m rpd_sb3.export"
    ):
        runtime.load("nix")
    with pytest.raises(ValueError, match="threads=0 must be a whole number, at least 1"):
        runtime.load(both, threads=0)


# Alone -----------------------------------------------------------------------------------------------------------------

OTHERS = ["torch", "gymnasium", "stable_baselines3", "sb3_contrib", "rpd_sb3", "onnx", "yaml", "cv2", "PIL"]


def test_folder_acts_where_nothing_else_is_installed(both: Path, tmp_path: Path) -> None:
    """As ``python runtime.py``, as a module of the folder, and as the installed package."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(absent=OTHERS))
    (tmp_path / "robot_policy").symlink_to(both)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "runtime.py"], cwd=both, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "check    ok" in done.stdout
    code = (
        "import sys, numpy as np\n"
        "from robot_policy import load_policy\n"
        "assert 'onnxruntime' not in sys.modules  # only when a policy is loaded\n"
        "action = load_policy()({'rgb': np.zeros((36, 40, 3), np.uint8), 'state': np.zeros(5, np.float32)})\n"
        "print(action.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("(3,)\n", "")


def test_import_brings_numpy_and_nothing_else() -> None:
    code = (
        "import sys, time\nimport numpy\nbefore, start = set(sys.modules), time.perf_counter()\nimport rpd_sb3.export.runtime\n"
        "assert time.perf_counter() - start < 1\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("['rpd_sb3']\n", "")


def test_runtime_is_python_3_8() -> None:
    ast.parse(Path(runtime.__file__).read_text(), feature_version=(3, 8))


def test_without_onnxruntime_it_says_what_to_install(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="onnxruntime is missing, which runs policy.onnx: pip install onnxruntime"):
        runtime.load(both)


@pytest.mark.slow
def test_fresh_environment_with_two_packages(both: Path, tmp_path: Path) -> None:
    """``pip install numpy onnxruntime``, then the folder as it is, then ``pip install`` of the folder."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"

    def run(*words: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(python), *words], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )

    installed = run("-m", "pip", "install", "-q", "numpy", "onnxruntime")
    if installed.returncode:
        pytest.skip(f"there is no package index here: {installed.stderr[-200:]}")
    done = run("runtime.py", cwd=both)
    assert (done.returncode, done.stderr) == (0, "")
    shutil.copytree(both, tmp_path / "export")
    done = run("-m", "pip", "install", "-q", "./export")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "export")
    done = run("-c", "from robot_policy import load_policy; print(load_policy().check() <= 1e-5)")
    assert (done.stdout, done.stderr) == ("True\n", "")
    assert run("-c", "import torch").returncode != 0
