"""Everything that a training run consists of, built from a command line. Nothing is written before all of it stands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import (
    CSVOutputFormat,
    HumanOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
)
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.algos import find_algo
from rpd_sb3.algos.buffers import use_compact_buffer
from rpd_sb3.cli.config import find_config, load_section, merge, parse_pairs
from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs import make_vec_env
from rpd_sb3.envs.factory import with_token_bounds
from rpd_sb3.episodes.play import Evaluator
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.labelling.access import find_vec_teacher
from rpd_sb3.labelling.probe import probe
from rpd_sb3.students.device import check_device, set_threads
from rpd_sb3.students.warm_start import load_weights
from rpd_sb3.teachers.registry import open_teacher
from rpd_sb3.train import folder as runs
from rpd_sb3.train.hyperparams import RunConfig, build_hyperparams, check_section, policy_class


@dataclass
class Session:
    """One training run. Closing it closes environments and teachers."""

    args: dict[str, Any]
    config: RunConfig
    model: BaseAlgorithm
    evaluator: Evaluator
    teacher: Teacher | None
    evaluation_teacher: Teacher | None
    """Another one of the same kind, so that evaluations do not change the noise of the labels in training."""
    folder: Path
    resumed_at: int | None
    """Timesteps at which training goes on; None for a new run."""
    closing: ExitStack

    @property
    def env_id(self) -> str:
        return self.args["env"]

    @property
    def vec_teacher(self) -> VecTeacher | None:
        return find_vec_teacher(self.model.env)

    def close(self) -> None:
        self.closing.close()


def resolve_config(args: dict[str, Any]) -> RunConfig:
    """The section of the config file, changed by what the command line says.

    :param args: command line
    :raises ValueError: for anything that cannot be right
    """
    algo = find_algo(args["algo"])
    env_kwargs = parse_pairs(args["env_kwargs"], "--env-kwargs") | ({"obs": args["obs"]} if args["obs"] else {})
    path = Path(args["conf_file"]) if args["conf_file"] else find_config(args["algo"])
    asked = [str(env_kwargs[key]) for key in ("obs", "reward") if env_kwargs.get(key) not in (None, "state")]
    section = load_section(path, args["env"], asked=asked, section=args["section"])
    config = merge(section, parse_pairs(args["params"], "-params"))
    config = merge(config, {"env_kwargs": env_kwargs} if env_kwargs else {})
    if args["teacher"] and args["teacher"] != config.get("teacher"):
        config.pop("teacher_kwargs", None)  # they belong to the teacher of the section
    if teacher_kwargs := parse_pairs(args["teacher_kwargs"], "--teacher-kwargs"):
        config = merge(config, {"teacher_kwargs": teacher_kwargs})
    for key in ("n_timesteps", "n_envs", "teacher"):
        if args[key] is not None:
            config[key] = args[key]
    checked = check_section(config, algo)
    needs: frozenset[str] = getattr(algo, "needs", frozenset())
    if needs and checked.teacher is None:
        raise ValueError(
            f"{args['algo']} needs a teacher: name one with --teacher, e.g. --teacher scripted or --teacher sb3:FILE"
        )
    if not needs and checked.teacher is not None:
        raise ValueError(
            f"{args['algo']} learns without a teacher, but --teacher {checked.teacher} is given; use rpd_ppo or leave it out"
        )
    return checked


def build(args: dict[str, Any], config: RunConfig, resume: runs.SavedRun | None, argv: Sequence[str]) -> Session:
    """Build a run; the run folder comes last.

    :param args: command line
    :param config: of :func:`resolve_config`, or of the run to resume
    :param resume: run to go on with; None: a new one
    :param argv: words of the command line, to be written down
    :raises ValueError: for any mistake of the user's
    :raises TeacherError: if the teacher does not answer
    """
    algo = find_algo(args["algo"])
    device = check_device(args["device"])
    with ExitStack() as closing:
        teachers: list[Teacher | None] = [None, None]
        if config.teacher:
            teachers = [open_teacher(config.teacher, args["env"], config.teacher_kwargs, closing) for _ in range(2)]
        space = probe(args["env"], config.env_kwargs, teachers[0])
        config.env_kwargs = with_token_bounds(config.env_kwargs, None if teachers[0] is None else teachers[0].spec)
        config.policy = config.policy or default_policy(algo, space)
        set_threads(args["num_threads"], device, space)
        checkpoint = runs.latest_checkpoint(resume.folder) if resume else None
        if checkpoint and (done := runs.timesteps(checkpoint)) >= config.n_timesteps:
            raise ValueError(f"{checkpoint} has {done} timesteps already; ask for more than that with -n")
        venv = _training_env(args, config, teachers[0], closing)
        model = _model(args, config, algo, venv, checkpoint)
        use_compact_buffer(model)
        _ask_once(model, args["seed"] + model.num_timesteps)
        evaluator = Evaluator(
            args["env"],
            config.env_kwargs,
            n_episodes=args["eval_episodes"],
            n_envs=args["n_eval_envs"],
            vec_env=args["vec_env"],
            teacher=teachers[1],
        )
        closing.callback(evaluator.close)
        folder = resume.folder if resume else runs.create_run_folder(args["log_folder"], args["algo"], args["env"])
        resumed_at = model.num_timesteps if resume else None
        session = Session(args, config, model, evaluator, teachers[0], teachers[1], folder, resumed_at, ExitStack())
        _describe(session, argv)
        model.set_logger(_logger(session))
        session.closing = closing.pop_all()
    return session


def default_policy(algo: type[BaseAlgorithm], space: spaces.Space) -> str:
    """SB3's name of the policy for these observations."""
    kind = "MultiInput" if isinstance(space, spaces.Dict) else "Cnn" if is_image_space(space) else "Mlp"
    return next(name for name in algo.policy_aliases if name.startswith(kind))


