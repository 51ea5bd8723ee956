from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gymnasium import spaces

from rpd_sb3.contract.names import TEACHER_HELP, TEACHERS
from rpd_sb3.doctor import FAIL, OK, WARN, Finding, machine, vulkan
from rpd_sb3.doctor import __main__ as doctor
from rpd_sb3.doctor import teacher as teacher_module
from rpd_sb3.doctor.teacher import inspect_teacher
from tests.support import ROOT
from tests.support.helpers import EchoTeacher
from tests.support.serving_helpers import Running, free_port, serving


@pytest.fixture
def service() -> Iterator[Running]:
    with serving() as running:
        yield running


def one(teacher: str) -> Finding:
    """The only line about a teacher."""
    (finding,) = inspect_teacher(teacher)
    return finding


def test_installed_package_is_ok_with_its_version() -> None:
    found = machine.check_package("gymnasium")
    assert found == Finding("gymnasium", OK, importlib.metadata.version("gymnasium"))


def test_missing_package_fails_with_the_command_that_installs_it() -> None:
    found = machine.check_package("no-such-distribution")
    assert found == Finding("no-such-distribution", FAIL, "not installed", "pip install 'no-such-distribution'")


def test_package_that_does_not_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('libbroken.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    found = machine.check_package("broken-module")
    assert found.status == FAIL
    assert "libbroken.so: no such file" in found.value


def test_version_outside_the_requirement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requirement", lambda _: "gymnasium>=99")
    found = machine.check_package("gymnasium")
    assert (found.status, found.fix) == (FAIL, "pip install 'gymnasium>=99'")


def test_without_maniskill_a_missing_vulkan_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> list[vulkan.Device]:
        raise vulkan.VulkanError("no Vulkan loader")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(vulkan, "devices", devices)
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {finding.name: finding for finding in machine.inspect_machine()}
    assert found["ManiSkill"].status == WARN
    assert found["Vulkan"] == Finding("Vulkan", WARN, "no Vulkan loader", "make vulkan")
    assert "SAPIEN renders" not in found


@pytest.mark.parametrize(
    ("device", "usable"),
    [
        (vulkan.Device("llvmpipe (LLVM 15.0.6, 256 bits)", "Mesa 22.3.6 (LLVM 15.0.6)", is_cpu=True), False),
        (vulkan.Device("llvmpipe (LLVM 15.0.7, 256 bits)", "Mesa 23.2.1-1ubuntu3.1 (LLVM 15.0.7)", is_cpu=True), True),
        (vulkan.Device("llvmpipe (LLVM 15.0.6, 256 bits)", "Mesa 25.0.7-2~bpo12+1", is_cpu=True), True),
        (vulkan.Device("AMD Radeon (RADV)", "Mesa 22.3.6", is_cpu=False), True),
        (vulkan.Device("NVIDIA H200", "580.95.05", is_cpu=False), True),
    ],
)
def test_old_software_renderer_is_refused(device: vulkan.Device, usable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "devices", lambda: [device])
    found = machine.check_vulkan()
    assert (found.status, found.fix) == ((OK, "") if usable else (FAIL, "make vulkan"))


def test_no_loader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "LOADER", "libno-such-vulkan.so.1")
    with pytest.raises(vulkan.VulkanError, match=r"no Vulkan loader: .*libno-such-vulkan"):
        vulkan.devices()


def test_renderer_that_does_not_start_fails_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RENDER", "raise RuntimeError('failed to find a rendering device')")
    found = machine.check_rendering()
    assert found[1:] == (FAIL, "RuntimeError: failed to find a rendering device", "make vulkan")


def test_renderer_that_hangs_fails_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "RENDER", "import threading; threading.Event().wait()")
    monkeypatch.setattr(machine, "RENDER_TIMEOUT", 0.2)
    assert machine.check_rendering() == Finding("SAPIEN renders", FAIL, "no answer after 0 s", "make vulkan")


def test_a_service_tells_what_it_serves(service: Running) -> None:
    found = one(service.url)
    assert found == Finding(f"Teacher {service.url}", OK, "echo gives action")
    assert one(f"{service.url}/").status == OK


