"""Environments by their id, one or many: ManiSkill's tasks and any other id that Gymnasium knows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.contract.bins import N_BINS, Bounds
from rpd_sb3.contract.conventions import convert_token_bounds
from rpd_sb3.contract.names import check_choice, closest
from rpd_sb3.contract.teacher import TeacherSpec, sees_images
from rpd_sb3.envs.action_tokens import ActionTokens
from rpd_sb3.envs.groups import EpisodeSeeds
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.envs.worker_pool import WorkerPoolVecEnv

VEC_ENVS = ("subproc", "dummy")
Tokens = bool | int | Mapping[str, Any]
MANISKILL_ROTATION = "axis_angle"
"""How the actions of a ManiSkill controller turn the hand; no other way is converted."""


def make_env(
    env_id: str,
    *,
    obs: str | None = None,
    reward: str | None = None,
    camera: str | None = None,
    image_size: int | None = None,
    on_success: str | None = None,
    control_mode: str | None = None,
    visuals: str | None = None,
    crop: Sequence[float] | None = None,
    tokens: Tokens = False,
    teacher: TeacherSpec | None = None,
    render_mode: str | None = None,
    **env_kwargs: Any,
) -> gym.Env:
    """One environment with the plain Gymnasium API.

    The options down to ``control_mode`` are ManiSkill's; None takes the default in brackets.

    :param env_id: a ManiSkill id or any id that Gymnasium knows
    :param obs: the student's view: ``state``, ``rgb`` or ``rgb+state`` [state]
    :param reward: ``sparse`` or ``dense`` [sparse]
    :param camera: ``human``, the paper's side view, or ``base``, ManiSkill's own [human]
    :param image_size: side of the square image in pixels [256, or the teacher's if that is smaller]
    :param on_success: ``terminate``, ``truncate`` or ``continue`` the episode [terminate]
    :param control_mode: ManiSkill controller [pd_ee_delta_pose]
    :param visuals: ``full``, as ManiSkill draws its scenes, or ``light``, with few triangles, which a CPU renders ten times
        faster; physics and states are the same [light where a CPU renders frames that no teacher looks at, else full]
    :param crop: left, top and side of the square of the camera's image that the student sees, as shares of the image; it has
        ``image_size`` pixels [all of it]
    :param tokens: act with tokens (:class:`~rpd_sb3.envs.ActionTokens`); a number says how many bins, True: 256. Their
        bounds are the teacher's; a mapping ``{low: [...], high: [...]}`` gives others, e.g. to go on without the teacher
    :param teacher: spec of the teacher; observations get its inputs under ``teacher/``
    :param render_mode: Gymnasium's
    :param env_kwargs: further arguments of the environment itself
    :raises ValueError: for an unknown id, or an option that the environment does not have
    """
    options = {
        "obs": obs,
        "reward": reward,
        "camera": camera,
        "image_size": image_size,
        "on_success": on_success,
        "control_mode": control_mode,
        "visuals": visuals,
        "crop": crop,
    }
    if not is_maniskill(env_id):
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise ValueError(f"env {env_id!r} is not a ManiSkill task: it has no option {', '.join(given)}")
        check_env_id(env_id)
        check_spec(teacher, env_id, None)
        return _add_tokens(tokens, teacher, gym.make(env_id, render_mode=render_mode, **env_kwargs))
    from rpd_sb3.envs import maniskill

    control_mode = control_mode or "pd_ee_delta_pose"
    check_spec(teacher, env_id, control_mode)
    camera = camera or "human"
    teacher_size = None
    if teacher is not None and camera in teacher.image_sizes:
        teacher_size, width = teacher.image_sizes[camera]
        if width != teacher_size:
            raise ValueError(
                f"teacher {teacher.name!r} asks for images of {(teacher_size, width)}; only square ones are rendered"
            )
    view = maniskill.View(
        obs=obs or "state",
        camera=camera,
        image_size=image_size or min(256, teacher_size or 256),
        on_success=on_success or "terminate",
        teacher_inputs=() if teacher is None else teacher.inputs,
        teacher_image_size=teacher_size,
        visuals=default_visuals(teacher) if visuals is None else visuals,
        crop=None if crop is None else as_crop(env_id, crop),
    )
    reward = reward or "sparse"
    maniskill.check_view(env_id, view, reward)
    return _add_tokens(
        tokens, teacher, maniskill.make_maniskill(env_id, view, reward, control_mode, render_mode, **env_kwargs)
    )


def _add_tokens(tokens: Tokens, teacher: TeacherSpec | None, env: gym.Env) -> gym.Env:
    """The environment, with action tokens if they are asked for."""
    tokens = with_token_bounds({"tokens": tokens}, teacher)["tokens"]
    if tokens is False:
        return env
    if isinstance(tokens, Mapping):
        if unknown := set(tokens) - {"n_bins", "low", "high"} or {"low", "high"} - set(tokens):
            raise ValueError(
                f"tokens={dict(tokens)}: {', '.join(sorted(unknown))}: expected low, high and perhaps n_bins"
            )
        return ActionTokens(env, tokens.get("n_bins", N_BINS), Bounds(tokens["low"], tokens["high"]))
    return ActionTokens(env, N_BINS if tokens is True else tokens)


def with_token_bounds(options: Mapping[str, Any], teacher: TeacherSpec | None) -> dict[str, Any]:
    """The options with the bounds of the teacher's tokens written out, so that the student acts the same without the teacher.

    :param options: of :func:`make_env`
    :param teacher: spec of the teacher that the student learns from
    """
    tokens = options.get("tokens", False)
    if teacher is None or tokens is False or isinstance(tokens, Mapping):
        return dict(options)
    bounds = convert_token_bounds(teacher)
    if bounds is None:
        return dict(options)
    n_bins = N_BINS if tokens is True else tokens
    return dict(options) | {"tokens": {"n_bins": n_bins, "low": bounds.low.tolist(), "high": bounds.high.tolist()}}


def as_crop(env_id: str, crop: Sequence[float]) -> tuple[float, float, float]:
    """The three numbers of a crop.

    :raises ValueError: if it is anything else
    """
    try:
        left, top, side = (float(share) for share in crop)
    except (TypeError, ValueError):
        raise ValueError(f"env {env_id!r}: crop={crop!r} must be three numbers, [left, top, side]") from None
    return left, top, side


def default_visuals(teacher: TeacherSpec | None) -> str:
    """``light`` where a CPU renders, except for a teacher that looks at the frames: it knows ManiSkill's own scenes.

    :param teacher: spec of the teacher; None: there is none
    """
    import torch

    looks = teacher is not None and sees_images(teacher.inputs)
    return "full" if looks or torch.cuda.is_available() else "light"


def with_visuals(
    env_id: str, options: Mapping[str, Any], teacher: TeacherSpec | None, default: str | None = None
) -> dict[str, Any]:
    """The options with the student's ``visuals`` written out, which otherwise depend on machine and teacher.

    :param env_id: environment
    :param options: of :func:`make_env`
    :param teacher: spec of the teacher that the student learns from
    :param default: the visuals where the options name none; None: those of :func:`make_env`
    """
    drawn = str(options.get("obs") or "state") != "state" and is_maniskill(env_id)
    if not drawn or options.get("visuals") is not None:
        return dict(options)
    return dict(options) | {"visuals": default or default_visuals(teacher)}


def maniskill_ids() -> list[str]:
    """The environments that ManiSkill registers; none if it is not installed."""
    try:
        from mani_skill.utils.registration import REGISTERED_ENVS

        from rpd_sb3.envs import maniskill  # noqa: F401  (registers them)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("mani_skill", "sapien", "cv2"):
            return []
        raise
    return list(REGISTERED_ENVS)


def is_maniskill(env_id: str) -> bool:
    """True if ManiSkill is installed and registers an environment of this name."""
    return env_id in maniskill_ids()


def evaluation_options(env_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options for evaluation, where a ManiSkill episode goes on after success."""
    return dict(options) | ({"on_success": "continue"} if is_maniskill(env_id) else {})


def check_spec(spec: TeacherSpec | None, env_id: str, control_mode: str | None) -> None:
    """Checks that the teacher's spec is meant for this environment and controller.

    :param spec: the teacher's; None: nothing to check
    :param env_id: of the environment
    :param control_mode: ManiSkill controller; None: the environment has none
    :raises ValueError: if it is not
    """
    if spec is None:
        return
    if spec.env_id is not None and spec.env_id != env_id:
        raise ValueError(f"teacher {spec.name!r} only knows env {spec.env_id!r}, not {env_id!r}")
    if spec.control_mode is not None and spec.control_mode != control_mode:
        raise ValueError(
            f"teacher {spec.name!r} gives actions for control_mode={spec.control_mode!r}, "
            f"but env {env_id!r} has control_mode={control_mode!r}"
        )
    if control_mode is not None and spec.rotation not in (None, MANISKILL_ROTATION):
        raise ValueError(
            f"teacher {spec.name!r} gives rotation={spec.rotation!r}, but env {env_id!r} takes {MANISKILL_ROTATION!r}; "
            "convert its actions"
        )


def check_env_id(env_id: str) -> None:
    """Checks that there is such an environment.

    :param env_id: ``name``, or ``module:name`` for one that is registered when the module is imported
    :raises ValueError: with the closest known id
    """
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"env {env_id!r}: module {module!r} cannot be imported: {error}") from error
    maniskill = maniskill_ids()
    if env_id in maniskill or name in gym.registry:
        return
    if not maniskill and env_id in TASKS:
        raise ValueError(f"env {env_id!r} needs ManiSkill, which is not installed: pip install 'rpd_sb3[maniskill]'")
    known = sorted(set(maniskill) | set(gym.registry))
    raise ValueError(f"env {env_id!r} is unknown to ManiSkill and Gymnasium{closest(env_id, known)}")


