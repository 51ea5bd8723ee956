"""``python -m rpd_sb3.export``: the folder it leaves, its manifest and its card, and what every mistake is told."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3 import PPO

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.enjoy import __main__ as enjoy
from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.export import __main__ as export
from rpd_sb3.export import manifest as manifests
from rpd_sb3.export import runtime, writer
from rpd_sb3.export.loading import check_observed, load_export
from rpd_sb3.export.observations import facts_of_config, with_image_size
from rpd_sb3.train import folder as runs
from tests.support import ROOT
from tests.support.export_helpers import IMAGE, change_manifest, make_run, manifest_of
from tests.support.tiny_env import TINY
from tests.support.train_helpers import sentence

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny environment, exported to its ``export_onnx``."""
    folder = make_run(tmp_path_factory.mktemp("logs"))
    assert export.main(["--run", str(folder)]) == 0
    return folder


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """A copy of the export that may be changed."""
    shutil.copytree(run / "export_onnx", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def compiled(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further exports of the best model take the graph of ``run``, as making one takes seconds."""
    monkeypatch.setattr(writer, "write_onnx", lambda path, *_: shutil.copy(run / "export_onnx" / "policy.onnx", path))


@pytest.fixture(scope="module")
def pt2(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last model of ``run``, exported as PyTorch archive."""
    folder = tmp_path_factory.mktemp("exports") / "last"
    assert export.main(["--run", str(run), "--format", "torch", "--model", "last", "-o", str(folder)]) == 0
    return folder


def command(run: Path, *more: str) -> list[str]:
    """Words of an export."""
    return ["--run", str(run), *more]


def test_folder_is_complete_and_named_in_the_manifest(run: Path) -> None:
    names = {path.name for path in (run / "export_onnx").iterdir()}
    assert names == {
        "policy.onnx",
        "policy.json",
        "check.npz",
        "runtime.py",
        "__init__.py",
        "pyproject.toml",
        "README.md",
        "learning_curve.png",
    }
    files = manifest_of(run / "export_onnx")["files"]
    assert set(files) == names - {"policy.json"}
    assert {name: (run / "export_onnx" / name).stat().st_size for name in files} == {
        k: v["bytes"] for k, v in files.items()
    }
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert (run / "export_onnx" / "runtime.py").read_bytes() == Path(runtime.__file__).read_bytes()


def test_manifest_says_what_was_exported(run: Path) -> None:
    manifest = manifest_of(run / "export_onnx")
    saved = runs.load_run(run)
    model = PPO.load(saved.best_model)
    with np.load(run / "evaluations.npz") as file:
        row = file["timesteps"].tolist().index(model.num_timesteps)
        k = int(file["successes"][row].sum())
    assert manifest["observation"] == [
        {"name": "state", "shape": [2], "dtype": "float32", "layout": "vector", "low": -10.0, "high": 10.0}
    ]
    assert manifest["action"] == {"shape": [1], "dtype": "float32", "low": -1.0, "high": 1.0, "names": None}
    assert manifest["environment"]["id"] == TINY
    assert (manifest["format_version"], manifest["name"], manifest["teacher"]) == (1, "tiny_v0_ppo", None)
    assert manifest["training"]["env_steps"] == model.num_timesteps
    assert (manifest["training"]["model"], manifest["training"]["seed"]) == ("best", 0)
    student = manifest["success"]["student"]
    assert (student["success_once"], student["n_episodes"]) == (k / 3, 3)
    assert student["ci95"] == list(wilson_interval(k, 3))
    assert student["note"].startswith("the best of 4 evaluations, which is optimistic")
    assert manifest["parity"]["max_abs_error"] <= 1e-5
    assert manifest["parity"]["n_observations"] == 256
    assert (
        manifest["parameters"]["policy"]
        < manifest["parameters"]["total"]
        == sum(parameter.numel() for parameter in model.policy.parameters())
    )
    assert 0 < manifest["latency_ms"]["median"] <= manifest["latency_ms"]["p95"]
    assert {"rpd_sb3", "torch", "onnx", "onnxruntime", "stable-baselines3"} <= set(manifest["versions"])
    assert manifest["command"] == f"python -m rpd_sb3.export --run {run}"


def test_last_model_has_the_last_evaluation(run: Path, pt2: Path) -> None:
    student = manifest_of(pt2)["success"]["student"]
    result = json.loads((run / "result.json").read_text())["student"]
    assert {key: student[key] for key in result} == result
    assert "note" not in student


def test_success_is_that_of_the_evaluation_at_the_models_step(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export*"))
    saved = runs.load_run(tmp_path / "run")
    once = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    arrays = {"results": once * 2.0, "ep_lengths": once + 5, "successes": once, "successes_at_end": once & False}
    steps = runs.timesteps(saved.last_model)
    np.savez(saved.folder / "evaluations.npz", timesteps=[0, steps, steps + 1], **arrays)  # type: ignore[arg-type]
    student = manifests.student_success(saved.folder, saved.last_model, "last")
    assert student is not None
    assert (student["success_once"], student["success_at_end"], student["mean_return"]) == (0.25, 0.0, 0.5)
    assert (student["n_episodes"], student["ci95"]) == (4, list(wilson_interval(1, 4)))


@pytest.mark.usefixtures("compiled")
def test_a_model_that_was_never_evaluated_has_no_success(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export*", "evaluations.npz"))
    assert export.main(command(tmp_path / "run")) == 0
    folder = tmp_path / "run" / "export_onnx"
    assert manifest_of(folder)["success"]["student"] is None
    assert "has not been evaluated" in (folder / "README.md").read_text()


def test_archive_acts_here_but_not_in_the_runtime(run: Path, pt2: Path) -> None:
    policy = load_export(pt2)
    assert policy.check() <= 1e-5
    obs = np.array([0.5, -0.5], np.float32)
    expected, _ = PPO.load(runs.load_run(run).last_model).predict(obs, deterministic=True)
    np.testing.assert_allclose(policy(obs), expected, atol=1e-5, rtol=0)
    assert not (pt2 / "runtime.py").exists()
    with pytest.raises(ValueError, match="format 'torch'"):
        runtime.load(pt2)


def test_action_tokens_become_actions(tmp_path: Path) -> None:
    small = ["policy_kwargs.d_model:8", "policy_kwargs.n_heads:2", "policy_kwargs.n_layers:1"]
    run = make_run(tmp_path / "logs", "--env-kwargs", "tokens:16", params=["policy:AutoregressivePolicy", *small], n=32)
    folder = run / "export_onnx"
    assert export.main(["--run", str(run)]) == 0
    manifest = manifest_of(folder)
    assert manifest["tokens"] == {"n_bins": 16, "low": None, "high": None}
    assert manifest["parity"]["tokens_equal"] is True
    assert manifest["environment"]["env_kwargs"] == {}
    with np.load(folder / "check.npz", allow_pickle=False) as file:
        assert (file["tokens"].dtype, file["action"].dtype) == (np.int64, np.float32)
    assert evaluate.main(["--export", str(folder), "-n", "3", "--vec-env", "dummy", "--json", str(tmp_path / "a")]) == 0
    assert evaluate.main(["--run", str(run), "-n", "3", "--vec-env", "dummy", "--json", str(tmp_path / "b")]) == 0
    ours, theirs = (json.loads((tmp_path / name).read_text()) for name in "ab")
    assert ours | {"name": ""} == theirs | {"name": ""}


def test_images_go_in_channels_last(tmp_path: Path) -> None:
    run = make_run(tmp_path / "logs", "--env-kwargs", "image:true", n=32)
    folder = run / "export_onnx"
    assert export.main(["--run", str(run)]) == 0
    (spec,) = manifest_of(folder)["observation"]
    assert (spec["name"], spec["shape"], spec["dtype"], spec["layout"]) == ("image", [36, 40, 3], "uint8", "HWC")
    image = np.random.default_rng(0).integers(0, 256, (36, 40, 3), np.uint8)
    expected, _ = PPO.load(runs.load_run(run).best_model).predict(image, deterministic=True)
    np.testing.assert_allclose(runtime.load(folder)(image), expected, atol=1e-5, rtol=0)
    assert evaluate.main(["--export", str(folder), "-n", "2", "--vec-env", "dummy"]) == 0


# Nothing is left behind ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
def test_policy_that_acts_differently_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(writer, "TOLERANCE", -1.0)
    assert export.main(command(run, "-o", str(tmp_path / "out" / "export"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "on 256 observations its actions differ by" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_weights_are_found(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = writer.write_torch

    def spoilt(path: Path, deployable: Any, specs: Any) -> None:
        deployable.head.action_net.bias.data += 1e-3
        real(path, deployable, specs)
        deployable.head.action_net.bias.data -= 1e-3

    monkeypatch.setattr(writer, "write_torch", spoilt)
    assert export.main(["--run", str(run), "--format", "torch", "-o", str(tmp_path / "export")]) == 1
    assert "(at most 1e-05 is allowed)" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_a_bug_on_the_way_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(writer, "write_card", fail)
    with pytest.raises(KeyError, match="a bug"):
        export.main(command(run, "-o", str(tmp_path / "export")))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("compiled")
def test_an_export_is_replaced_only_if_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "export"
    folder.mkdir()  # an empty one is no obstacle
    assert export.main(command(run, "-o", str(folder))) == 0
    capsys.readouterr()
    assert "--overwrite" in sentence(command(run, "-o", str(folder)), capsys, export)
    (folder / "leftover").touch()
    assert export.main(command(run, "-o", str(folder), "--overwrite")) == 0
    assert not (folder / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.usefixtures("compiled")
def test_an_export_that_cannot_be_put_in_place_leaves_the_old_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rename = tmp_path / "export", Path.rename
    assert export.main(command(run, "-o", str(folder))) == 0
    created = manifest_of(folder)["created"]

    def refuse(source: Path, target: Path) -> Path:
        if ".tmp-" in source.name:
            raise OSError("the disk is gone")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert export.main(command(run, "-o", str(folder), "--overwrite")) == 1
    assert capsys.readouterr().err == "error: the disk is gone\n"
    assert manifest_of(folder)["created"] == created
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_other_folders_are_never_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").touch()
    assert "not an export" in sentence(command(run, "-o", str(tmp_path), "--overwrite"), capsys, export)
    assert (tmp_path / "thesis.txt").exists()


# Observations from a file ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiled")
def test_observations_can_come_from_a_file(run: Path, tmp_path: Path) -> None:
    states = np.random.default_rng(0).uniform(-1, 1, (20, 2))
    np.savez(tmp_path / "obs.npz", state=states)
    assert export.main(command(run, "-o", str(tmp_path / "export"), "--observations", str(tmp_path / "obs.npz"))) == 0
    assert manifest_of(tmp_path / "export")["parity"]["n_observations"] == 20
    with np.load(tmp_path / "export" / "check.npz", allow_pickle=False) as file:
        assert np.array_equal(file["obs/state"], states[:16].astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"stat": np.zeros((3, 2))}, "state is missing"),
        ({"state": np.zeros((3, 5))}, r"state is float64 \(3, 5\), the policy takes float32 \('n', 2\)"),
        ({"state": np.zeros((0, 2))}, r"state is float64 \(0, 2\)"),
        ({"state": np.zeros((3, 2), np.int64)}, "state is int64"),
        ({"state": np.array([{}, {}])}, "not an .npz file"),
        (None, "not an .npz file"),
    ],
)
def test_observations_that_do_not_fit(
    arrays: dict[str, np.ndarray] | None, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "obs.npz"
    if arrays is not None:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    argv = command(run, "-o", str(tmp_path / "export"), "--observations", str(file))
    assert re.search(message, sentence(argv, capsys, export))


# Mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--run is missing"),
        (["--run", "nix", "--format", "safetensors"], "invalid choice: 'safetensors'"),
        (["--run", "nix", "--push-to-hub", "mine"], "USER/NAME"),
    ],
)
def test_mistake_is_one_sentence(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in sentence(argv, capsys, export)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(export.NEEDS, "onnx", ("not_a_package",))
    assert "not_a_package: pip install 'rpd_sb3[export]'" in sentence(["--run", "nix"], capsys, export)


def test_recurrent_policy_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "logs", algo="recurrent_ppo", n=32)
    capsys.readouterr()
    assert "recurrent" in sentence(command(run), capsys, export)


def test_run_without_a_model(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.zip", "export*"))
    assert "best_model.zip" in sentence(command(tmp_path / "run"), capsys, export)


@pytest.mark.parametrize("name", ["result.json", "evaluations.npz", "versions.yml"])
def test_damaged_run_is_one_sentence(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export*"))
    (tmp_path / "run" / name).write_text("{[")
    assert name in sentence(command(tmp_path / "run"), capsys, export)
    assert not (tmp_path / "run" / "export_onnx").exists()


# The card --------------------------------------------------------------------------------------------------------------


def test_card_is_one_of_hugging_face(run: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    card = hub.ModelCard.load(run / "export_onnx" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "rpd_sb3")
    assert {"reinforcement-learning", "robotics"} <= set(card.data.tags)
    (result,) = card.data.eval_results
    student = manifest_of(run / "export_onnx")["success"]["student"]
    assert (result.dataset_name, result.metric_type) == (TINY, "success_rate")
    assert result.metric_value == pytest.approx(student["success_once"], abs=1e-4)


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch", marks=pytest.mark.slow)])
def test_snippet_of_the_card_works(format: str, run: Path, pt2: Path) -> None:
    folder = pt2 if format == "torch" else run / "export_onnx"
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    check = "\nassert action.shape in [(1,), (1, 1)] and abs(float(action.item())) <= 1\n"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code[1] + check], cwd=folder, check=True, timeout=60, env=environment)


# The Hub ---------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face as an upload asks for."""

    uploaded: dict[str, bytes] = {}
    tokens: set[str | None] = set()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self.tokens.add(self.headers.get("Authorization"))
        self._answer(self._reply(body))

    def do_GET(self) -> None:
        self._answer({"id": "me/policy", "sha": "0" * 40, "siblings": [], "modelId": "me/policy", "tags": []})

    def _reply(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/repos/create"):
            return {"url": f"http://{self.headers['Host']}/me/policy"}
        if self.path.endswith("/validate-yaml"):  # of the card
            return {"errors": [], "warnings": []}
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"commitUrl": f"http://{self.headers['Host']}/me/policy/commit/1", "commitOid": "1", "hookOutput": ""}

    def _answer(self, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    Hub.uploaded, Hub.tokens = {}, set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.usefixtures("compiled")
def test_upload_holds_the_whole_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        assert export.main(command(run, "-o", str(tmp_path / "export"), "--push-to-hub", "me/policy")) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()} == Hub.uploaded
    assert Hub.tokens == {"Bearer hf_secret"}
    assert "me/policy" in capsys.readouterr().out


def test_without_a_token_nothing_is_started(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    argv = command(run, "-o", str(tmp_path / "export"), "--push-to-hub", "me/policy")
    assert "HF_TOKEN" in sentence(argv, capsys, export)
    assert not (tmp_path / "export").exists()


@pytest.mark.usefixtures("compiled")
def test_without_a_network_the_export_is_there(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub() as url:
        pass  # its port is closed again
    monkeypatch.setenv("HF_ENDPOINT", url)
    assert export.main(command(run, "-o", str(tmp_path / "export"), "--push-to-hub", "me/policy")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "could not be uploaded" in line
    assert line.endswith(f"hf upload me/policy {tmp_path / 'export'}")
    assert "hf_secret" not in line
    assert load_export(tmp_path / "export").check() <= 1e-5


# evaluate --export -----------------------------------------------------------------------------------------------------


def test_export_is_evaluated_like_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    results = []
    for source in (["--run", str(run)], ["--export", str(run / "export_onnx")]):
        assert evaluate.main([*source, "-n", "5", "--n-envs", "3", "--vec-env", "dummy", "--json", "-"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[1]["name"] == f"export {run / 'export_onnx'}"
    assert results[0] | {"name": ""} == results[1] | {"name": ""}  # rewards are 0 or 1: rounding does not show


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "CartPole-v1"], r"float32 \(2,\).*'CartPole-v1' shows Box"),
        (["--env-kwargs", "image:true"], r"float32 \(2,\).*36, 40, 3"),
        (["--env-kwargs", "tokens:true"], r"float32 actions.*MultiDiscrete"),
        (["--teacher-kwargs", "a:1"], "--teacher-kwargs"),
    ],
)
def test_evaluate_says_what_does_not_fit(
    argv: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--export", str(run / "export_onnx"), "--vec-env", "dummy", *argv]
    assert re.search(message, sentence(given, capsys, evaluate))


def test_environment_that_shows_more_than_arrays_does_not_fit(run: Path) -> None:
    space = spaces.Dict({"state": spaces.Box(-10.0, 10.0, (2,)), "room": spaces.Discrete(3)})
    with pytest.raises(ValueError, match="but env 'House-v0' shows Dict"):
        check_observed(load_export(run / "export_onnx"), space, "export", "House-v0")


def test_evaluate_of_a_damaged_export(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_manifest(copied, lambda manifest: manifest.update(format="pickle"))
    assert "has format 'pickle'; known are onnx, torch" in sentence(["--export", str(copied)], capsys, evaluate)


def test_an_export_is_watched_like_its_run(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for source in (["--run", str(run)], ["--export", str(run / "export_onnx")]):
        capsys.readouterr()
        assert enjoy.main([*source, "-n", "2", "--record", str(tmp_path / "film.gif")]) == 0
        told.append(capsys.readouterr().out.splitlines()[1:4])
    assert told[0] == told[1]


# Parts -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "algo", "name"),
    [
        ("PushCube-v1", "rpd_ppo", "pushcube_v1_rpd_ppo"),
        ("ALE/Pong-v5", "ppo", "pong_v5_ppo"),
        ("my.module:2D-Maze-v0", "ppo", "policy_2d_maze_v0_ppo"),
    ],
)
def test_package_name(env_id: str, algo: str, name: str) -> None:
    assert manifests.package_name(env_id, algo) == name


def test_controller_of_a_paper_task_is_described() -> None:
    facts = facts_of_config("PushCube-v1", {"tokens": True, "obs": "rgb"})
    assert facts["env_kwargs"] == {"obs": "rgb"}
    assert (facts["control_mode"], facts["gripper"]) == ("pd_ee_delta_pose", {"closed": -1.0, "open": 1.0})
    assert facts["instruction"] == "push the cube away from the robot base"


def test_image_size_is_written_out() -> None:
    pytest.importorskip("mani_skill")
    assert with_image_size("PushCube-v1", {"obs": "rgb"}, IMAGE) == {"obs": "rgb", "image_size": 40}
    assert with_image_size("PushCube-v1", {"image_size": 7}, IMAGE) == {"image_size": 7}
    assert with_image_size(TINY, {}, IMAGE) == {}
