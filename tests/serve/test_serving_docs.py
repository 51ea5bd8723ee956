"""What docs/serving.md shows is true."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import requests

from rpd_sb3.serve.__main__ import make_parser
from rpd_sb3.teachers import Query
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from rpd_sb3.teachers.scripted.teacher import ScriptedTeacher
from rpd_sb3.train.__main__ import make_parser as make_train_parser
from tests.support import ROOT
from tests.support.packages import packages
from tests.support.serving_helpers import free_port, serving, serving_process

PAGE = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
COMMANDS = "\n".join(text for language, text in BLOCKS if not language)


def commands(start: str) -> list[list[str]]:
    """Words of the commands that start like this, after it."""
    lines = [line for line in COMMANDS.splitlines() if start in line]
    return [shlex.split(line.partition(start)[2].rstrip("& "), comments=True) for line in lines]


def test_the_packages_of_the_service_are_those_of_setup_cfg() -> None:
    assert commands("pip install ")[0] == packages("options.extras_require", "teacher-server")


def test_every_flag_exists() -> None:
    for words in commands("python -m rpd_sb3.serve "):
        make_parser().parse_args(words)
    for words in commands("python -m rpd_sb3.train "):
        make_train_parser().parse_args(words)


def test_the_own_teacher_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (text for language, text in BLOCKS if language == "python")
    (tmp_path / "my_vla.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = next(words for words in commands("python -m rpd_sb3.serve ") if "my_vla:MyVLA" in words)
    port = free_port()
    with serving_process(*words[: words.index("--port")], port=port):
        teacher = RemoteTeacher([f"http://127.0.0.1:{port}"])
        assert teacher.spec.name == "my VLA, step-5000"
        inputs = {"images.human": np.zeros((2, 256, 256, 3), np.uint8), "instruction": np.array(["pick", "place"])}
        labels = teacher.submit(Query(inputs, np.arange(2), np.ones(2, bool))).result(10)
        teacher.close()
    assert labels["action"].tolist() == [[0.0] * 7] * 2


def test_the_request_by_hand_is_answered() -> None:
    (command,) = re.findall(r"^curl -s \S+infer -d (.*?\]\}')$", COMMANDS, re.DOTALL | re.MULTILINE)
    body = subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, text=True, check=True).stdout
    with serving(lambda: ScriptedTeacher("PickCube-v1")) as service:
        answer = requests.post(f"{service.url}/v2/models/teacher/infer", data=body, timeout=10).json()
    assert answer["outputs"][0]["shape"] == [1, 7]


@pytest.mark.parametrize("path", re.findall(r"\]\((\.\./[^)]+)\)", PAGE))
def test_links_lead_somewhere(path: str) -> None:
    assert (ROOT / "docs" / path).exists()


def test_the_pages_of_the_service_exist() -> None:
    pages = re.findall(r"^\| `(/[\w/]*)` \|", PAGE, re.MULTILINE)
    assert len(pages) == 5
    with serving() as service:
        status = {page: requests.get(service.url + page, timeout=10).status_code for page in pages}
    assert {page: 405 if page.endswith("/infer") else 200 for page in pages} == status


def test_the_metrics_exist() -> None:
    names = set(re.findall(r"`(rpd_sb3_[a-z_]+)", PAGE))
    assert len(names) > 5
    with serving() as service:
        requests.post(f"{service.url}/v2/models/teacher/infer", json={}, timeout=10)
        text = requests.get(f"{service.url}/metrics", timeout=10).text
    assert {name for name in names if name not in text} == set()