def make_vec_env(
    env_id: str, n_envs: int = 1, *, seed: int | None = None, vec_env: str = "subproc", **options: Any
) -> VecEnv:
    """A VecEnv of monitored environments, seeded with ``seed``, ``seed + 1``, ...

    :param env_id: a ManiSkill id or any id that Gymnasium knows
    :param n_envs: number of environments
    :param seed: seed of the first environment; None: unseeded
    :param vec_env: ``subproc`` for worker processes, one per core, ``dummy`` to stay in this process
    :param options: arguments of :func:`make_env`
    """
    check_choice("make_vec_env", "vec_env", vec_env, VEC_ENVS)
    if n_envs < 1:
        raise ValueError(f"n_envs={n_envs} must be at least 1")
    thunks = [_thunk(env_id, options) for _ in range(n_envs)]
    venv: VecEnv = DummyVecEnv(thunks) if vec_env == "dummy" else WorkerPoolVecEnv(thunks)
    venv.seed(seed)
    return venv


def _thunk(env_id: str, options: dict[str, Any]) -> Callable[[], gym.Env]:
    def make() -> gym.Env:
        import torch

        torch.set_num_threads(1)  # one core per worker; more threads only contend
        return Monitor(EpisodeSeeds(make_env(env_id, **options)))

    return make
