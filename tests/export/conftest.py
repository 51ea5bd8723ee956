"""What all tests of exports share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def operators_are_translated_once() -> Iterator[None]:
    """PyTorch builds its table of ONNX operators anew for every export, which takes most of the time of a small one."""
    registration = pytest.importorskip("torch.onnx._internal.exporter._registration")
    with pytest.MonkeyPatch.context() as patch:
        cached = functools.cache(registration.ONNXRegistry.from_torchlib)
        patch.setattr(registration.ONNXRegistry, "from_torchlib", staticmethod(cached))
        yield
