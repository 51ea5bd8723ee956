"""Supervised fine-tuning: behaviour cloning of recorded demonstrations, the imitation term without a teacher at hand.

Shape letters: n transitions, B minibatch, A action dimensions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.preprocessing import maybe_transpose
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import safe_mean
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.algos.losses import action_mse
from rpd_sb3.contract.names import check_choice
from rpd_sb3.demos.files import Demonstrations, Observation, load
from rpd_sb3.envs.action_tokens import find_token_bounds, targets

Self = TypeVar("Self", bound="SFT")


class SFT(OnPolicyDistillation):
    """L = -E[log pi(a|s)] (``bc``) or the mean squared distance of the mean action (``mse``) on demonstrations (s, a).

    A minibatch of demonstrations stands where a rollout would: the student never acts while it learns, and the environment
    only says what spaces there are. Every minibatch is full: a pass's last one goes on with the first transitions of the next.
    ``total_timesteps`` counts the transitions trained on, so that evaluations, checkpoints and the learning rate go by
    those. ``bc`` also narrows a Gaussian's std to the error that is left. What is saved is PPO's to go on with, except for the
    value function, which has not been trained.

    :param policy: as in PPO
    :param env: as in PPO; its observations and actions must be those of the demonstrations
    :param demonstrations: file of ``python -m rpd_sb3.collect``, or robomimic's
    :param n_demos: train on the first episodes alone; None: on all
    :param loss: ``bc``, -log pi(demonstrated action), or ``mse`` of the mean action, which leaves the std as it is
    :param learning_rate: a number, or a schedule of the remaining progress
    :param batch_size: B
    :param max_grad_norm: at which gradients are clipped
    :param policy_kwargs: as in PPO
    :param tensorboard_log: as in PPO
    :param verbose: as in PPO
    :param seed: as in PPO; also shuffles
    :param device: as in PPO
    :raises ValueError: if an argument is out of range, or the demonstrations cannot be read or do not fit
    """

    def __init__(
        self,
        policy: Any,
        env: GymEnv | str | None,
        *,
        demonstrations: str | None = None,
        n_demos: int | None = None,
        loss: str = "bc",
        learning_rate: float | Schedule = 3e-4,
        batch_size: int = 256,
        max_grad_norm: float = 0.5,
        policy_kwargs: dict[str, Any] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        check_choice("SFT", "loss", loss, ("bc", "mse"))
        for name, value in (("batch_size", batch_size), ("max_grad_norm", max_grad_norm), ("n_demos", n_demos)):
            if value is not None and value <= 0:
                raise ValueError(f"SFT: {name}={value} must be positive")
        super().__init__(
            policy,
            env,
            learning_rate=learning_rate,
            n_steps=2,  # of SB3's rollout buffer, which is exchanged below
            batch_size=2,
            n_epochs=1,
            max_grad_norm=max_grad_norm,
            ppo_coef=0.0,
            vf_coef=0.0,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.demonstrations = demonstrations
        self.n_demos = n_demos
        self.loss = loss
        self.batch_size = batch_size
        self._demos: Demonstrations | None = None
        if loss == "mse" and env is not None and not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"SFT: loss='mse' needs a Box action space, got {self.action_space}; use loss='bc'")
        if _init_setup_model:
            self._setup_model()
            self._demos = self._load()

    def _setup_model(self) -> None:
        super()._setup_model()
        buffer: Any = self.rollout_buffer_class
        self.rollout_buffer = buffer(
            self.batch_size, self.observation_space, self.action_space, device=self.device, n_envs=1
        )

    def _load(self) -> Demonstrations:
        """The demonstrations, checked against the environment."""
        if self.demonstrations is None:
            raise ValueError("SFT needs demonstrations: name a file of rpd_sb3.collect, e.g. demonstrations:demos.npz")
        demos = load(self.demonstrations)
        if self.n_demos is not None:
            demos = demos.first(self.n_demos)
        targets(demos.actions, self.action_space)
        self._check_observations(demos.observations)
        theirs = demos.metadata.get("control_mode")
        known = theirs is not None and self.env is not None and self.env.has_attr("control_mode")
        if known and (ours := self.env.get_attr("control_mode", 0)[0]) != theirs:  # type: ignore[union-attr]
            raise ValueError(f"SFT: {self.demonstrations!r} has actions for {theirs!r}, but the env takes {ours!r}")
        return demos

    def _check_observations(self, observations: Observation) -> None:
        space = self.observation_space
        if self._vec_normalize_env is not None:
            raise ValueError("SFT: demonstrations are raw, but the env is in VecNormalize; use students.RunningNorm")
        ours = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        theirs = observations if isinstance(observations, dict) else {"": observations}
        if ours.keys() != theirs.keys() or not all(_fits(theirs[key], ours[key]) for key in ours):
            shapes = ", ".join(f"{key} {values.shape[1:]} {values.dtype}".strip() for key, values in theirs.items())
            raise ValueError(f"SFT: {self.demonstrations!r} has observations {shapes}, but the env shows {space}")

    def learn(
        self: Self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int | None = 1,
        tb_log_name: str = "SFT",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train on ``total_timesteps`` transitions, rounded up to whole minibatches; callbacks see a minibatch as a rollout.

        :param total_timesteps: transitions to train on
        :param callback: as in PPO, like the arguments after the next
        :param log_interval: passes over the demonstrations between two lines of the log
        :raises ValueError: if the demonstrations cannot be read or do not fit
        """
        self._demos = self._demos or self._load()
        bounds = None if self.env is None else find_token_bounds(self.env)
        self._targets = targets(self._demos.actions, self.action_space, bounds)
        rng = np.random.default_rng(None if self.seed is None else [self.seed, self.num_timesteps])
        self._rows = _shuffled(len(self._targets), self.batch_size, rng)
        self._log_interval = log_interval
        self._logs: defaultdict[str, list[float]] = defaultdict(list)
        super().learn(total_timesteps, callback, None, tb_log_name, reset_num_timesteps, progress_bar)
        if self._logs:
            self._dump_pass()
        return self

    def collect_rollouts(
        self, env: VecEnv, callback: BaseCallback, rollout_buffer: RolloutBuffer, n_rollout_steps: int
    ) -> bool:
        self.curriculum.update(self.num_timesteps, self._current_progress_remaining, None)
        callback.on_rollout_start()
        self.num_timesteps += self.batch_size
        if not callback.on_step():
            return False
        callback.on_rollout_end()
        return True

    def prepare_rollout(self) -> None:
        """Put the next minibatch of demonstrations where a rollout would be."""
        buffer: Any = self.rollout_buffer
        buffer.reset()
        rows = next(self._rows)
        seen, space = self._demos.observations, self.observation_space  # type: ignore[union-attr]
        if isinstance(seen, dict):
            for key, values in seen.items():
                buffer.observations[key][:, 0] = maybe_transpose(values[rows], space[key])  # type: ignore[index]
        else:
            buffer.observations[:, 0] = maybe_transpose(seen[rows], space)
        buffer.actions[:, 0] = self._targets[rows]
        buffer.labels = {"action": self._targets[rows][:, None]}
        buffer.labelled[:] = True
        buffer.full = True

    def distill_loss(self, batch: LabelledSamples, student: Student) -> tuple[th.Tensor, Mapping[str, float]]:
        mode = student.distribution.mode()  # of tokens: each given the demonstrated ones before it
        if not isinstance(self.action_space, spaces.Box):
            return -student.log_prob.mean(), {"accuracy": (mode == batch.actions).float().mean().item()}
        mse = action_mse(mode, batch.actions).mean()
        return (mse if self.loss == "mse" else -student.log_prob.mean()), {"mse": mse.item()}

    def train(self) -> None:
        """Train on one minibatch, with the learning rate of its beginning."""
        self._update_current_progress_remaining(self.num_timesteps - self.batch_size, self._total_timesteps)
        super().train()
        n_passes, beyond = divmod(self.num_timesteps - self._num_timesteps_at_start, len(self._targets))
        if beyond < self.batch_size and self._log_interval and n_passes % self._log_interval == 0:
            self._dump_pass()

    def _log_update(self, values: Mapping[str, list[float]]) -> None:
        for name in values.keys() & {"loss", "accuracy", "mse"}:
            self._logs[name] += values[name]

    def _dump_pass(self) -> None:
        """Write the averages since the last line to the log."""
        for name, numbers in self._logs.items():
            self.logger.record(f"train/{name}", safe_mean(numbers))
        self._logs.clear()
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.dump_logs((self.num_timesteps - self._num_timesteps_at_start) // len(self._targets))

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_demos", "_targets", "_rows", "_logs"]


def _shuffled(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of full minibatches, ``(B,)`` each, from one permutation of n after the other, without end."""
    rows = np.zeros(0, dtype=int)
    while True:
        while len(rows) < batch_size:
            rows = np.append(rows, rng.permutation(n))
        yield rows[:batch_size]
        rows = rows[batch_size:]


def _fits(values: np.ndarray, space: spaces.Space) -> bool:
    """True if these are observations of the space, images also with channels last."""
    shape = values.shape[1:]
    return space.shape in (shape, (shape[2:] + shape[:2])) and np.can_cast(
        values.dtype, space.dtype or np.float32, "same_kind"
    )
