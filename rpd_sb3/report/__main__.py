"""Runs as one page: ``python -m rpd_sb3.report logs/rpd_ppo/PickCube-v1_1 logs/ppo/PickCube-v1_1 -o report.html``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rpd_sb3.cli.common import RUN_ERROR, Interrupt, Parser, check_folder_of, parse_and_run, print_error


def make_parser() -> Parser:
    """Every flag."""
    parser = Parser(prog="python -m rpd_sb3.report", description=__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="RUN_DIR",
        help="run folders; those that differ in nothing but the seed are one curve",
    )
    add("-o", "--output", metavar="FILE", default="report.html", help="the page [report.html]")
    add("--csv", metavar="FILE", help="also write one row for each run and evaluation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, and return the exit code: 2 for a mistake of the user's, 1 if a file cannot be written."""
    return parse_and_run(argv, make_parser, check, ReportCommand)


def check(args: Any) -> None:
    """Check the command line, as far as it can be checked without the runs.

    :raises ValueError: with what is wrong
    """
    for flag, name, example in (("-o", args.output, "report.html"), ("--csv", args.csv, "numbers.csv")):
        if name is None:
            continue
        if Path(name).is_dir():
            raise ValueError(f"{flag} {name} is a folder; name a file in it, e.g. {Path(name) / example}")
        check_folder_of(flag, name)
    if args.csv is not None and Path(args.csv).resolve() == Path(args.output).resolve():
        raise ValueError(f"--csv {args.csv} is also the page of -o; name another file")


class ReportCommand:
    """A report, whose runs have been read.

    :param args: of :func:`check`
    :raises ValueError: for a user's mistake
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.report.groups import group_records
        from rpd_sb3.report.records import read_records

        self.args = args
        self.environments = group_records(read_records(args.runs))

    def run(self, interrupt: Interrupt) -> int:
        """Write the page and print its headline."""
        from rpd_sb3.cli.files import replace_text
        from rpd_sb3.report.numbers import to_csv
        from rpd_sb3.report.page import render
        from rpd_sb3.report.words import headline

        files = {self.args.output: render(self.environments)}
        if self.args.csv is not None:
            files[self.args.csv] = to_csv(self.environments)
        try:
            with interrupt.deferred():
                for name, text in files.items():
                    replace_text(Path(name), text)
        except OSError as error:
            print_error(error)
            return RUN_ERROR
        print(headline(self.environments))
        for name in files:
            print(f"{name} {Path(name).stat().st_size / 1e6:.1f} MB")
        return 0

    def close(self) -> None:
        """There is nothing to close."""


if __name__ == "__main__":
    sys.exit(main())
