"""Octo, a generalist robot policy with a diffusion head (https://octo-models.github.io), as a teacher.

Shape letters: N queries in a batch, H and W pixels, S samples, E actions that are executed of a chunk, A = 7 action
dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces

from rpd_sb3.contract.names import check_choice, check_counts
from rpd_sb3.contract.teacher import GRIPPERS, Labels, LocalTeacher, Query, TeacherSpec
from rpd_sb3.teachers.octo.checkpoint import (
    ACTION_SIZE,
    HUB,
    Checkpoint,
    action_statistics,
    is_deterministic,
    load_checkpoint,
    weights,
)
from rpd_sb3.teachers.octo.memory import Memory, Plan, window
from rpd_sb3.teachers.octo.sampler import Sampler

PRIMARY, WRIST = "image_primary", "image_wrist"


class OctoTeacher(LocalTeacher):
    """Labels with actions that Octo samples from images and an instruction.

    ``action`` (N, A) float32 is position, rotation and gripper, unnormalized with the statistics of the checkpoint, not
    clipped, in the conventions of the dataset that Octo was trained on. With several samples the action is their mean,
    and ``std`` (N, A) their standard deviation (ddof 0).

    Octo needs a Python environment of its own, see ``requirements/octo.txt`` and ``docs/octo.md``. The noise of an answer
    follows from the seed, the environment's id and how many answers were sampled for that id before; it does not
    depend on the other rows of the query.

    :param path: folder of a checkpoint, or ``hf://org/name``
    :param step: which step of a folder; None: the latest
    :param unnorm_key: dataset whose statistics unnormalize the actions; None: those of a fine-tuned checkpoint
    :param n_samples: S, samples that an answer is made of
    :param std_floor: least ``std``, in units of the action
    :param horizon: images of the history that Octo gets, the current one included
    :param exec_horizon: E, actions of a chunk that are executed before Octo is asked again
    :param camera: camera of Octo's primary images
    :param wrist_camera: camera of Octo's wrist images; None: without them
    :param seed: of the samples
    :param gripper: convention of the checkpoint's dataset, one of :data:`~rpd_sb3.contract.teacher.GRIPPERS`; None: not known
    :param rotation: the same for rotations, ``axis_angle`` or ``euler_xyz``; None: not known
    :param rotation_sign: -1 if the environment turns the hand the other way than that of the demonstrations
    :param control_mode: controller that the actions are meant for; None: not tied to one
    :param batch_sizes: sizes that batches are padded to; each is compiled once
    :param warm_up: compile all of them now; False: when they first occur, which takes seconds then
    :raises ValueError: for an argument out of range, if the package octo is missing, another one or does not import, or if
        the checkpoint is missing or does not fit the arguments
    """

    def __init__(
        self,
        path: str,
        *,
        step: int | None = None,
        unnorm_key: str | None = None,
        n_samples: int = 1,
        std_floor: float = 0.02,
        horizon: int = 1,
        exec_horizon: int = 1,
        camera: str = "human",
        wrist_camera: str | None = None,
        seed: int = 0,
        gripper: str | None = "0..1",
        rotation: str | None = None,
        rotation_sign: int = 1,
        control_mode: str | None = None,
        batch_sizes: Sequence[int] = (1, 2, 4, 8, 16, 32, 64),
        warm_up: bool = True,
    ) -> None:
        super().__init__()
        check_counts(n_samples=n_samples, horizon=horizon, exec_horizon=exec_horizon)
        if path in ("", HUB):
            raise ValueError(f"path={path!r} must be the folder of a checkpoint, or {HUB}org/name")
        if step is not None and path.startswith(HUB):
            raise ValueError(f"step={step} cannot be chosen for a checkpoint on the hub: {path!r} is its latest step")
        if not (isinstance(batch_sizes, (list, tuple)) and batch_sizes):
            raise ValueError(f"batch_sizes={batch_sizes!r} must be a list of whole numbers")
        for size in batch_sizes:
            check_counts(batch_sizes=size)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must be from 0 to {2**32 - 1}")
        if not 0 < std_floor < np.inf:
            raise ValueError(f"std_floor={std_floor} must be a positive number")
        check_choice("OctoTeacher", "gripper", gripper, (*GRIPPERS, None))
        if wrist_camera == camera:
            raise ValueError(f"camera and wrist_camera are both {camera!r}: they must be two cameras")
        self._cameras = {PRIMARY: camera, **({WRIST: wrist_camera} if wrist_camera is not None else {})}
        checkpoint = load_checkpoint(path, step)
        self._check_fit(checkpoint, n_samples, horizon, exec_horizon, path)
        self._statistics = action_statistics(checkpoint.model.dataset_statistics, unnorm_key)
        self._exec_horizon = exec_horizon
        self._std_floor = np.float32(std_floor)
        self._memory = Memory(horizon, exec_horizon)
        sizes = {key: checkpoint.image_sizes[key] for key in self._cameras}
        self.spec = TeacherSpec(
            name="octo",
            labels=frozenset({"action", "std"} if n_samples > 1 else {"action"}),
            inputs=(*(f"images.{name}" for name in self._cameras.values()), "instruction"),
            action_space=spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32),
            image_sizes={self._cameras[key]: size for key, size in sizes.items()},
            control_mode=control_mode,
            stateful=self._memory.stateful,
            stochastic=not is_deterministic(checkpoint.model),
            gripper=gripper,
            rotation=rotation,
            rotation_sign=rotation_sign,
            unnorm_key=unnorm_key,
            n_parameters=sum(array.size for array in weights(checkpoint.model.params)),
            n_bytes=sum(array.nbytes for array in weights(checkpoint.model.params)),
        )
        self._sampler = Sampler(checkpoint.model, n_samples, batch_sizes, seed)
        if warm_up:
            self._sampler.warm_up(sizes, horizon)

    def label(self, query: Query) -> Labels:
        """Octo's actions.

        :param query: ``images.<camera>`` (N, H, W, 3) uint8 of the checkpoint's size, ``instruction`` (N,) str
        :return: ``action`` (N, A) float32, and ``std`` (N, A) float32 if there are several samples
        :raises ValueError: for inputs of another type or shape, and as :meth:`Memory.check`
        """
        images, instructions = self._checked(query)
        env_ids, starts = query.env_ids.tolist(), query.episode_starts.tolist()
        self._memory.check(env_ids, starts)
        histories = [
            self._memory.history(env, start, {key: array[i] for key, array in images.items()})
            for i, (env, start) in enumerate(zip(env_ids, starts))
        ]
        known = [self._memory.plan(*row) for row in zip(env_ids, starts, instructions)]
        asked = [i for i, plan in enumerate(known) if plan is None]
        rows = ([histories[i] for i in asked], [instructions[i] for i in asked], [env_ids[i] for i in asked])
        fresh = iter(self._ask(*rows) if asked else [])
        plans = [next(fresh) if plan is None else plan for plan in known]
        # Only now, so that a query that fails changes nothing.
        self._memory.count(rows[2])
        for env, history, plan in zip(env_ids, histories, plans):
            self._memory.keep(env, history, plan.rest())
        labels = {"action": np.stack([plan.actions[0] for plan in plans])}
        if "std" in self.spec.labels:
            labels["std"] = np.stack([plan.stds[0] for plan in plans])
        return labels

    def _ask(self, histories: list[Any], instructions: list[str], env_ids: list[int]) -> list[Plan]:
        """Ask the model: mean and std over the samples of each chunk."""
        images, mask = window(histories, self._memory.horizon)
        counts = self._memory.counts(env_ids)
        chunks = self._sampler.draw(images, mask, instructions, env_ids, counts)[:, :, : self._exec_horizon]
        samples = self._statistics.unnormalize(chunks)
        means = samples.mean(axis=1, dtype=np.float64).astype(np.float32)
        stds = np.maximum(samples.std(axis=1, dtype=np.float64).astype(np.float32), self._std_floor)
        return [Plan(*row) for row in zip(instructions, means, stds)]

    def _checked(self, query: Query) -> tuple[dict[str, np.ndarray], list[str]]:
        n = len(query.env_ids)
        images = {}
        for key, camera in self._cameras.items():
            array = query.inputs[f"images.{camera}"]
            shape = (n, *self.spec.image_sizes[camera], 3)
            # Octo takes floats in [0, 1] without an error, but answers with other actions.
            if array.dtype != np.uint8 or array.shape != shape:
                raise ValueError(
                    f"teacher 'octo': images.{camera} must be uint8 of shape {shape}, got {array.dtype} {array.shape}"
                )
            images[key] = array
        instructions = np.asarray(query.inputs["instruction"])
        if instructions.shape != (n,) or not all(isinstance(text, str) for text in instructions.tolist()):
            raise ValueError(
                f"teacher 'octo': instruction must be {n} strings, got {instructions.dtype} {instructions.shape}"
            )
        return images, instructions.tolist()

    def _check_fit(self, checkpoint: Checkpoint, n_samples: int, horizon: int, exec_horizon: int, path: str) -> None:
        for key, camera in self._cameras.items():
            if key not in checkpoint.image_sizes:
                has = ", ".join(checkpoint.image_sizes) or "none"
                raise ValueError(f"octo's checkpoint {path!r} has no {key} for camera {camera!r}; its images are {has}")
        if horizon > checkpoint.max_horizon:
            raise ValueError(
                f"horizon={horizon} must be at most {checkpoint.max_horizon}, the checkpoint's max_horizon"
            )
        if exec_horizon > checkpoint.action_horizon:
            raise ValueError(
                f"exec_horizon={exec_horizon} must be at most {checkpoint.action_horizon}, the actions of the checkpoint's "
                "chunks"
            )
        if n_samples > 1 and is_deterministic(checkpoint.model):
            raise ValueError(
                f"n_samples={n_samples} must be 1: the head of octo's checkpoint {path!r} is deterministic"
            )
