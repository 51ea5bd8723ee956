"""What the commands share: flags, one sentence for a user's mistake, exit codes."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rpd_sb3.cli.interrupt import Interrupt
from rpd_sb3.contract.names import TEACHER_HELP, closest
from rpd_sb3.contract.secrets import redact_urls

USER_ERROR, RUN_ERROR = 2, 1
"""Exit codes: nothing was started; something failed on the way. 128 + n after signal n."""


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of a flag with its default in brackets, unless the help has brackets already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if not text or "[" in text or action.default in (None, False, [], argparse.SUPPRESS):
            return text
        return f"{text} [%(default)s]"


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing the usage; suggests the closest flag."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        result, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            raise ValueError(f"unknown argument {unknown[0]!r}{closest(word, self._option_string_actions)}")
        return result

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def whole_number(text: str) -> int:
    """An int, also written as 1e5."""
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(value)


whole_number.__name__ = "whole number"  # argparse shows it: invalid whole number value: 'x'


def add_vec_env_flag(parser: argparse.ArgumentParser, **kwargs: Any) -> None:
    """``--vec-env``, of every command that makes environments.

    :param kwargs: further arguments of ``add_argument``
    """
    choices = ("subproc", "dummy")
    parser.add_argument("--vec-env", choices=choices, help="in worker processes or in this one [subproc]", **kwargs)


def add_policy_flags(parser: argparse.ArgumentParser, verb: str, n_episodes: int) -> None:
    """Adds the flags that name a policy, the environment it acts in, and the episodes.

    :param parser: of the command
    :param verb: what the command does with the policy, for the help
    :param n_episodes: how many episodes unless ``-n`` says so
    """
    add = parser.add_argument
    add("--run", metavar="RUN_DIR", help=f"{verb} the student of a run")
    add("--model", choices=("best", "last"), default="best", help="which of the run's models [best]")
    add("--export", metavar="DIR", help=f"{verb} an export of python -m rpd_sb3.export")
    add("--teacher", help=f"{verb} a teacher: {TEACHER_HELP}")
    add("--teacher-kwargs", nargs="+", default=[], metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("--env", metavar="ID", help="ManiSkill or Gymnasium id [that of the run or export]")
    add(
        "--env-kwargs",
        nargs="+",
        default=[],
        metavar="K:V",
        help="options of the environment [those of the run or export]",
    )
    add("-n", "--n-episodes", type=whole_number, default=n_episodes, metavar="N", help=f"[{n_episodes}]")
    add(
        "--seed", type=whole_number, default=10_000, help="of the first episode; the next one has the next seed [10000]"
    )
    add("--device", default="auto", help="of the student: auto, cpu, cuda ... [auto]")


def check_policy_flags(args: Any) -> None:
    """Checks that a command line names one policy.

    :param args: with ``run``, ``export``, ``teacher``, ``teacher_kwargs`` and ``env``
    :raises ValueError: with what is wrong
    """
    if [args.run, args.export, args.teacher].count(None) != 2:
        raise ValueError(
            "name one policy: a run, e.g. --run logs/rpd_ppo/PickCube-v1_1, an export, e.g. --export pick_policy, or a "
            "teacher, e.g. --teacher scripted"
        )
    if args.teacher and args.env is None:
        raise ValueError("--env is missing: name the environment that the teacher acts in, e.g. --env PickCube-v1")
    if args.teacher_kwargs and not args.teacher:
        raise ValueError(f"--teacher-kwargs are for --teacher, not for {'--run' if args.run else '--export'}")


def check_at_least(given: Mapping[str, Any], minima: Mapping[str, int]) -> None:
    """Check that numbers are not too small; those that are not given are not looked at.

    :param given: command line
    :param minima: flag, with underscores, to its least value
    :raises ValueError: for the first one below
    """
    for key, minimum in minima.items():
        if (value := given.get(key)) is not None and value < minimum:
            raise ValueError(f"--{key.replace('_', '-')} {value} must be at least {minimum}")


def check_folder_of(flag: str, file: str) -> None:
    """Checks that the folder that a file is to be written to exists.

    :param flag: that names the file
    :param file: value of the flag
    :raises ValueError: if it does not exist
    """
    folder = Path(file).parent
    if not folder.is_dir():
        raise ValueError(f"{flag} {file}: folder {str(folder)!r} does not exist; make it first")


def print_error(error: BaseException) -> None:
    """``error: <message>`` on stderr, in one line, without secrets in URLs."""
    print(f"error: {redact_urls(' '.join(str(error).split()))}", file=sys.stderr, flush=True)


class Command(Protocol):
    """A command that is ready to run: what goes wrong from here on is not the user's mistake."""

    def run(self, interrupt: Interrupt) -> int:
        """Run it, and return the exit code."""
        ...

    def close(self) -> None:
        """Leave no processes and threads behind."""
        ...


def parse_and_run(
    argv: Sequence[str] | None,
    make_parser: Callable[[], Parser],
    check: Callable[[argparse.Namespace], None],
    build: Callable[[argparse.Namespace], Command],
) -> int:
    """The body of a command's ``main``: parse its words, check them, build the command, run it.

    :param argv: words of the command line; None: those of this process
    :param make_parser: makes the parser
    :param check: gets the parsed arguments, the words among them as ``argv``; raises ValueError
    :param build: gets the same, and imports what takes long; raises as the argument of :func:`run_command`
    :return: exit code
    """
    words = sys.argv[1:] if argv is None else list(argv)

    def set_up() -> Command:
        for module in ("torch", "stable_baselines3"):  # the environment of a teacher service may lack them
            if importlib.util.find_spec(module) is None:
                raise ValueError(f"students need {module}, which is not installed here: pip install rpd_sb3")
        args = make_parser().parse_args(words)
        args.argv = words
        check(args)
        return build(args)

    return run_command(set_up)


def run_command(set_up: Callable[[], Command]) -> int:
    """Set a command up, run it, close it; one sentence on stderr for what may go wrong, a traceback for what may not.

    :param set_up: raises ValueError, OSError or TeacherError for the user's mistakes
    :return: exit code: 2 if it could not be set up, 1 if it failed, 128 + n after signal n
    """
    with Interrupt() as interrupt:
        try:
            command = set_up()
        except KeyboardInterrupt:
            return interrupt.exit_code
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)) and not _is_teacher_error(error):
                raise
            print_error(error)
            return USER_ERROR
        try:
            return command.run(interrupt)
        except KeyboardInterrupt:
            return interrupt.exit_code
        except Exception as error:
            if not _is_teacher_error(error):
                raise
            print_error(error)
            return RUN_ERROR
        finally:
            command.close()


def _is_teacher_error(error: Exception) -> bool:
    from rpd_sb3.contract.teacher import TeacherError  # late: it brings NumPy and Gymnasium

    return isinstance(error, TeacherError)
