"""Evaluate a student, an export of one, or a teacher: ``python -m rpd_sb3.evaluate --run logs/rpd_ppo/PickCube-v1_1``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rpd_sb3.cli.common import (
    Interrupt,
    Parser,
    add_policy_flags,
    add_vec_env_flag,
    check_at_least,
    check_folder_of,
    check_policy_flags,
    parse_and_run,
    whole_number,
)


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog="python -m rpd_sb3.evaluate", description=__doc__)
    add = parser.add_argument
    add_policy_flags(parser, "evaluate", n_episodes=100)
    add("--n-envs", type=whole_number, default=8, metavar="N", help="[8]")
    add_vec_env_flag(parser, default="subproc")
    add("--json", metavar="FILE", help="write the numbers to a file; - for stdout instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and return the exit code: 2 for a mistake of the user's, 1 if the evaluation failed, 130 after Ctrl-C."""
    return parse_and_run(argv, make_parser, check, EvaluateCommand)


def check(args: Any) -> None:
    """Check the command line, as far as it can be checked by itself.

    :raises ValueError: with what is wrong
    """
    check_policy_flags(args)
    check_at_least(vars(args), {"n_episodes": 1, "n_envs": 1, "seed": 0})
    if args.json not in (None, "-"):
        check_folder_of("--json", args.json)


class EvaluateCommand:
    """One evaluation, built and ready to run.

    :param args: of :func:`check`
    :raises ValueError: for any mistake of the user's
    :raises TeacherError: if a teacher service does not answer
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.episodes.play import Evaluator
        from rpd_sb3.evaluate.policy_source import open_policy

        self.args = args
        with ExitStack() as closing:
            self.policy = open_policy(args, closing)
            self.evaluator = Evaluator(
                self.policy.env_id,
                self.policy.env_kwargs,
                n_episodes=args.n_episodes,
                seed=args.seed,
                n_envs=args.n_envs,
                vec_env=args.vec_env,
                teacher=self.policy.teacher,
            )
            closing.callback(self.evaluator.close)
            # For a teacher the evaluator makes its own environments, without images that the teacher does not need.
            self.act = None if self.policy.teacher else self.policy.actor(self.evaluator.venv)
            self._closing = closing.pop_all()

    def run(self, interrupt: Interrupt) -> int:
        """Play the episodes and show the results."""
        policy = self.policy
        result = self.evaluator.teacher() if self.act is None else self.evaluator.evaluate(self.act)
        content = {"name": policy.name, "env": policy.env_id, "seed": self.args.seed} | result.summary()
        if self.args.json == "-":
            print(json.dumps(content, indent=2))
            return 0
        _show(content)
        if self.args.json:
            from rpd_sb3.cli.files import write_json

            write_json(Path(self.args.json), content)
        return 0

    def close(self) -> None:
        self._closing.close()


def _show(content: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    low, high = content["ci95"] or (None, None)
    cells = {
        "episodes": str(content["n_episodes"]),
        "success once": percent(content["success_once"]),
        "95 % interval": f"{percent(low)} to {percent(high)}",
        "at end": percent(content["success_at_end"]),
        "return": f"{content['mean_return']:.2f}",
        "length": f"{content['mean_length']:.1f}",
    }
    table = Table(box=box.SIMPLE_HEAD)
    for column in cells:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row(*cells.values())
    print(f"{content['name']} on {content['env']}")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
