"""What all tests of exports share: policies are exported once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpd_sb3.export.deploy import DeployablePolicy, input_specs
from tests.support.export_helpers import POLICIES

Exported = Callable[[Callable[..., Any], str], Path]
"""From ``write_onnx`` or ``write_torch`` and a key of :data:`POLICIES` to the file."""


@pytest.fixture(scope="session", autouse=True)
def operators_are_translated_once() -> Iterator[None]:
    """PyTorch builds its table of ONNX operators anew for every export, which takes most of the time of a small one."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(registration.ONNXRegistry.from_torchlib)
        patch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(cached))
        yield


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Writes a policy in a format, the first time that it is asked for."""

    @functools.cache
    def export(write: Callable[..., Any], kind: str) -> Path:
        policy = POLICIES[kind]()
        path = tmp_path_factory.mktemp("exported") / ("policy.onnx" if write.__name__ == "write_onnx" else "policy.pt2")
        write(path, DeployablePolicy(policy), input_specs(policy.observation_space))
        return path

    return export
