"""Watch a student, an export or a teacher, or film it: ``python -m rpd_sb3.enjoy --run logs/rpd_ppo/PickCube-v1_1 --record pick.mp4``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rpd_sb3.cli.common import (
    RUN_ERROR,
    Interrupt,
    Parser,
    add_policy_flags,
    check_at_least,
    check_folder_of,
    check_policy_flags,
    parse_and_run,
    print_error,
)


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(prog="python -m rpd_sb3.enjoy", description=__doc__)
    add = parser.add_argument
    add_policy_flags(parser, "watch", n_episodes=5)
    add("--record", metavar="FILE", help="film it, as .mp4 or .gif, instead of showing a window")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Play, and return the exit code: 2 for a mistake of the user's, 1 if playing failed, 130 after Ctrl-C."""
    return parse_and_run(argv, make_parser, check, EnjoyCommand)


def check(args: Any) -> None:
    """Check the command line, as far as it can be checked by itself.

    :raises ValueError: with what is wrong
    """
    check_at_least(vars(args), {"n_episodes": 1, "seed": 0})
    if args.record is not None:
        check_folder_of("--record", args.record)
    check_policy_flags(args)


class EnjoyCommand:
    """A policy and an environment that is shown or filmed, ready to run.

    :param args: of :func:`check`
    :raises ValueError: for any mistake of the user's
    :raises TeacherError: if a teacher service does not answer
    """

    def __init__(self, args: Any) -> None:
        from rpd_sb3.episodes.film import Film, RenderedEnv, Window
        from rpd_sb3.evaluate.policy_source import open_policy

        self.args = args
        with ExitStack() as closing:
            viewer = Window() if args.record is None else closing.enter_context(Film(Path(args.record)))
            self.policy = open_policy(args, closing)
            self.env = closing.enter_context(
                RenderedEnv(self.policy.env_id, self.policy.env_kwargs, viewer, self.policy.actor, self.policy.teacher)
            )
            self._closing = closing.pop_all()

    def run(self, interrupt: Interrupt) -> int:
        """Play the episodes and print how each one went."""
        from rpd_sb3.episodes.play import describe, summarize

        print(f"{self.policy.name} on {self.policy.env_id}", flush=True)
        episodes = []
        try:
            for i in range(self.args.n_episodes):
                episode = self.env.play(self.args.seed + i)
                episodes.append(episode)
                print(f"episode {i + 1}, seed {self.args.seed + i}: {describe_episode(episode)}", flush=True)
        except (ValueError, OSError) as error:
            print_error(error)
            return RUN_ERROR
        print(f"{len(episodes)} episodes: {describe(summarize(episodes))}")
        if self.args.record is not None:
            self._closing.close()  # the film ends here
            print(f"{self.args.record} {Path(self.args.record).stat().st_size / 1e6:.1f} MB")
        return 0

    def close(self) -> None:
        self._closing.close()


def describe_episode(episode: Any) -> str:
    """One episode in a line.

    :param episode: an :class:`rpd_sb3.episodes.play.Episode`
    """
    success = {None: "", True: "success, ", False: "no success, "}[episode.once]
    if episode.once and not episode.at_end:
        success = "success, lost again, "
    return f"{success}length {episode.length}, return {episode.episode_return:.2f}"


if __name__ == "__main__":
    sys.exit(main())
