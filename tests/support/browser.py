"""A browser of this machine, for tests of pages."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_TIMEOUT = 60.0
PHONE = 390
"""Width in CSS pixels."""

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: apt-get install chromium")


def chromium(tmp_path: Path, url: str) -> str:
    """The page as the browser has understood it, after its scripts."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, timeout=BROWSER_TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout
