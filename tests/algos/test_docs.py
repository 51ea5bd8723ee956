"""docs/algorithms.md says where each equation stands."""

from __future__ import annotations

import re

import pytest

from rpd_sb3.algos import ALGOS
from tests.support import ROOT

PAGE = (ROOT / "docs" / "algorithms.md").read_text()
ROWS = re.findall(r"^\|.*\| `(algos/\w+\.py)` \| `(.+)` \|$", PAGE, re.MULTILINE)


def test_every_row_of_the_table_is_read() -> None:
    assert len(ROWS) == PAGE.count("`algos/") - 2  # those of "Adding one" have a placeholder, or are the registry


@pytest.mark.parametrize(("file", "words"), ROWS)
def test_each_equation_stands_where_the_page_says(file: str, words: str) -> None:
    assert words.replace("\\*", "*") in (ROOT / "rpd_sb3" / file).read_text()


def test_each_algorithm_has_its_file_and_config() -> None:
    for name, algo in ALGOS.items():
        assert (ROOT / "zoo_configs" / f"{name}.yml").is_file()
        if algo.__module__.startswith("rpd_sb3."):
            assert algo.__module__ == f"rpd_sb3.algos.{algo.__name__.lower()}"
