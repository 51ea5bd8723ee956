"""What the commands share: their help, their exit codes."""

from __future__ import annotations

import importlib
import subprocess
import sys
from argparse import Namespace
from typing import Any

import pytest

from rpd_sb3.cli.common import Command, Parser, parse_and_run
from rpd_sb3.cli.interrupt import Interrupt
from rpd_sb3.contract.names import TEACHERS
from rpd_sb3.contract.teacher import TeacherError

DOORS = ("train", "evaluate", "enjoy", "collect", "export", "report", "serve")


@pytest.mark.parametrize("door", DOORS)
def test_help_says_each_default_once(door: str) -> None:
    parser = importlib.import_module(f"rpd_sb3.{door}.__main__").make_parser()
    for action in parser._actions:
        text = parser._get_formatter()._expand_help(action)
        assert "(default" not in text
        assert "] [" not in text
        assert not text.endswith(("[None]", "[False]", "[[]]"))
        if type(action.default) in (int, float):
            assert text.endswith(f"[{action.default:g}]")


@pytest.mark.parametrize("door", ["train", "evaluate", "enjoy", "collect"])
def test_help_names_every_kind_of_teacher(door: str) -> None:
    parser = importlib.import_module(f"rpd_sb3.{door}.__main__").make_parser()
    text = "".join(parser.format_help().split())
    assert [name for name in TEACHERS if name not in text] == []


def test_help_needs_no_pytorch() -> None:
    code = (
        "import importlib, sys\n"
        f"for door in {DOORS}:\n"
        "    importlib.import_module(f'rpd_sb3.{door}.__main__').make_parser().format_help()\n"
        "print({'torch', 'stable_baselines3', 'mani_skill'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "set()\n"


class Failing:
    """A command that raises in :meth:`run`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error
        self.closed = False

    def run(self, interrupt: Interrupt) -> int:
        if self.error is not None:
            raise self.error
        return 0

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(
    ("error", "code"), [(None, 0), (TeacherError("it is\ndead"), 1), (KeyboardInterrupt(), 130)], ids=str
)
def test_exit_code_of_a_command(error: BaseException | None, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    command = Failing(error)
    seen: list[Any] = []

    def build(args: Namespace) -> Command:
        seen.append(args.argv)
        return command

    assert parse_and_run([], Parser, lambda args: None, build) == code
    assert (seen, command.closed) == ([[]], True)
    assert capsys.readouterr().err == ("error: it is dead\n" if code == 1 else "")


def test_bug_of_a_command_keeps_its_traceback() -> None:
    command = Failing(ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        parse_and_run([], Parser, lambda args: None, lambda args: command)
    assert command.closed


def test_mistake_is_told_before_anything_is_built(capsys: pytest.CaptureFixture[str]) -> None:
    def check(args: Namespace) -> None:
        raise ValueError("--x is\nwrong")

    assert parse_and_run([], Parser, check, lambda args: pytest.fail("built")) == 2
    assert capsys.readouterr().err == "error: --x is wrong\n"
