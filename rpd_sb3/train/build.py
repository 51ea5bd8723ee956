"""What a training run consists of, built step by step: teacher, environments, model, evaluator, folder.

Nothing is written before all of it is built.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

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
from rpd_sb3.cli.files import write_yaml
from rpd_sb3.contract.device import check_device
from rpd_sb3.contract.teacher import Teacher
from rpd_sb3.envs import make_vec_env
from rpd_sb3.envs.factory import with_token_bounds, with_visuals
from rpd_sb3.episodes.play import Evaluator
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.labelling.access import find_vec_teacher
from rpd_sb3.labelling.probe import probe
from rpd_sb3.students.device import set_threads
from rpd_sb3.students.warm_start import load_weights
from rpd_sb3.teachers.registry import open_teacher
from rpd_sb3.train import folder as runs
from rpd_sb3.train.args import TrainArgs
from rpd_sb3.train.hyperparams import RunConfig, build_hyperparams, check_section, policy_class


@dataclass(frozen=True)
class TrainingSetup:
    """Everything that a training run needs."""

    args: TrainArgs
    config: RunConfig
    model: BaseAlgorithm
    evaluator: Evaluator
    teacher: Teacher | None
    evaluation_teacher: Teacher | None
    """The teacher that evaluations ask, see :func:`open_teachers`."""
    folder: Path
    resumed_at: int | None
    """Timesteps at which training goes on; None for a new run."""
    closing: ExitStack
    """Closes environments and teachers."""


def resolve_config(args: TrainArgs) -> RunConfig:
    """The section of the config file, changed by what the command line says.

    :param args: command line
    :raises ValueError: for anything that cannot be right
    """
    algo = find_algo(args.algo)
    env_kwargs = parse_pairs(args.env_kwargs, "--env-kwargs") | ({"obs": args.obs} if args.obs else {})
    path = Path(args.conf_file) if args.conf_file else find_config(args.algo)
    asked = [str(env_kwargs[key]) for key in ("obs", "reward") if env_kwargs.get(key) not in (None, "state")]
    section = load_section(path, args.env, asked=asked, section=args.section)
    config = merge(section, parse_pairs(args.params, "-params"))
    config = merge(config, {"env_kwargs": env_kwargs} if env_kwargs else {})
    if args.teacher and args.teacher != config.get("teacher"):
        config.pop("teacher_kwargs", None)  # they belong to the teacher of the section
    if teacher_kwargs := parse_pairs(args.teacher_kwargs, "--teacher-kwargs"):
        config = merge(config, {"teacher_kwargs": teacher_kwargs})
    given = {"n_timesteps": args.n_timesteps, "n_envs": args.n_envs, "teacher": args.teacher}
    config |= {key: value for key, value in given.items() if value is not None}
    checked = check_section(config, algo)
    needs: frozenset[str] = getattr(algo, "needs", frozenset())
    if needs and checked.teacher is None:
        raise ValueError(
            f"{args.algo} needs a teacher: name one with --teacher, e.g. --teacher scripted or --teacher sb3:FILE"
        )
    if not needs and checked.teacher is not None:
        raise ValueError(
            f"{args.algo} learns without a teacher, but --teacher {checked.teacher} is given; use rpd_ppo or leave it out"
        )
    return checked


def build(args: TrainArgs, config: RunConfig, resume: runs.SavedRun | None, argv: Sequence[str]) -> TrainingSetup:
    """Build a run; the run folder comes last.

    :param args: command line
    :param config: of :func:`resolve_config`, or of the run to resume
    :param resume: run to go on with; None: a new one
    :param argv: words of the command line, to be written down
    :raises ValueError: for any mistake of the user's
    :raises TeacherError: if the teacher does not answer
    """
    algo = find_algo(args.algo)
    device = check_device(args.device)
    with ExitStack() as closing:
        teacher, evaluation_teacher = open_teachers(args.env, config, closing)
        space = probe(args.env, config.env_kwargs, teacher)
        config = complete_config(args.env, config, algo, space, teacher)
        set_threads(args.num_threads, device, space)
        checkpoint = None if resume is None else runs.find_checkpoint(resume.folder, config.n_timesteps)
        venv = make_training_env(args, config, teacher, closing)
        if checkpoint is None:
            model = make_model(args, config, algo, venv)
        else:
            model = load_checkpoint(args, algo, venv, checkpoint)
        use_compact_buffer(model)
        try_teacher(model, args.seed + model.num_timesteps)
        evaluator = make_evaluator(args, config, evaluation_teacher, closing)
        folder = runs.create_run_folder(args.log_folder, args.algo, args.env) if resume is None else resume.folder
        write_description(folder, args, config, argv)
        resumed_at = None if resume is None else model.num_timesteps
        model.set_logger(make_logger(args, folder, resumed_at))
        return TrainingSetup(
            args, config, model, evaluator, teacher, evaluation_teacher, folder, resumed_at, closing.pop_all()
        )


def open_teachers(env_id: str, config: RunConfig, closing: ExitStack) -> tuple[Teacher | None, Teacher | None]:
    """The teacher that labels in training, and the one that evaluations ask; None without a teacher.

    They are the same unless evaluations would change what it answers in training: its random draws, or its memory, which
    knows environments by their number. The draws of a service are shared by all of its clients, so that a second
    client would change nothing.
    """
    if config.teacher is None:
        return None, None
    teacher = open_teacher(config.teacher, env_id, config.teacher_kwargs, closing)
    draws = teacher.spec.stochastic and not config.teacher.startswith(("http:", "https:"))
    if not draws and not teacher.spec.stateful:
        return teacher, teacher
    return teacher, open_teacher(config.teacher, env_id, config.teacher_kwargs, closing)


def complete_config(
    env_id: str, config: RunConfig, algo: type[BaseAlgorithm], space: spaces.Space, teacher: Teacher | None
) -> RunConfig:
    """The config with the choices that follow from environment, teacher and machine: policy, bounds of tokens, visuals."""
    spec = None if teacher is None else teacher.spec
    env_kwargs = with_visuals(env_id, with_token_bounds(config.env_kwargs, spec), spec)
    return replace(config, env_kwargs=env_kwargs, policy=config.policy or default_policy(algo, space))


def default_policy(algo: type[BaseAlgorithm], space: spaces.Space) -> str:
    """SB3's name of the policy for these observations."""
    kind = "MultiInput" if isinstance(space, spaces.Dict) else "Cnn" if is_image_space(space) else "Mlp"
    return next(name for name in algo.policy_aliases if name.startswith(kind))


