"""The folder of a run, as rl-baselines3-zoo lays it out: ``logs/<algo>/<env>_<n>/``."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import CSVOutputFormat
from stable_baselines3.common.vec_env import VecEnv

import rpd_sb3
from rpd_sb3.algos import ALGOS
from rpd_sb3.cli.config import load_yaml, merge, parse_pairs
from rpd_sb3.contract.secrets import masked, redact, redact_command
from rpd_sb3.envs.factory import with_visuals
from rpd_sb3.teachers.sb3_policy import read_model_data
from rpd_sb3.wire.urls import OPENPI_API_KEY, TOKEN

PACKAGES = ("torch", "stable-baselines3", "sb3-contrib", "gymnasium", "numpy", "mani_skill", "fast_simplification")
SECRET_VARIABLES = {
    "http": ("token", TOKEN),
    "https": ("token", TOKEN),
    "openpi": ("api_key", OPENPI_API_KEY),
}
"""Kind of teacher to the option that is its secret, and the environment variable that may give it."""


class SavedRun(NamedTuple):
    """What a run folder says about the run, without secrets."""

    folder: Path
    args: dict[str, Any]
    """Content of ``args.yml``."""
    config: dict[str, Any]
    """Flat section of hyper-parameters."""

    @property
    def algo(self) -> type[BaseAlgorithm]:
        return ALGOS[self.args["algo"]]

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """Options of the environment; runs of before there were light visuals are of full ones."""
        return with_visuals(self.args["env"], self.config.get("env_kwargs", {}), None, default="full")

    @property
    def last_model(self) -> Path:
        return self.folder / f"{file_name(self.args['env'])}.zip"

    @property
    def best_model(self) -> Path:
        return self.folder / "best_model.zip"

    def model_file(self, which: str) -> Path:
        """The file of a model that is there.

        :param which: ``best`` or ``last``
        :raises ValueError: if there is none yet
        """
        path = self.best_model if which == "best" else self.last_model
        if not path.is_file():
            other = "last" if which == "best" else "best"
            raise ValueError(
                f"run {str(self.folder)!r} has no {path.name} yet; use --model {other}, or train it to the end"
            )
        return path

    @property
    def commands(self) -> list[str]:
        """The command lines that have trained it; none if it does not say."""
        path = self.folder / "command.txt"
        text = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
        return [redact_command(command) for command in re.split(r"\n(?=python -m )", text) if command]

    @property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json``; empty while the run goes on, or if it was killed.

        :raises ValueError: if the file is damaged
        """
        path = self.folder / "result.json"
        if not path.is_file():
            return {}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it to use the run without it") from error
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds {type(content).__name__}, expected a mapping; remove it")
        return content

    @property
    def versions(self) -> dict[str, Any]:
        """The content of ``versions.yml``; empty if there is none."""
        path = self.folder / "versions.yml"
        return load_yaml(path) if path.is_file() else {}


def file_name(env_id: str) -> str:
    """The id as part of a file name: ``ALE/Pong-v5`` becomes ``ALE-Pong-v5``."""
    return re.sub(r"[/:]", "-", env_id)


def create_run_folder(log_folder: str | Path, algo: str, env_id: str) -> Path:
    """A new folder ``<log_folder>/<algo>/<env_id>_<n>``; n is one more than the highest there is, also if two start at once."""
    parent, name = Path(log_folder) / algo, file_name(env_id)
    while True:
        found = [re.fullmatch(re.escape(name) + r"_(\d+)", path.name) for path in parent.glob("*")]
        n = 1 + max([int(match[1]) for match in found if match], default=0)
        try:
            os.makedirs(parent / f"{name}_{n}", exist_ok=False)
        except FileExistsError:
            if not parent.is_dir():  # a file stands where a folder should be
                raise
            continue
        return parent / f"{name}_{n}"


