"""What works on this machine, and how to fix the rest: ``python -m rpd_sb3.doctor [--teacher URL]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rpd_sb3.contract.names import TEACHER_HELP
from rpd_sb3.doctor import FAIL, OK, WARN, Finding
from rpd_sb3.doctor.machine import inspect_machine
from rpd_sb3.doctor.teacher import inspect_teacher

STYLES = {OK: "green", WARN: "yellow", FAIL: "bold red"}


def show(findings: Sequence[Finding]) -> None:
    """Print the report: a table, or plain lines where rich is missing."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Column, Table
    except ImportError:
        for finding in findings:
            print(*(part for part in finding if part), sep="  ")
        return
    table = Table("", "", Column("found", overflow="fold"), Column("fix", overflow="fold"))
    for name, status, value, fix in findings:
        table.add_row(escape(name), f"[{STYLES[status]}]{status}[/]", escape(value), escape(fix))
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report.

    :return: exit code, 1 if something that is needed is missing
    """
    parser = argparse.ArgumentParser(prog="python -m rpd_sb3.doctor", description="What works on this machine.")
    parser.add_argument("--teacher", help=f"also look at this teacher: {TEACHER_HELP}")
    teacher = parser.parse_args(argv).teacher
    findings = inspect_machine() + ([] if teacher is None else inspect_teacher(teacher))
    show(findings)
    return 1 if any(finding.status == FAIL for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
