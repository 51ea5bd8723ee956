"""What the commands share: one sentence for a user's mistake, and a clean end on Ctrl-C."""

from __future__ import annotations

import argparse
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Protocol

from rpd_sb3.contract.names import closest
from rpd_sb3.contract.secrets import redact_urls

USER_ERROR, RUN_ERROR = 2, 1
"""Exit codes: nothing was started; something failed on the way. 128 + n after signal n."""


class Parser(argparse.ArgumentParser):
    """Raises ValueError instead of printing the usage; suggests the closest flag."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

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
    add("--teacher", help=f"{verb} a teacher: scripted, sb3:FILE, http://HOST:PORT[,...] or MODULE:CLASS")
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
    """Make sure that numbers are not too small; those that are not given are no mistake.

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


def check_training_side() -> None:
    """Make sure that students can be trained here; the environment of a teacher's service need not be able to.

    :raises ValueError: naming what is missing
    """
    for module in ("torch", "stable_baselines3"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"students need {module}, which is not installed here: pip install rpd_sb3")


def print_error(error: BaseException) -> None:
    """``error: <message>`` on stderr, in one line, without secrets in URLs."""
    print(f"error: {redact_urls(' '.join(str(error).split()))}", file=sys.stderr, flush=True)


class Job(Protocol):
    """A command that has been set up: from here on, what goes wrong is not the user's mistake."""

    def run(self, interrupt: Interrupt) -> int:
        """Do it, and return the exit code."""
        ...

    def close(self) -> None:
        """Leave no processes and threads behind."""
        ...


def run_command(set_up: Callable[[], Job]) -> int:
    """Set a job up, run it, close it; one sentence on stderr for what may go wrong, a traceback for what may not.

    :param set_up: raises ValueError, OSError or TeacherError for the user's mistakes
    :return: exit code
    """
    with Interrupt() as interrupt:
        try:
            job = set_up()
        except KeyboardInterrupt:
            return interrupt.exit_code
        except Exception as error:
            if not isinstance(error, (ValueError, OSError)) and not _is_teacher_error(error):
                raise
            print_error(error)
            return USER_ERROR
        try:
            return job.run(interrupt)
        except KeyboardInterrupt:
            return interrupt.exit_code
        except Exception as error:
            if not _is_teacher_error(error):
                raise
            print_error(error)
            return RUN_ERROR
        finally:
            job.close()


def _is_teacher_error(error: Exception) -> bool:
    from rpd_sb3.contract.teacher import TeacherError  # late: it brings PyTorch

    return isinstance(error, TeacherError)


class Interrupt:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt; the second signal kills as usual.

    Inside :meth:`deferred`, and between the start and the end of each optimiser step of :meth:`watch`, it waits for the end: neither files nor
    networks are left half written.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came."""
        self._depth = 0
        self._due = False
        self._old: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread gets signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for other in self._old:
            signal.signal(other, signal.SIG_DFL)
        print("stopping; once more to kill", file=sys.stderr, flush=True)
        self._due = True
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._due and self._depth == 0:
            self._due = False
            raise KeyboardInterrupt

    def _begin(self, *_: Any) -> None:
        self._depth += 1

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        self._raise_if_due()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A KeyboardInterrupt that is due inside is raised at the end."""
        self._begin()
        try:
            yield
        finally:
            self._depth -= 1
        self._raise_if_due()

    def watch(self, optimizer: Any) -> None:
        """Do not interrupt this PyTorch optimiser in the middle of a step."""
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)
