"""Record a teacher's episodes: ``python -m rpd_sb3.collect --env PickCube-v1 --teacher scripted -n 100 --out demos.npz``."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rpd_sb3.cli.common import (
    RUN_ERROR,
    Interrupt,
    Parser,
    add_vec_env_flag,
    check_at_least,
    check_folder_of,
    parse_and_run,
    print_error,
    whole_number,
)
from rpd_sb3.contract.names import TEACHER_HELP


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog="python -m rpd_sb3.collect", description=__doc__)
    add = parser.add_argument
    add("--env", metavar="ID", help="ManiSkill or Gymnasium id")
    add("--env-kwargs", nargs="+", default=[], metavar="K:V", help="options of the environment, e.g. obs:rgb")
    add("--teacher", help=TEACHER_HELP)
    add("--teacher-kwargs", nargs="+", default=[], metavar="K:V", help="options of the teacher, e.g. noise:0.3 seed:1")
    add("-n", "--n-episodes", type=whole_number, default=100, metavar="N", help="episodes to keep [100]")
    add("--only-successful", action="store_true", help="keep only episodes that were successful at some step")
    add("--noise", type=float, default=0.0, metavar="STD", help="on the actions executed, not on those recorded [0]")
    add("--out", metavar="FILE", help="file to write: .npz, or .hdf5 or .h5 in robomimic's layout")
    add("--lerobot", metavar="DIR", help="also, or only, write a LeRobot dataset to a new folder")
    add("--fps", type=whole_number, metavar="N", help="steps per second, for LeRobot [those of the environment]")
    add("--overwrite", action="store_true", help="replace the file")
    add("--seed", type=whole_number, default=0, help="of the first episode; the next one has the next seed [0]")
    add("--n-envs", type=whole_number, default=8, metavar="N", help="[8]")
    add_vec_env_flag(parser, default="subproc")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Record, and return the exit code: 2 for a mistake of the user's, 1 if recording failed, 130 after Ctrl-C."""
    return parse_and_run(argv, make_parser, check, CollectCommand)


def check(args: Any) -> None:
    """Check the command line, as far as it can be checked without an environment.

    :raises ValueError: with what is wrong
    """
    if args.env is None or args.teacher is None:
        raise ValueError("--env or --teacher is missing: name both, e.g. --env PickCube-v1 --teacher scripted")
    if args.out is None and args.lerobot is None:
        raise ValueError("--out is missing: name the file to write, e.g. --out demos.npz")
    check_at_least(vars(args), {"n_episodes": 1, "n_envs": 1, "seed": 0, "fps": 1})
    if not 0.0 <= args.noise < math.inf:
        raise ValueError(f"--noise {args.noise} must be a std, at least 0")
    from rpd_sb3.demos.files import check_lerobot, check_suffix

    if args.out is not None:
        path = Path(args.out)
        check_suffix(path)
        if path.is_dir() or (path.exists() and not args.overwrite):
            raise ValueError(f"--out {args.out} exists already; name another file or add --overwrite")
        check_folder_of("--out", args.out)
    if args.lerobot is not None:
        check_lerobot(Path(args.lerobot))


class CollectCommand:
    """One recording, built and ready to run.

    :param args: of :func:`check`
    :raises ValueError: for any mistake of the user's
    :raises TeacherError: if a teacher service does not answer
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.cli.config import parse_pairs
        from rpd_sb3.envs import make_vec_env
        from rpd_sb3.envs.factory import check_env_id, with_visuals
        from rpd_sb3.labelling import VecTeacher
        from rpd_sb3.labelling.probe import probe
        from rpd_sb3.teachers.registry import open_teacher

        self.args = args
        env_kwargs = parse_pairs(args.env_kwargs, "--env-kwargs")
        teacher_kwargs = parse_pairs(args.teacher_kwargs, "--teacher-kwargs")
        check_env_id(args.env)
        with ExitStack() as closing:
            teacher = open_teacher(args.teacher, args.env, teacher_kwargs, closing)
            env_kwargs = with_visuals(args.env, env_kwargs, teacher.spec)
            probe(args.env, env_kwargs, teacher)
            n_envs = min(args.n_envs, args.n_episodes)
            venv = make_vec_env(args.env, n_envs, vec_env=args.vec_env, teacher=teacher.spec, **env_kwargs)
            closing.callback(venv.close)
            self.venv = VecTeacher(venv, teacher, label_fraction=0.0)
            self.metadata = {"env_id": args.env, "env_kwargs": env_kwargs} | _environment_facts(self.venv)
            self.metadata |= {"teacher": args.teacher, "teacher_kwargs": teacher_kwargs}
            self.fps: float | None = args.fps or self.metadata.get("fps")
            if args.lerobot and self.fps is None:
                raise ValueError(f"env {args.env!r} does not say how many steps it takes in a second; give --fps")
            self._closing = closing.pop_all()

    def run(self, interrupt: Interrupt) -> int:
        """Record the episodes, write them and print a summary."""
        from rpd_sb3.demos.files import export_lerobot, save
        from rpd_sb3.demos.record import record

        args = self.args
        start = time.monotonic()
        written: list[str] = []
        try:
            demos = record(
                self.venv,
                args.n_episodes,
                only_successful=args.only_successful,
                noise=args.noise,
                seed=args.seed,
                metadata=self.metadata,
            )
            with interrupt.deferred():
                if args.out:
                    save(args.out, demos)
                    written.append(f"{args.out} {Path(args.out).stat().st_size / 1e6:.1f} MB")
                if args.lerobot:
                    task = demos.metadata.get("instruction", args.env)
                    export_lerobot(Path(args.lerobot), demos, fps=round(self.fps or 0), task=task)
                    size = sum(path.stat().st_size for path in Path(args.lerobot).rglob("*") if path.is_file())
                    written.append(f"{args.lerobot} {size / 1e6:.1f} MB")
        except (ValueError, OSError) as error:
            print_error(error)
            return RUN_ERROR
        rate = demos.metadata["success_rate"]
        played = demos.metadata["n_played"]
        success = "success not reported" if rate is None else f"success {rate:.0%} of {played} played"
        seconds = time.monotonic() - start
        sizes = f"{demos.n_episodes} episodes, {len(demos.actions):,} transitions"
        print(f"{sizes}, {success}, {seconds:.1f} s, {', '.join(written)}")
        return 0

    def close(self) -> None:
        self._closing.close()


def _environment_facts(venv: Any) -> dict[str, Any]:
    """Control mode, instruction and steps per second (``fps``), those of them that the environments tell."""
    facts = {}
    for name, attribute in (("control_mode", "control_mode"), ("instruction", "instruction"), ("fps", "control_freq")):
        if venv.has_attr(attribute):
            facts[name] = venv.get_attr(attribute, 0)[0]
    if "fps" not in facts and venv.has_attr("metadata"):
        facts["fps"] = (venv.get_attr("metadata", 0)[0] or {}).get("render_fps")
    return {name: value for name, value in facts.items() if isinstance(value, (str, int, float)) and value != ""}


if __name__ == "__main__":
    sys.exit(main())
