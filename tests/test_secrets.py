"""Secrets that a teacher needs are in no file that a command writes, however they were given."""

from __future__ import annotations

import base64
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gymnasium import spaces

from rpd_sb3.collect import __main__ as collect
from rpd_sb3.contract.secrets import MASK
from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.export import __main__ as export
from rpd_sb3.report import __main__ as report
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.train import __main__ as train
from rpd_sb3.train.folder import load_run
from tests.support.serving_helpers import free_port, serving
from tests.support.tiny_env import TINY
from tests.support.train_helpers import QUICK, SMALL, sentence

SECRET = re.compile(r"hunter\d+")
RUN = "tests.support.tiny_env-Tiny-v0_1"


class Guarded(LocalTeacher):
    """Takes any options, as teachers of users do."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.spec = TeacherSpec("guarded", frozenset({"action"}), ("state",), spaces.Box(-1.0, 1.0, (1,), np.float32))
        self.options = options

    def label(self, query: Query) -> Labels:
        return {"action": np.clip(query.inputs["state"][:, 1:] - query.inputs["state"][:, :1], -1.0, 1.0)}


TEACHER = f"{__name__}:Guarded"
KWARGS = [
    "token:hunter1",
    "api_key: hunter2",
    "accessKey:hunter3 hunter4",
    "headers.Authorization:Bearer hunter5",
    "login:{user: me, password: hunter6, port: 1}",
    "proxies:[http://me:hunter7@proxy:3128, 'http://proxy/?token=hunter8&x=1']",
    "secret:12hunter9",
    "unnorm_key:bridge",
]
PARAMS = [*SMALL, "teacher_kwargs.deep.client_secret:hunter10", "teacher_kwargs:{extra_token: hunter11}"]
CONFIG = {"teacher_kwargs": {"credential": "hunter12", "nested": [{"bearer": "hunter13"}]}}


def leaves(content: bytes) -> Iterator[bytes]:
    """A file and all that is packed in it: members of archives, what Stable-Baselines3 has pickled."""
    yield content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                yield from leaves(archive.read(name))
    for pickled in re.findall(rb'":serialized:": "([^"]+)"', content):
        yield base64.b64decode(pickled)


def secrets_in(folder: Path) -> dict[str, set[str]]:
    """File to the secrets in it; NumPy writes four bytes for a letter."""
    found = {}
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        texts = [part.replace(b"\0", b"").decode("latin-1") for part in leaves(content)]
        if secrets := set(SECRET.findall("".join(texts))):
            found[str(path.relative_to(folder))] = secrets
    return found


def rpd(logs: Path, teacher: str, *more: str) -> list[str]:
    words = ["--algo", "rpd_ppo", "--env", TINY, "--teacher", teacher, "-n", "32", "-f", str(logs)]
    return [*words, *QUICK, *more]


def test_no_command_writes_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.yml", tmp_path / "out"
    config.write_text(yaml.safe_dump({TINY: {"teacher": TEACHER} | CONFIG}))
    run = out / "rpd_ppo" / RUN
    argv = rpd(out, TEACHER, "--conf-file", str(config), "--teacher-kwargs", *KWARGS, *PARAMS, "--save-freq", "16")
    assert train.main(argv) == 0
    demos = [*("--env", TINY, "--teacher", TEACHER, "-n", "2", "--vec-env", "dummy", "--teacher-kwargs"), *KWARGS]
    for suffix in ("npz", "hdf5"):
        assert collect.main([*demos, "--out", str(out / f"demos.{suffix}")]) == 0
    assert evaluate.main([*demos, "--json", str(out / "evaluation.json")]) == 0
    assert report.main([str(run), "-o", str(out / "report.html"), "--csv", str(out / "report.csv")]) == 0
    assert export.main(["--run", str(run), "--format", "torch"]) == 0
    assert secrets_in(out) == {}
    written = yaml.safe_load((run / "config.yml").read_text())["teacher_kwargs"]
    assert (written["token"], written["unnorm_key"]) == (MASK, "bridge")
    assert (written["login"]["password"], written["login"]["user"]) == (MASK, "me")
    assert "unnorm_key bridge" in (out / "report.html").read_text()
    capsys.readouterr()


def test_runs_with_secrets_in_them_are_reported_and_exported_without(tmp_path: Path) -> None:
    """Of an earlier version, which wrote everything down."""
    run = tmp_path / "ppo" / RUN
    assert train.main(["--algo", "ppo", "--env", TINY, "-n", "32", "-f", str(tmp_path), *QUICK, *SMALL]) == 0
    secrets = {"teacher": "http://me:hunter1@gpu:8000", "teacher_kwargs": {"api_key": "hunter2", "noise": 0.3}}
    kept = yaml.safe_load((run / "config.yml").read_text()) | secrets
    (run / "config.yml").write_text(yaml.safe_dump(kept))
    with open(run / "command.txt", "a") as file:
        file.write("python -m rpd_sb3.train --teacher-kwargs 'token: hunter3\nhunter4' noise:0.3\n")
    out = tmp_path / "out"
    out.mkdir()
    assert report.main([str(run), "-o", str(out / "report.html"), "--csv", str(out / "report.csv")]) == 0
    assert export.main(["--run", str(run), "--format", "torch", "-o", str(out / "export")]) == 0
    assert secrets_in(out) == {}
    assert f"http://{MASK}@gpu:8000 (api_key {MASK}, noise 0.3)" in (out / "report.html").read_text()
    assert "noise:0.3" in json.loads((out / "export" / "policy.json").read_text())["training"]["command"]


@pytest.mark.parametrize("way", ["token", "user info"])
def test_a_resumed_run_asks_for_its_secret_again(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RPD_SB3_TOKEN", raising=False)
    with serving(Guarded, token="hunter1") as service:
        url, again = service.url, ["--teacher-kwargs", "token:hunter1"]
        if way == "user info":
            url = service.url.replace("://", "://me:hunter1@")
            again = ["--teacher", url]
        argv = rpd(tmp_path, url, *SMALL)
        token = again if way == "token" else []
        assert train.main([*argv, *token]) == 0
        played = ["--env", TINY, "--teacher", url, "-n", "1", "--vec-env", "dummy"]
        assert evaluate.main([*played, *token, "--json", str(tmp_path / "evaluation.json")]) == 0
        resume = ["--resume", str(tmp_path / "rpd_ppo" / RUN), "-n", "64"]
        capsys.readouterr()
        message = sentence(resume, capsys)
        assert again[0] in message
        assert "hunter1" not in message
        assert train.main([*resume, *again]) == 0
        if way == "token":
            monkeypatch.setenv("RPD_SB3_TOKEN", "hunter1")
            assert train.main([*resume[:2], "-n", "96"]) == 0
            capsys.readouterr()
            message = sentence([*resume, *again, "noise:1"], capsys)
            assert "noise:1" in message
            assert "hunter1" not in message
    assert secrets_in(tmp_path) == {}
    run = load_run(tmp_path / "rpd_ppo" / RUN)
    assert MASK in str(run.config["teacher"] if way == "user info" else run.config["teacher_kwargs"]["token"])


def test_a_message_does_not_repeat_a_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = sentence(rpd(tmp_path, f"http://me:hunter1@127.0.0.1:{free_port()}", *SMALL), capsys)
    assert f"http://{MASK}@127.0.0.1" in message
    assert not SECRET.search(message)
