"""The command line of a training run, as its folder keeps it. Importing this loads no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from rpd_sb3.cli.common import check_at_least
from rpd_sb3.cli.config import typed

ALGORITHMS = ("grpo", "opd", "ppd", "ppo", "recurrent_ppo", "road", "rpd_ppo", "sft", "trpo")
"""The keys of :data:`rpd_sb3.algos.ALGOS`, whose import takes seconds."""
AT_LEAST = {"eval_episodes": 1, "n_eval_envs": 1, "num_threads": 1, "seed": 0, "verbose": 0}
MAY_CHANGE = frozenset(
    {
        "n_timesteps",
        "vec_env",
        "device",
        "num_threads",
        "eval_freq",
        "n_eval_envs",
        "save_freq",
        "progress",
        "verbose",
        "video",
    }
)
"""Flags that may be given together with --resume; the others are those of the run."""


@dataclass(frozen=True)
class TrainArgs:
    """The flags of ``python -m rpd_sb3.train``. None: the config decides, or the machine.

    :raises ValueError: for a number that is too small
    """

    algo: str
    env: str
    teacher: str | None = None
    teacher_kwargs: list[str] = field(default_factory=list)
    """Words ``key:value``, as are ``params`` and ``env_kwargs``."""
    seed: int = 0
    n_timesteps: int | None = None
    params: list[str] = field(default_factory=list)
    obs: str | None = None
    env_kwargs: list[str] = field(default_factory=list)
    conf_file: str | None = None
    section: str | None = None
    n_envs: int | None = None
    vec_env: str = "subproc"
    device: str = "auto"
    num_threads: int | None = None
    eval_freq: int = 10_000
    eval_episodes: int = 50
    n_eval_envs: int = 8
    save_freq: int = 0
    log_folder: str = "logs"
    tensorboard_log: str | None = None
    progress: bool | None = None
    verbose: int = 0
    video: bool = True

    def __post_init__(self) -> None:
        check_at_least(vars(self), AT_LEAST)

    @classmethod
    def restore(cls, saved: Mapping[str, Any], path: Path) -> TrainArgs:
        """The arguments of a run, of this or another version: unknown ones are left out, missing ones have their defaults.

        :param saved: content of ``args.yml``
        :param path: of that file, for messages
        :raises ValueError: for a value of the wrong type
        """
        hints = get_type_hints(cls)
        return cls(**{key: typed(f"{path}: {key}", value, hints[key]) for key, value in saved.items() if key in hints})