def make_training_env(args: TrainArgs, config: RunConfig, teacher: Teacher | None, closing: ExitStack) -> VecEnv:
    """The environments, with the teacher if there is one."""
    spec = None if teacher is None else teacher.spec
    venv = make_vec_env(
        args.env, config.n_envs, seed=args.seed, vec_env=args.vec_env, teacher=spec, **config.env_kwargs
    )
    closing.callback(venv.close)
    return venv if teacher is None else VecTeacher(venv, teacher, seed=args.seed, **config.vec_teacher_kwargs)


def make_model(args: TrainArgs, config: RunConfig, algo: type[BaseAlgorithm], venv: VecEnv) -> BaseAlgorithm:
    """A new model, its weights those of ``warm_start`` if the config names a file.

    :raises ValueError: for hyper-parameters that do not fit
    """
    assert config.policy is not None
    try:
        model = algo(
            policy_class(config.policy, algo),
            venv,
            seed=args.seed,
            device=args.device,
            verbose=args.verbose,
            **build_hyperparams(config, algo),
        )
    except (AssertionError, TypeError) as error:  # SB3 asserts what users may get wrong
        raise ValueError(f"{args.algo} cannot be made with these hyper-parameters: {error}") from error
    if config.warm_start is not None:
        load_weights(model.policy, config.warm_start)
    return model


def load_checkpoint(args: TrainArgs, algo: type[BaseAlgorithm], venv: VecEnv, checkpoint: Path) -> BaseAlgorithm:
    """The model of a checkpoint with its label replay, ready to go on."""
    model = runs.load_model(algo, checkpoint, env=venv, device=args.device)
    replay = runs.label_replay_file(checkpoint)
    if runs.has_label_replay(model) and not replay.is_file():
        print(f"there is no {replay}: the label replay starts empty")
    elif runs.has_label_replay(model):
        model.label_replay_buffer.load(str(replay))  # type: ignore[attr-defined]
    # The generators are not in the checkpoint: go on with new episodes and new noise instead of the first ones again.
    model.set_random_seed(args.seed + model.num_timesteps)
    model.verbose = args.verbose
    return model


def try_teacher(model: BaseAlgorithm, seed: int) -> None:
    """Have the teacher answer once, so that one that cannot is found out now; then seed the environments again."""
    venv = find_vec_teacher(model.env)
    if venv is not None:
        venv.reset()
        venv.label()
        venv.n_labels = 0
        venv.seed(seed)


def make_evaluator(args: TrainArgs, config: RunConfig, teacher: Teacher | None, closing: ExitStack) -> Evaluator:
    """The evaluator of student and teacher; it makes its environments when it needs them."""
    evaluator = Evaluator(
        args.env,
        config.env_kwargs,
        n_episodes=args.eval_episodes,
        n_envs=args.n_eval_envs,
        vec_env=args.vec_env,
        teacher=teacher,
    )
    closing.callback(evaluator.close)
    return evaluator


def write_description(folder: Path, args: TrainArgs, config: RunConfig, argv: Sequence[str]) -> None:
    """Write down what is run, so that it can be run again."""
    write_yaml(folder / "config.yml", config.as_dict())
    write_yaml(folder / "args.yml", asdict(args))
    write_yaml(folder / "versions.yml", runs.versions())
    runs.append_command(folder, argv)


def make_logger(args: TrainArgs, folder: Path, resumed_at: int | None) -> Logger:
    """SB3's logger to ``progress.csv``, TensorBoard, and the screen if it is to be verbose.

    :param args: command line
    :param folder: of the run
    :param resumed_at: timesteps at which training goes on; None for a new run
    """
    elsewhere = args.tensorboard_log
    tensorboard = Path(elsewhere) / args.algo / folder.name if elsewhere else folder / "tensorboard"
    progress = folder / "progress.csv"
    resumed = resumed_at is not None and progress.is_file()
    formats: list[KVWriter] = [
        runs.CSVContinuation(str(progress), resumed_at or 0) if resumed else CSVOutputFormat(str(progress)),
        TensorBoardOutputFormat(str(tensorboard)),
    ]
    if args.verbose >= 1:
        formats.append(HumanOutputFormat(sys.stdout))
    return Logger(str(folder), formats)
