"""Evaluate a student, an export of one, or a teacher: ``python -m rpd_sb3.evaluate --run logs/rpd_ppo/PickCube-v1_1``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpd_sb3.cli import (
    Interrupt,
    Parser,
    add_vec_env_flag,
    check_at_least,
    check_training_side,
    run_command,
    whole_number,
)

if TYPE_CHECKING:
    from rpd_sb3.evaluation import EvalResult


def make_parser() -> Parser:
    """Every flag."""
    parser = Parser(prog="python -m rpd_sb3.evaluate", description=__doc__)
    add = parser.add_argument
    add("--run", metavar="RUN_DIR", help="evaluate the student of a run")
    add("--model", choices=("best", "last"), default="best", help="which of the run's models [best]")
    add("--export", metavar="DIR", help="evaluate an export of python -m rpd_sb3.export")
    add("--teacher", help="evaluate a teacher: scripted, sb3:FILE, http://HOST:PORT[,...] or MODULE:CLASS")
    add("--teacher-kwargs", nargs="+", default=[], metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("--env", metavar="ID", help="ManiSkill or Gymnasium id [that of the run or export]")
    add(
        "--env-kwargs",
        nargs="+",
        default=[],
        metavar="K:V",
        help="options of the environment [those of the run or export]",
    )
    add("-n", "--n-episodes", type=whole_number, default=100, metavar="N", help="[100]")
    add(
        "--seed", type=whole_number, default=10_000, help="of the first episode; the next one has the next seed [10000]"
    )
    add("--n-envs", type=whole_number, default=8, metavar="N", help="[8]")
    add_vec_env_flag(parser, default="subproc")
    add("--device", default="auto", help="of the student: auto, cpu, cuda ... [auto]")
    add("--json", metavar="FILE", help="write the numbers to a file; - for stdout instead of the table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, and return the exit code: 2 for a mistake of the user's, 1 if the evaluation failed, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return run_command(lambda: Job(check(argv)))


def check(argv: Sequence[str]) -> Any:
    """The command line, as far as it can be checked by itself.

    :raises ValueError: with what is wrong
    """
    check_training_side()
    args = make_parser().parse_args(argv)
    from rpd_sb3.players import check_player

    if args.export is None:
        check_player(args)
    elif args.run or args.teacher or args.teacher_kwargs:
        raise ValueError("--export names the player: leave out --run, --teacher and --teacher-kwargs")
    check_at_least(vars(args), {"n_episodes": 1, "n_envs": 1})
    return args


class Job:
    """One evaluation, built and ready to run.

    :param args: of :func:`check`
    :raises ValueError: for any mistake of the user's
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.evaluation import Evaluator
        from rpd_sb3.exporting.loading import ExportPlayer, check_actions, open_export
        from rpd_sb3.players import open_player

        self.args = args
        with ExitStack() as closing:
            self.player: Any = open_export(args) if args.export else open_player(args, closing)
            self.evaluator = Evaluator(
                self.player.env_id,
                self.player.env_kwargs,
                n_episodes=args.n_episodes,
                seed=args.seed,
                n_envs=args.n_envs,
                vec_env=args.vec_env,
                teacher=self.player.teacher,
            )
            closing.callback(self.evaluator.close)
            if isinstance(self.player, ExportPlayer):
                check_actions(self.player, self.evaluator.venv.action_space)
            self._closing = closing.pop_all()

    def _play(self) -> EvalResult:
        from rpd_sb3.exporting.loading import export_actor

        if self.args.export:
            return self.evaluator.evaluate(export_actor(self.player.policy, self.evaluator.venv.observation_space))
        model = self.player.model
        return self.evaluator.teacher() if model is None else self.evaluator.student(model)

    def run(self, interrupt: Interrupt) -> int:
        """Play the episodes and show how they went."""
        player, result = self.player, self._play()
        content = {"name": player.name, "env": player.env_id, "seed": self.args.seed} | result.summary()
        if self.args.json == "-":
            print(json.dumps(content, indent=2))
            return 0
        _show(content)
        if self.args.json:
            from rpd_sb3.runs import write_json

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
