"""Teachers by name: classes of the user's, and OpenVLA. The other kinds are tested where they live."""

from __future__ import annotations

import importlib
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from rpd_sb3.contract.names import TEACHER_HELP, TEACHERS
from rpd_sb3.serve import __main__ as serve
from rpd_sb3.teachers import make_teacher
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from tests.support.openvla_helpers import make_checkpoint
from tests.support.serving_helpers import free_port, serving_process

MODULE = """
import numpy as np
from gymnasium import spaces
from rpd_sb3.teachers import LocalTeacher, TeacherSpec

class Constant(LocalTeacher):
    def __init__(self, value=0.0):
        super().__init__()
        box = spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.spec = TeacherSpec("constant", frozenset({"action"}), ("state",), box, input_shapes={"state": (3,)})
        self.value = value

    def label(self, query):
        return {"action": np.full((len(query.env_ids), 2), self.value, np.float32)}

class Anything(Constant):
    def __init__(self, **kwargs):
        super().__init__()
        self.kwargs = kwargs

class Bare(LocalTeacher):
    pass

def function():
    return Constant()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of the user's, on the path."""
    (tmp_path / "own_vla").mkdir()
    (tmp_path / "own_vla" / "__init__.py").touch()
    (tmp_path / "own_vla" / "teachers.py").write_text(MODULE)
    (tmp_path / "own_vla" / "broken.py").write_text("import no_such_vla")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_class_is_made_with_its_arguments(own: Path) -> None:
    teacher = make_teacher("own_vla.teachers:Constant", "Any-v0", value=0.5)
    assert teacher.spec.name == "constant"
    assert vars(teacher)["value"] == 0.5


def test_a_class_may_take_any_argument(own: Path) -> None:
    teacher = make_teacher("own_vla.teachers:Anything", "Any-v0", checkpoint="x")
    assert vars(teacher)["kwargs"] == {"checkpoint": "x"}


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("own_vla.broken:Constant", {}, "module 'own_vla.broken' cannot be imported: No module named 'no_such_vla'"),
        ("own_vla.teachers:Constnt", {}, "module 'own_vla.teachers' has no 'Constnt'; did you mean 'Constant'"),
        ("own_vla.teachers:function", {}, "expected a class with spec, submit"),
        ("concurrent.futures:ThreadPoolExecutor", {}, "expected a class with spec, submit"),  # it has submit
        ("own_vla.teachers:Bare", {}, "has no spec: its constructor must set self.spec"),
        ("own_vla.teachers:Constant", {"valeu": 1}, r"has no argument 'valeu' \(it has value\); did you mean 'value'"),
        ("own_vla.teachers:", {}, "is unknown; choose one of scripted, .*MODULE:CLASS"),
        (".teachers:Constant", {}, "is unknown"),
        ("own_vla.teachers:Constant()", {}, "is unknown"),
    ],
)
def test_what_is_not_a_teacher_is_refused(own: Path, name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_teacher(name, "Any-v0", **kwargs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("openvla"))


def test_openvla_is_made_from_its_folder_with_its_arguments(checkpoint: Path) -> None:
    with closing(make_teacher(f"openvla:{checkpoint}", "Any-v0", device="cpu", camera="base", n_samples=2)) as teacher:
        assert isinstance(teacher, OpenVLATeacher)
        assert teacher.spec.inputs == ("images.base", "instruction")
        assert "std" in teacher.spec.labels
        assert teacher.spec.stochastic


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("openvla:", {}, "teacher 'openvla:' is unknown; choose one of scripted, .*openvla:PATH"),
        ("gato:/x", {}, "teacher 'gato:/x' is unknown"),
        ("scripted", {"nose": 0.3}, "has no argument 'nose'.*did you mean 'noise'"),
        ("scripted:x", {}, "module 'scripted' cannot be imported"),
        ("openvla:/no/such/folder", {}, "there is no folder '/no/such/folder'; give an OpenVLA checkpoint's folder"),
        ("openvla:x", {"path": "y"}, r"teacher 'openvla:x' has no argument 'path' \(it has unnorm_key, camera, "),
    ],
)
def test_what_is_not_one_of_the_librarys_teachers_is_refused(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_teacher(name, "Any-v0", **kwargs)


def test_openvlas_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rpd_sb3.teachers.openvla.teacher", None)
    with pytest.raises(ValueError, match=r"^teacher 'openvla:org/name': .*; pip install 'rpd_sb3\[openvla\]'$"):
        make_teacher("openvla:org/name", "Any-v0")


def test_every_kind_in_the_list_of_teachers_names_a_class() -> None:
    for written, kind in TEACHERS.items():
        if kind.module:
            cls = getattr(importlib.import_module(kind.module), kind.class_name)
            assert callable(cls.submit), written
        assert written in TEACHER_HELP
        assert kind.help


def test_the_list_of_teachers_is_light_to_import() -> None:
    for module, heavy in (("contract.names", {"numpy", "gymnasium"}), ("teachers.registry", {"stable_baselines3"})):
        code = f"import sys, rpd_sb3.{module}; print({heavy | {'torch'}} & set(sys.modules))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "set()\n"


def test_openvla_is_loaded_by_the_service_as_the_command_line_says(checkpoint: Path) -> None:
    words = ["--teacher", f"openvla:{checkpoint}", "--teacher-kwargs", "device:cpu", "rotation_sign:-1", "dtype:bf16"]
    args = serve.make_parser().parse_args(words)
    serve.check(args)
    with closing(serve.teacher_loader(args)()) as teacher:
        assert (teacher.spec.name, teacher.spec.rotation_sign) == ("openvla", -1)


def test_a_class_is_served_from_the_command_line(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(own))
    port = free_port()
    arguments = ("--teacher", "own_vla.teachers:Constant", "--teacher-kwargs", "value:0.25")
    with serving_process(*arguments, port=port):
        inputs = [{"name": "state", "datatype": "FP32", "shape": [4, 3], "data": np.zeros(12).tolist()}]
        page = f"http://127.0.0.1:{port}/v2/models/teacher/infer"
        answer = requests.post(page, json={"inputs": inputs}, timeout=10).json()
    assert answer["outputs"][0]["data"] == [0.25] * 8