def test_a_service_is_asked_without_proxies(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert one(service.url).status == OK


@pytest.mark.parametrize(
    ("token", "status", "value"),
    [(None, FAIL, "RPD_SB3_TOKEN"), ("wrong", FAIL, "RPD_SB3_TOKEN"), ("secret", OK, "echo")],
)
def test_the_token_is_shown(token: str | None, status: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RPD_SB3_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("RPD_SB3_TOKEN", token)
    with serving(token="secret") as service:
        found = one(service.url)
    assert found.status == status
    assert value in found.value


def test_replicas_have_a_line_each(service: Running) -> None:
    with serving() as second:
        found = inspect_teacher(f"{service.url},{second.url}")
    assert [finding.name for finding in found] == [f"Teacher {service.url}", f"Teacher {second.url}"]
    assert [finding.status for finding in found] == [OK, OK]


def test_replicas_that_differ_fail(service: Running) -> None:
    with serving(lambda: EchoTeacher(space=spaces.Discrete(2))) as second:
        found = inspect_teacher(f"{service.url},{second.url}")
    assert [finding.status for finding in found] == [OK, FAIL]
    assert "something else" in found[1].value


def test_a_service_that_loads_fails_at_once_with_its_state() -> None:
    go = threading.Event()
    with serving(lambda: (go.wait(30), EchoTeacher())[1], wait=False) as service:
        found = one(service.url)
        go.set()
    assert found.status == FAIL
    assert "is loading" in found.value
    assert found.fix == f"curl -i {service.url}/v2/health/ready"


def test_server_that_is_gone_fails_with_its_address() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = one(url)
    assert found.status == FAIL
    assert url in found.value


def test_a_client_that_is_not_installed_is_named(service: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rpd_sb3.teachers.remote.teacher", None)
    found = one(service.url)
    assert (found.status, found.fix) == (FAIL, "pip install rpd_sb3")


@pytest.mark.parametrize("url", ["http://", "http://localhost:port", "https:x"])
def test_impossible_urls_fail(url: str) -> None:
    assert one(url).status == FAIL


def test_model_file_must_exist(tmp_path: Path) -> None:
    (tmp_path / "best_model.zip").touch()
    assert one(f"sb3:{tmp_path}/best_model.zip").status == OK
    assert one(f"sb3:{tmp_path}/best_model").status == OK
    assert one(f"sb3:{tmp_path}/last_model").status == FAIL


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder that passes for a checkpoint of OpenVLA."""
    (tmp_path / "openvla").mkdir()
    (tmp_path / "openvla" / "config.json").touch()
    return tmp_path / "openvla"


def test_a_folder_of_openvla_must_hold_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    fix = "--teacher openvla:PATH, a checkpoint's folder or its hub id"
    assert one(f"openvla:{checkpoint}")[1:] == (OK, "the checkpoint exists", "")
    assert one(f"openvla:{tmp_path}")[1:] == (FAIL, "no config.json there", fix)
    assert one(f"openvla:{tmp_path}/none")[1:] == (FAIL, "no config.json there", fix)


def test_a_home_folder_of_openvla_is_found(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(checkpoint.parent))
    assert one("openvla:~/openvla")[1:] == (OK, "the checkpoint exists", "")


def test_a_hub_id_of_openvla_is_taken_for_one() -> None:
    assert one("openvla:no-such-org/no-such-name")[1:] == (OK, "on the hub, not looked at", "")


@pytest.mark.parametrize("path", ["./org/name", "~/none", "org/", "name", "a/b/c"])
def test_what_is_not_a_hub_id_of_openvla_fails(path: str) -> None:
    assert one(f"openvla:{path}")[1:3] == (FAIL, "no config.json there")


def test_what_openvla_lacks_is_named(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_lacks", lambda package: package in ("tokenizers", "PIL"))
    wanted = (FAIL, "not installed here: tokenizers, PIL", "pip install 'rpd_sb3[openvla]', or use a service's URL")
    assert one(f"openvla:{checkpoint}")[1:] == wanted


def test_unknown_teacher_names_the_closest() -> None:
    found = one("scriptd")
    assert "did you mean 'scripted'?" in found.value
    assert all(name in found.fix for name in TEACHERS)


def test_scripted_teacher_is_always_there() -> None:
    assert one("scripted").status == OK


def test_the_module_of_an_own_teacher_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_module.py").write_text("raise RuntimeError")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    assert one("own_module:Teacher")[1:] == (OK, f"in {tmp_path / 'own_module.py'}", "")
    assert one("no_module:Teacher")[1:3] == (FAIL, "no module no_module")
    assert one("own_package.inner:Teacher")[1:3] == (FAIL, "own_package.inner does not import: RuntimeError('broken')")


@pytest.mark.parametrize(("file", "status"), [("model/octo_model.py", OK), ("main.py", WARN)])
def test_octo_of_the_index_is_told_from_the_robot_model(
    file: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "octo" / file
    path.parent.mkdir(parents=True)
    (tmp_path / "octo" / "__init__.py").touch()
    path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert [finding.status for finding in machine.check_octo()] == [status]


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_exit_code(status: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "inspect_machine", lambda: [Finding("thing", status, "value [1]", "fix '.[dev]'")])
    assert doctor.main([]) == code


def test_help_names_the_teachers_of_the_registry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        doctor.main(["--help"])
    assert TEACHER_HELP in capsys.readouterr().out


def test_reports_without_any_package() -> None:
    # -S: no site-packages, as on a machine where nothing is installed.
    command = [sys.executable, "-S", "-m", "rpd_sb3.doctor", "--teacher", "http://127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch  fail  not installed  pip install 'torch'"]
    assert re.fullmatch(r"Teacher \S+  fail  cannot be asked from here: .*numpy.*  pip install rpd_sb3", lines[-1])