def load_run(folder: str | Path) -> SavedRun:
    """Read a run folder.

    :raises ValueError: if it is not one
    """
    folder = Path(folder)
    if not (folder / "args.yml").is_file() or not (folder / "config.yml").is_file():
        what = "has no args.yml and config.yml" if folder.is_dir() else "does not exist"
        raise ValueError(f"run folder {str(folder)!r} {what}; expected e.g. logs/rpd_ppo/PickCube-v1_1")
    run = SavedRun(folder, redact(load_yaml(folder / "args.yml")), redact(load_yaml(folder / "config.yml")))
    for key in ("algo", "env"):
        if not isinstance(run.args.get(key), str):
            raise ValueError(f"run folder {str(folder)!r}: args.yml does not name the {key}")
    if run.args["algo"] not in ALGOS:
        raise ValueError(
            f"run folder {str(folder)!r}: algo {run.args['algo']!r} is unknown; known are {', '.join(ALGOS)}"
        )
    return run


def with_secrets(run: SavedRun, given: dict[str, Any]) -> SavedRun:
    """The run with its secrets, which its folder does not hold: from the command line, or an environment variable.

    :param run: to resume
    :param given: command line; flags that say the same as the run, but for its secrets, are taken out
    :raises ValueError: naming the secrets that are missing
    """
    changes = parse_pairs(given.get("params", ()), "-params")
    for key, flag in (("env_kwargs", "--env-kwargs"), ("teacher_kwargs", "--teacher-kwargs")):
        if key in given:
            changes = merge(changes, {key: parse_pairs(given[key], flag)})
    if "teacher" in given:
        changes["teacher"] = given["teacher"]
    config = merge(run.config, changes)
    if redact(config) != run.config:
        return run  # something else is given as well
    for key in ("params", "env_kwargs", "teacher_kwargs", "teacher"):
        given.pop(key, None)
    option, variable = SECRET_VARIABLES.get(str(config.get("teacher")).partition(":")[0], ("", ""))
    missing = masked(config)
    if f"teacher_kwargs.{option}" in missing and os.environ.get(variable):
        config = merge(config, {"teacher_kwargs": {option: os.environ[variable]}})
        missing.remove(f"teacher_kwargs.{option}")
    if missing:
        key, _, name = missing[0].partition(".")
        flags = {
            "teacher": "--teacher ...",
            "teacher_kwargs": f"--teacher-kwargs {name}:...",
            "env_kwargs": f"--env-kwargs {name}:...",
        }
        flag = flags.get(key, f"-params {missing[0]}:...")
        raise ValueError(
            f"run {str(run.folder)!r} needs {', '.join(missing)} again, as its folder holds no secrets: give it with {flag}"
            + (f", or set {variable}" if missing[0] == f"teacher_kwargs.{option}" else "")
        )
    return run._replace(config=config)


class Evaluations(NamedTuple):
    """``evaluations.npz``: E evaluations of K episodes each. Success is None where the environment does not report it."""

    timesteps: np.ndarray
    """(E,) environment steps, ascending."""
    returns: np.ndarray
    """(E, K)"""
    lengths: np.ndarray
    """(E, K)"""
    once: np.ndarray | None
    """(E, K) bool, successful at some step."""
    at_end: np.ndarray | None
    """(E, K) bool, successful at the last step."""


