"""What works on this machine.

Every check imports what it looks at itself, so that a broken package costs one line of the report and not the report.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from pathlib import Path

from rpd_sb3.contract.cores import n_cores
from rpd_sb3.doctor import FAIL, OK, WARN, Finding, vulkan

TIMEOUT = 5.0
"""Deadline for the answer of a GPU's driver."""
RENDER_TIMEOUT = 60.0
"""Deadline for a renderer's start; a software renderer on a busy machine takes seconds."""

# torch has a line of its own.
REQUIRED = ("numpy", "gymnasium", "stable-baselines3", "sb3-contrib")

# In a child process: a broken driver ends it with a signal. Creating the system is what ManiSkill does at every reset.
RENDER = """
import warnings; warnings.simplefilter("ignore")
import sapien
sapien.render.RenderSystem()
print(sapien.render.get_device_summary())
"""


def inspect_machine() -> list[Finding]:
    """All checks of the machine, in the order of the report."""
    maniskill = check_maniskill()
    installed = maniskill.status != WARN
    findings = [check_python(), check_cores(), check_torch(), check_gpu()]
    findings += [check_package(distribution) for distribution in REQUIRED]
    findings += [maniskill, check_vulkan(needed=installed)]
    if installed:
        findings += [check_package("fast-simplification"), check_rendering()]
    return findings + check_octo()


def check_python() -> Finding:
    """Version of the interpreter."""
    version = platform.python_version()
    if sys.version_info >= (3, 13):
        return Finding("Python", WARN, f"{version}: ManiSkill has no wheels for it", "install Python 3.12")
    return Finding("Python", OK, version)


def check_cores() -> Finding:
    """CPU cores that this process may use, which bounds the useful number of environments."""
    return Finding("CPU cores", OK, str(n_cores()))


def requirement(distribution: str) -> str:
    """What setup.cfg asks for, e.g. ``gymnasium<2,>=1``; the bare name when that cannot be read."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        for line in importlib.metadata.requires("rpd_sb3") or []:
            asked = Requirement(line)
            if canonicalize_name(asked.name) == canonicalize_name(distribution):
                return f"{asked.name}{asked.specifier}"
    except ImportError:  # no packaging, or not installed but run from a checkout
        pass
    return distribution


def check_version(name: str, distribution: str, version: str) -> Finding:
    """Whether the version fits the requirement; it does where that cannot be told."""
    asked = requirement(distribution)
    try:
        from packaging.requirements import Requirement

        if not Requirement(asked).specifier.contains(version, prereleases=True):
            return Finding(name, FAIL, f"{version}, but the library needs {asked}", f"pip install '{asked}'")
    except ImportError:
        pass
    return Finding(name, OK, version)


def check_package(distribution: str) -> Finding:
    """Version of an installed package that imports."""
    fix = f"pip install '{requirement(distribution)}'"
    try:
        version = importlib.metadata.version(distribution)
        importlib.import_module(distribution.replace("-", "_"))
    except importlib.metadata.PackageNotFoundError:
        return Finding(distribution, FAIL, "not installed", fix)
    except Exception as error:  # whatever a broken package raises is the finding
        return Finding(distribution, FAIL, f"does not import: {str(error)[:200]!r}", f"{fix} --force-reinstall")
    return check_version(distribution, distribution, version)


def check_torch() -> Finding:
    """torch and the device it was built for."""
    finding = check_package("torch")
    if finding.status != OK:
        return finding
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return finding._replace(value=f"{finding.value.split('+')[0]}, {build}")


def check_gpu() -> Finding:
    """The GPU that torch computes on."""
    driver = _nvidia_smi()
    try:
        import torch

        if torch.cuda.is_available():
            name = torch.cuda.get_device_name(0)
            memory = torch.cuda.get_device_properties(0).total_memory / 2**30
            return Finding("GPU", OK, f"{torch.cuda.device_count()} x {name}, {memory:.0f} GiB")
        cpu_build = torch.version.cuda is None
    except Exception:  # torch has its own line
        cpu_build = False
    if driver is None:
        return Finding("GPU", OK, "none, everything runs on the CPU")
    why, fix = (
        ("is a CPU build", "pip install --force-reinstall torch") if cpu_build else ("cannot reach it", "nvidia-smi")
    )
    return Finding("GPU", WARN, f"{driver}, unused: torch {why}", fix)


def check_vulkan(needed: bool = True) -> Finding:
    """Vulkan devices and their drivers; ManiSkill needs one even for state observations.

    :param needed: False turns a failure into a warning
    """
    bad = FAIL if needed else WARN
    try:
        devices = vulkan.devices()
    except vulkan.VulkanError as error:
        return Finding("Vulkan", bad, str(error), "make vulkan")
    value = "; ".join(f"{device.name}, {device.driver}" for device in devices) or "no device"
    if any(device.usable for device in devices):
        return Finding("Vulkan", OK, value)
    if devices:
        value += f" (too old: Mesa >= {'.'.join(map(str, vulkan.MESA_MIN))} is needed)"
    return Finding("Vulkan", bad, value, "make vulkan")


def check_maniskill() -> Finding:
    """Version of ManiSkill, which is optional; without it the other Gymnasium environments work."""
    try:
        version = importlib.metadata.version("mani_skill")
    except importlib.metadata.PackageNotFoundError:
        return Finding("ManiSkill", WARN, "not installed: no ManiSkill tasks", "pip install -e '.[maniskill]'")
    return check_version("ManiSkill", "mani_skill", version)


def check_rendering() -> Finding:
    """Whether SAPIEN, ManiSkill's simulator, renders here, and on what."""
    name = "SAPIEN renders"
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER], capture_output=True, text=True, timeout=RENDER_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding(name, FAIL, f"no answer after {RENDER_TIMEOUT:.0f} s", "make vulkan")
    if done.returncode == 0:
        devices = [line.removeprefix("GPU: ") for line in done.stdout.splitlines() if line.startswith("GPU: ")]
        return Finding(name, OK, "; ".join(devices))
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"ended with {done.returncode}"
    missing_library = "cannot open shared object file" in reason
    return Finding(name, FAIL, reason, "sudo make system" if missing_library else "make vulkan")


def check_octo() -> list[Finding]:
    """A line about Octo where a package of that name is installed: the index has an unrelated one."""
    spec = importlib.util.find_spec("octo")
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if any((folder / "model" / "octo_model.py").is_file() for folder in folders):
        return [Finding("Octo", OK, "the robot model")]
    return [Finding("Octo", WARN, "`octo` is the index's plugin framework, not the robot model", "pip uninstall octo")]


def _nvidia_smi() -> str | None:
    """Name of the first GPU that NVIDIA's driver sees."""
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):  # OSError: it is not installed
        return None
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