def _training_env(args: dict[str, Any], config: RunConfig, teacher: Teacher | None, closing: ExitStack) -> VecEnv:
    spec = None if teacher is None else teacher.spec
    venv = make_vec_env(
        args["env"], config.n_envs, seed=args["seed"], vec_env=args["vec_env"], teacher=spec, **config.env_kwargs
    )
    closing.callback(venv.close)
    return venv if teacher is None else VecTeacher(venv, teacher, seed=args["seed"], **config.vec_teacher_kwargs)


def _model(
    args: dict[str, Any], config: RunConfig, algo: type[BaseAlgorithm], venv: VecEnv, checkpoint: Path | None
) -> BaseAlgorithm:
    if checkpoint is None:
        assert config.policy is not None
        try:
            model = algo(
                policy_class(config.policy, algo),
                venv,
                seed=args["seed"],
                device=args["device"],
                verbose=args["verbose"],
                **build_hyperparams(config, algo),
            )
        except (AssertionError, TypeError) as error:  # SB3 asserts what users may get wrong
            raise ValueError(f"{args['algo']} cannot be made with these hyper-parameters: {error}") from error
        if config.warm_start is not None:
            load_weights(model.policy, config.warm_start)
        return model
    model = runs.load_model(algo, checkpoint, env=venv, device=args["device"])
    replay = runs.label_replay_file(checkpoint)
    if runs.has_label_replay(model) and not replay.is_file():
        print(f"there is no {replay}: the label replay starts empty")
    elif runs.has_label_replay(model):
        model.label_replay_buffer.load(str(replay))  # type: ignore[attr-defined]
    # The generators are not in the checkpoint: go on with new episodes and new noise instead of the first ones again.
    model.set_random_seed(args["seed"] + model.num_timesteps)
    model.verbose = args["verbose"]
    return model


def _ask_once(model: BaseAlgorithm, seed: int) -> None:
    """Have the teacher answer once, so that one that cannot is found out now."""
    venv = find_vec_teacher(model.env)
    if venv is not None:
        venv.reset()
        venv.label()
        venv.n_labels = 0
        venv.seed(seed)


def _describe(session: Session, argv: Sequence[str]) -> None:
    """Write down what is run, so that it can be run again."""
    folder = session.folder
    runs.write_yaml(folder / "config.yml", session.config.as_dict())
    runs.write_yaml(folder / "args.yml", session.args)
    runs.write_yaml(folder / "versions.yml", runs.versions())
    runs.append_command(folder, argv)


def _logger(session: Session) -> Logger:
    folder, args = session.folder, session.args
    tensorboard = (
        Path(args["tensorboard_log"]) / args["algo"] / folder.name
        if args["tensorboard_log"]
        else folder / "tensorboard"
    )
    progress = folder / "progress.csv"
    resumed = session.resumed_at is not None and progress.is_file()
    formats: list[KVWriter] = [
        runs.CSVContinuation(str(progress), session.resumed_at or 0) if resumed else CSVOutputFormat(str(progress)),
        TensorBoardOutputFormat(str(tensorboard)),
    ]
    if args["verbose"] >= 1:
        formats.append(HumanOutputFormat(sys.stdout))
    return Logger(str(folder), formats)
