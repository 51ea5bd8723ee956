"""Files that are replaced as a whole."""

import json
from pathlib import Path

import pytest
import yaml

from rpd_sb3.cli.files import replace_text, write_json, write_yaml


def test_file_is_replaced_by_a_complete_one_only(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), (1.5, float("inf"))], "b": {"c": "ü", "d": True}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, [1.5, None]], "b": {"c": "ü", "d": True}}


def test_yaml_keeps_the_order(tmp_path: Path) -> None:
    write_yaml(tmp_path / "a.yml", {"b": 1, "a": "ü"})
    assert list(yaml.safe_load((tmp_path / "a.yml").read_text()).items()) == [("b", 1), ("a", "ü")]
