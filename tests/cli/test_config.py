"""Config files and command-line pairs: how they are read, found, merged and checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import pytest
import yaml

from rpd_sb3.cli.config import load_section, load_yaml, merge, parse_pairs, read_yaml, typed, with_numbers


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text)
    return path


# Files ----------------------------------------------------------------------------------------------------------------

SECTIONS = (
    "default: {gamma: 0.1}\nA-v0: {gamma: 0.2}\nA-v0-dense: {gamma: 0.3}\npaper: {gamma: 0.4}\nA-v0-rgb: {gamma: 0.5}\n"
    "C-v0: {gamma: 0.6}\nC-v0-rgb: {gamma: 0.7}\nC-v0-rgb-dense: {gamma: 0.8}\n"
)


@pytest.mark.parametrize(
    ("env_id", "asked", "section", "gamma"),
    [
        ("A-v0", [], None, 0.2),
        ("A-v0", ["dense"], None, 0.3),
        ("B-v0", ["dense"], None, 0.1),
        ("A-v0", ["dense"], "paper", 0.4),
        ("A-v0", ["rgb", "dense"], None, 0.5),
        ("A-v0", ["rgb+state"], None, 0.2),
        ("C-v0", ["rgb", "dense"], None, 0.8),
    ],
)
def test_section_lookup(tmp_path: Path, env_id: str, asked: list[str], section: str | None, gamma: float) -> None:
    path = write(tmp_path, SECTIONS)
    assert load_section(path, env_id, asked=asked, section=section) == {"gamma": gamma}


@pytest.mark.parametrize(
    ("text", "section", "message"),
    [
        (SECTIONS, "papr", "has no section 'papr', only default, A-v0, .*; did you mean 'paper'"),
        ("A-v0: {}\n1: {}", None, "has no section 'B-v0' or 'default', only A-v0, 1"),
        ("B-v0: 3", None, "section 'B-v0': expected a mapping, got 3"),
        ("- 1\n", None, "expected a mapping at the top, got list"),
        ("B-v0:\n  gamma: [1\nC: 3\n", None, "config.yml, line 3: "),
        ("B-v0: !!python/object/apply:os.system [exit]\n", None, "config.yml, line 1: "),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, section: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_section(write(tmp_path, text), "B-v0", section=section)


ALIAS_BOMB = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 100))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}], y: 1}}\n" for i in range(1, 100))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (ALIAS_BOMB, "more than 100000"),
        (MERGE_BOMB, "more than 100000"),
        ("a: &a [1, *a]", "contains itself"),
        ("a: " + "[" * 40 + "]" * 40, "nested more than 32"),
        ("a: " + "[" * 600 + "]" * 600, "nested more than 32"),
        ("a: " + "x" * 2**20, "longer than 1048576"),
    ],
    ids=["aliases", "merges", "self", "deep", "very deep", "long"],
)
def test_document_beyond_the_limits_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(yaml.YAMLError, match=problem):
        read_yaml(text)
    with pytest.raises(ValueError, match=rf"config file .*{problem}"):
        load_yaml(write(tmp_path, text))


def test_pair_beyond_the_limits_is_refused() -> None:
    with pytest.raises(ValueError, match="-params: .*nested more than"):
        parse_pairs(["a:" + "[" * 40 + "]" * 40], "-params")


def test_aliases_and_merges_within_the_limits_are_read() -> None:
    text = "a: &a {x: 1, z: [1]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config file .*nix.yml' cannot be read: .*No such file"):
        load_section(tmp_path / "nix.yml", "A-v0")


# Command line ---------------------------------------------------------------------------------------------------------


def test_pairs_are_yaml_and_nest() -> None:
    pairs = [
        "gamma:0.8",
        "policy_kwargs.log_std_init:-1",
        "policy_kwargs.net_arch:[8, 8]",
        "obs:rgb+state",
        "x:",
        "a:b:c",
    ]
    assert parse_pairs(pairs, "-params") == {
        "gamma": 0.8,
        "policy_kwargs": {"log_std_init": -1, "net_arch": [8, 8]},
        "obs": "rgb+state",
        "x": None,
        "a": "b:c",
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["gamma"], "-params: 'gamma' is not of the form key:value"),
        (["a:[1"], r"-params: the value of 'a:\[1' cannot be read as YAML"),
        (["a:1", "a.b:2"], "-params: 'a.b:2' contradicts"),
    ],
)
def test_bad_pair_is_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pairs(pairs, "-params")


def test_merge_keeps_the_other_keys_of_a_mapping() -> None:
    section = {"gamma": 0.9, "policy_kwargs": {"net_arch": [64], "log_std_init": 0}}
    merged = merge(section, {"policy_kwargs": {"log_std_init": -1}, "n_steps": 8})
    assert merged == {"gamma": 0.9, "n_steps": 8, "policy_kwargs": {"net_arch": [64], "log_std_init": -1}}
    assert section["policy_kwargs"] == {"net_arch": [64], "log_std_init": 0}


# Types ----------------------------------------------------------------------------------------------------------------

SCHEDULE = float | Callable[[float], float]


def test_strings_in_scientific_notation_become_numbers_at_any_depth() -> None:
    value = {"a": "3e-4", "b": ["1E5", {"c": "-2.5e+3"}], "d": ".5e1", "e": "1e", "f": "e5", "g": 1, "h": "rgb"}
    assert with_numbers(value) == value | {"a": 3e-4, "b": [1e5, {"c": -2500.0}], "d": 5.0}


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (2e2, int, 200),
        (0.5, float | None, 0.5),
        (None, Optional[float], None),  # noqa: UP045  (as SB3 writes it)
        ("lin_3e-4", SCHEDULE, "lin_3e-4"),
        ({"a": 1}, dict[str, Any] | None, {"a": 1}),
        (["a:1"], list[str], ["a:1"]),
        ("anything", Path, "anything"),
        ([1], float | tuple[float, ...], [1]),
    ],
)
def test_value_that_the_annotation_allows(value: Any, annotation: Any, expected: Any) -> None:
    result = typed("x", value, annotation)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (1.5, int, "x=1.5 must be a whole number"),
        (True, int, "x=True must be a whole number"),
        (float("inf"), int, "x=inf must be a whole number"),
        (None, float, "x=None must be a number"),
        (True, SCHEDULE, "x=True must be a number or a schedule"),
        ("lin_1", float, "it takes no schedule"),
        ("dict(a=1)", dict[str, Any], "x='dict.*must be a mapping.*strings are not evaluated"),
        ("a:1", list[str], "x='a:1' must be a list"),
    ],
)
def test_value_that_the_annotation_does_not_allow(value: Any, annotation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        typed("x", value, annotation)
