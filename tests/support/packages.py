"""Packages that setup.cfg names, and processes that lack some of them."""

from __future__ import annotations

import configparser
import re

from tests.support import ROOT

BLOCK = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Absent())
"""


def packages(section: str, key: str) -> list[str]:
    """Names of distributions in setup.cfg, without versions."""
    setup = configparser.RawConfigParser()
    setup.read(ROOT / "setup.cfg")
    return [re.split(r"[<>=]", line)[0] for line in setup[section][key].split()]
