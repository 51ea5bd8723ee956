from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from rpd_sb3 import doctor, vulkan
from rpd_sb3.doctor import FAIL, OK, WARN, Finding

REPO = Path(__file__).parent.parent


class Health(BaseHTTPRequestHandler):
    """A teacher server reduced to its health check."""

    status: ClassVar[int]

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/v2/health/ready" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Health.status = 200
    http = HTTPServer(("127.0.0.1", 0), Health)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def break_metadata(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == distribution:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_installed_package_is_ok_with_its_version() -> None:
    found = doctor.check_package("gymnasium")
    assert found == Finding("gymnasium", OK, importlib.metadata.version("gymnasium"))


def test_missing_package_fails_with_the_command_that_installs_it() -> None:
    found = doctor.check_package("no-such-distribution")
    assert found == Finding("no-such-distribution", FAIL, "not installed", "pip install 'no-such-distribution'")


def test_package_that_does_not_import_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('libbroken.so: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    found = doctor.check_package("broken-module")
    assert found.status == FAIL
    assert "libbroken.so: no such file" in found.value


def test_version_outside_the_requirement_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requirement", lambda _: "gymnasium>=99")
    found = doctor.check_package("gymnasium")
    assert (found.status, found.fix) == (FAIL, "pip install 'gymnasium>=99'")


def test_without_maniskill_a_missing_vulkan_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def devices() -> list[vulkan.Device]:
        raise vulkan.VulkanError("no Vulkan loader")

    monkeypatch.setattr(vulkan, "devices", devices)
    break_metadata(monkeypatch, "mani_skill")
    found = {finding.name: finding for finding in doctor.examine()}
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
    found = doctor.check_vulkan()
    assert (found.status, found.fix) == ((OK, "") if usable else (FAIL, "make vulkan"))


def test_no_loader_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "LOADER", "libno-such-vulkan.so.1")
    with pytest.raises(vulkan.VulkanError, match=r"no Vulkan loader: .*libno-such-vulkan"):
        vulkan.devices()


def test_renderer_that_does_not_start_fails_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RENDER", "raise RuntimeError('failed to find a rendering device')")
    found = doctor.check_rendering()
    assert found[1:] == (FAIL, "RuntimeError: failed to find a rendering device", "make vulkan")


def test_renderer_that_hangs_fails_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "RENDER", "import threading; threading.Event().wait()")
    monkeypatch.setattr(doctor, "RENDER_TIMEOUT", 0.2)
    assert doctor.check_rendering() == Finding("SAPIEN renders", FAIL, "no answer after 0 s", "make vulkan")


def test_ready_server_is_ok(server: str) -> None:
    assert doctor.check_teacher(server).status == OK
    assert doctor.check_teacher(f"{server}/").status == OK


def test_server_that_is_loading_fails(server: str) -> None:
    Health.status = 503
    found = doctor.check_teacher(server)
    assert (found.status, found.value) == (FAIL, "not ready: HTTP 503")


def test_server_that_is_gone_fails_with_its_address() -> None:
    http = HTTPServer(("127.0.0.1", 0), Health)
    http.server_close()
    found = doctor.check_teacher(f"http://127.0.0.1:{http.server_port}")
    assert found.status == FAIL
    assert f"curl -i http://127.0.0.1:{http.server_port}/v2/health/ready" in found.fix


def test_model_file_must_exist(tmp_path: Path) -> None:
    (tmp_path / "best_model.zip").touch()
    assert doctor.check_teacher(f"sb3:{tmp_path}/best_model.zip").status == OK
    assert doctor.check_teacher(f"sb3:{tmp_path}/best_model").status == OK
    assert doctor.check_teacher(f"sb3:{tmp_path}/last_model").status == FAIL


def test_unknown_teacher_names_the_closest() -> None:
    assert doctor.check_teacher("scriptd").fix == "--teacher scripted"


def test_scripted_teacher_is_always_there() -> None:
    assert doctor.check_teacher("scripted").status == OK


@pytest.mark.parametrize(("file", "status"), [("model/octo_model.py", OK), ("main.py", WARN)])
def test_octo_of_the_index_is_told_from_the_robot_model(
    file: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "octo" / file
    path.parent.mkdir(parents=True)
    (tmp_path / "octo" / "__init__.py").touch()
    path.touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert [finding.status for finding in doctor.check_octo()] == [status]


@pytest.mark.parametrize(("status", "code"), [(OK, 0), (WARN, 0), (FAIL, 1)])
def test_exit_code(status: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda _: [Finding("thing", status, "value [1]", "fix '.[dev]'")])
    assert doctor.main([]) == code


def test_reports_without_any_package() -> None:
    # -S: no site-packages, as on a machine where nothing is installed.
    command = [sys.executable, "-S", "-m", "rpd_sb3.doctor", "--teacher", "scripted"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("torch")] == ["torch  fail  not installed  pip install 'torch'"]
    assert "Teacher scripted  ok  part of the library" in lines
