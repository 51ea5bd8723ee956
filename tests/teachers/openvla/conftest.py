from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.openvla_helpers import make_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small checkpoint; nothing writes into it."""
    return make_checkpoint(tmp_path_factory.mktemp("openvla"))