def read_evaluations(folder: Path) -> Evaluations | None:
    """The evaluations of a run; None if there is none yet.

    :param folder: of the run
    :raises ValueError: if the file is damaged
    """
    path = folder / "evaluations.npz"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        found = Evaluations(
            arrays["timesteps"],
            arrays["results"].astype(np.float64),
            arrays["ep_lengths"],
            arrays["successes"].astype(bool) if "successes" in arrays else None,
            arrays["successes_at_end"].astype(bool) if "successes_at_end" in arrays else None,
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    n = len(found.timesteps) if found.timesteps.ndim == 1 else 0
    if n == 0 or any(rows is not None and (rows.ndim != 2 or len(rows) != n) for rows in found[1:]):
        raise ValueError(f"{path} is damaged: its arrays are empty or do not belong together")
    return found


def save_model(model: BaseAlgorithm, path: Path, *, label_replay: bool = True) -> None:
    """Save a model, and its label replay next to it; a file of that name is replaced only by a complete one.

    :param model: what to save
    :param path: ``.zip`` file
    :param label_replay: False for a model that is only to be used, not trained on: the replay can be large
    """
    temporary = path.with_name(f".{path.name}.tmp")
    model.save(temporary)
    os.replace(temporary, path)
    if label_replay and has_label_replay(model):
        temporary = path.with_name(f".{path.name}.tmp.npz")
        model.label_replay_buffer.save(str(temporary))  # type: ignore[attr-defined]
        os.replace(temporary, label_replay_file(path))


def has_label_replay(model: BaseAlgorithm) -> bool:
    """True if the model replays past labels."""
    size: int = getattr(model, "label_replay", 0)
    return size > 0


def label_replay_file(model_file: Path) -> Path:
    """Where the label replay of a model lies."""
    return model_file.with_name(f"{model_file.stem}_label_replay.npz")


def find_checkpoint(folder: Path, n_timesteps: int) -> Path:
    """The model with the most timesteps, to go on with.

    :param folder: of the run
    :param n_timesteps: to train for
    :raises ValueError: if there is none, one is damaged, or it has seen that many timesteps
    """
    # At a tie, best_model comes first and loses: it may have no label replay.
    files = sorted(folder.glob("*.zip"), key=lambda path: path.name != "best_model.zip")
    steps = {path: timesteps(path) for path in files}
    if not steps:
        raise ValueError(f"run folder {str(folder)!r} holds no model to resume from")
    latest = max(reversed(files), key=lambda path: steps[path])
    if steps[latest] >= n_timesteps:
        raise ValueError(f"{latest} has {steps[latest]} timesteps already; ask for more than that with -n")
    return latest


def timesteps(model_file: Path) -> int:
    """Environment steps that a saved model has seen.

    :raises ValueError: if the file is damaged
    """
    return int(read_model_data(str(model_file)).get("num_timesteps", 0))


def load_model(
    algo: type[BaseAlgorithm], path: Path, *, env: VecEnv | None = None, device: str = "auto"
) -> BaseAlgorithm:
    """A saved model.

    :param algo: that it was trained with
    :param path: ``.zip`` file
    :param env: to go on with; None: it only acts
    :param device: where its network runs
    :raises ValueError: if there is no such file, it is damaged, or does not fit the environment
    """
    read_model_data(str(path))
    return algo.load(path, env=env, device=device)


def append_command(folder: Path, argv: Sequence[str]) -> None:
    """Add a command line of ``rpd_sb3.train``, without secrets, to ``command.txt``.

    :param folder: of the run
    :param argv: words after the name of the module
    """
    with open(folder / "command.txt", "a", encoding="utf-8") as file:
        file.write(shlex.join(redact(["python", "-m", "rpd_sb3.train", *argv])) + "\n")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of what the result depends on.

    :param packages: those of them that are looked for
    """
    found = {"rpd_sb3": rpd_sb3.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if commit := _git_commit():
        found["git_commit"] = commit
    return found


def _git_commit() -> str | None:
    """The commit of the library's sources, if they lie in a git repository of their own; ``+`` for local changes."""
    root = Path(rpd_sb3.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


class CSVContinuation(CSVOutputFormat):
    """Appends to a file that :class:`CSVOutputFormat` has written.

    :param filename: the file
    :param until: timesteps at which training goes on; rows of later ones, from after the checkpoint, are dropped
    """

    def __init__(self, filename: str, until: int) -> None:
        self.file = open(filename, "r+", newline="")  # noqa: SIM115  (closed with the logger)
        lines = self.file.read().splitlines()
        self.keys = lines[0].split(",") if lines else []
        self.separator = ","
        self.quotechar = '"'
        rows = csv.DictReader(lines)
        kept = [line for line, row in zip(lines[1:], rows) if float(row.get("time/total_timesteps") or 0) <= until]
        self.file.seek(0)
        self.file.truncate()
        self.file.writelines(f"{line}\n" for line in lines[:1] + kept)
