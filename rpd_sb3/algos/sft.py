"""Behaviour cloning on a file of demonstrations (supervised fine-tuning).

Shape letters: n transitions, B minibatch, A action dimensions.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import safe_mean

from rpd_sb3.algos.losses import action_mse
from rpd_sb3.contract.bins import Bounds
from rpd_sb3.demos.files import Demonstrations, Observation, each, load
from rpd_sb3.envs.action_tokens import find_token_bounds, targets

LOSSES = ("bc", "mse")

Self = TypeVar("Self", bound="SFT")


def clone(
    policy: ActorCriticPolicy,
    observations: Observation,
    actions: np.ndarray,
    *,
    n_epochs: float,
    batch_size: int,
    max_grad_norm: float,
    rng: np.random.Generator,
    loss: str = "bc",
    bounds: Bounds | None = None,
    after_batch: Callable[[dict[str, float]], bool] | None = None,
) -> dict[str, float]:
    """Train a policy to act as demonstrated: L = -E[log pi(a|s)] (``bc``), or the mean squared distance (``mse``).

    Every minibatch is full: an epoch's last one goes on with the first transitions of the next epoch.

    :param policy: with an optimiser
    :param observations: ``(n, ...)``, or a dict of such arrays
    :param actions: ``(n, A)`` continuous, also for a policy that acts with tokens
    :param n_epochs: passes over the demonstrations, rounded up to whole minibatches
    :param batch_size: B
    :param max_grad_norm: at which gradients are clipped
    :param rng: shuffles
    :param loss: ``bc`` or ``mse``; ``mse`` needs a Box
    :param bounds: of the bins, for a policy that acts with tokens; None: -1 and 1
    :param after_batch: gets the values of a minibatch after its step; False stops
    :return: values to log, averages over the last pass: ``loss``, and ``accuracy`` of single tokens or ``mse``
    :raises ValueError: if the actions do not fit the policy
    """
    labels = targets(actions, policy.action_space, bounds)
    history: deque[dict[str, float]] = deque(maxlen=math.ceil(len(actions) / batch_size))
    stream = _shuffled(len(actions), batch_size, rng)
    for _ in range(math.ceil(n_epochs * len(actions) / batch_size)):
        rows = next(stream)
        policy.set_training_mode(True)
        obs, _ = policy.obs_to_tensor(each(lambda values, rows=rows: values[rows], observations))
        objective, values = imitation_loss(policy, obs, th.as_tensor(labels[rows], device=policy.device), loss)
        policy.optimizer.zero_grad()
        objective.backward()
        th.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        policy.optimizer.step()
        history.append(values)
        if after_batch is not None and not after_batch(values):
            break
    policy.set_training_mode(False)
    return {name: safe_mean([values[name] for values in history]) for name in history[-1]} if history else {}


def imitation_loss(
    policy: ActorCriticPolicy, obs: Any, actions: th.Tensor, loss: str
) -> tuple[th.Tensor, dict[str, float]]:
    """The loss of one minibatch, a scalar to be minimised, and values to log.

    :param policy: to be trained
    :param obs: ``(B, ...)``, or a dict of such tensors
    :param actions: ``(B, A)`` in the policy's action space
    :param loss: ``bc`` or ``mse``
    """
    _, log_prob, _ = policy.evaluate_actions(obs, actions)
    mode = policy.action_dist.mode()  # of tokens: each given the demonstrated ones before it
    objective = -log_prob.mean()
    if not isinstance(policy.action_space, spaces.Box):
        return objective, {"loss": objective.item(), "accuracy": (mode == actions).float().mean().item()}
    mse = action_mse(mode, actions).mean()
    objective = mse if loss == "mse" else objective
    return objective, {"loss": objective.item(), "mse": mse.item()}


def _shuffled(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of full minibatches, ``(B,)`` each, from one permutation of n after the other, without end."""
    rows = np.zeros(0, dtype=int)
    while True:
        while len(rows) < batch_size:
            rows = np.append(rows, rng.permutation(n))
        yield rows[:batch_size]
        rows = rows[batch_size:]


class SFT(PPO):
    """Supervised fine-tuning: the student learns demonstrations by heart and never acts while it learns.

    ``total_timesteps`` counts the transitions trained on, so that evaluations, checkpoints and the learning rate go by
    those; the environment only says what spaces there are. ``bc`` also narrows a Gaussian's std to the error that is left.
    What is saved is PPO's to go on with, but for the value function, which nobody has trained.

    :param policy: as in PPO
    :param env: as in PPO; its observations and actions must be those of the demonstrations
    :param demonstrations: file of ``python -m rpd_sb3.collect``, or robomimic's
    :param n_demos: train on the first episodes alone; None: on all
    :param loss: ``bc``, -log pi(demonstrated action), or ``mse`` of the mean action, which leaves the std as it is
    :param learning_rate: a number, or a schedule of the remaining progress
    :param batch_size: transitions of a minibatch
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
        if loss not in LOSSES:
            raise ValueError(f"SFT: loss={loss!r} is unknown; choose one of {', '.join(LOSSES)}")
        for name, value in {"batch_size": batch_size, "max_grad_norm": max_grad_norm, "n_demos": n_demos}.items():
            if value is not None and value <= 0:
                raise ValueError(f"SFT: {name}={value} must be positive")
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate,
            n_steps=2,  # the rollout buffer stays empty
            batch_size=2,
            max_grad_norm=max_grad_norm,
            policy_kwargs=policy_kwargs,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        self.demonstrations, self.n_demos = demonstrations, n_demos
        self.loss, self.batch_size = loss, batch_size
        self._demos: Demonstrations | None = None
        if loss == "mse" and env is not None and not isinstance(self.action_space, spaces.Box):
            raise ValueError(f"SFT: loss='mse' needs a Box action space, got {self.action_space}; use loss='bc'")
        if _init_setup_model:
            self._setup_model()
            self._demos = self._load()

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
        log_interval: int = 1,
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
        self._demos = demos = self._demos or self._load()
        n, seed = len(demos.actions), None if self.seed is None else [self.seed, self.num_timesteps]
        total, callbacks = self._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        logs: defaultdict[str, list[float]] = defaultdict(list)

        def begin() -> bool:
            self._update_current_progress_remaining(self.num_timesteps, total)
            if self.num_timesteps >= total:
                return False
            self._update_learning_rate(self.policy.optimizer)
            callbacks.on_rollout_start()
            return True

        def after_batch(values: dict[str, float]) -> bool:
            self.num_timesteps += self.batch_size
            self._n_updates += 1
            for name, value in values.items():
                logs[name].append(value)
            if not callbacks.on_step():
                return False
            callbacks.on_rollout_end()
            epoch, step = divmod(self.num_timesteps - self._num_timesteps_at_start, n)
            if step < self.batch_size and log_interval is not None and epoch % log_interval == 0:
                self._log(logs, epoch)
            return begin()

        callbacks.on_training_start(locals(), globals())
        if begin():
            clone(
                self.policy,
                demos.observations,
                demos.actions,
                n_epochs=(total - self.num_timesteps) / n,
                batch_size=self.batch_size,
                max_grad_norm=self.max_grad_norm,
                rng=np.random.default_rng(seed),
                loss=self.loss,
                bounds=None if self.env is None else find_token_bounds(self.env),
                after_batch=after_batch,
            )
            if logs:
                self._log(logs, (self.num_timesteps - self._num_timesteps_at_start) // n)
        callbacks.on_training_end()
        return self

    def _log(self, logs: defaultdict[str, list[float]], epoch: int) -> None:
        for name, values in logs.items():
            self.logger.record(f"train/{name}", safe_mean(values))
        logs.clear()
        if hasattr(self.policy, "log_std"):
            self.logger.record("train/std", self.policy.log_std.exp().mean().item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.dump_logs(epoch)

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_demos"]


def _fits(values: np.ndarray, space: spaces.Space) -> bool:
    """True if these are observations of the space, images also with channels last."""
    shape = values.shape[1:]
    return space.shape in (shape, (shape[2:] + shape[:2])) and np.can_cast(
        values.dtype, space.dtype or np.float32, "same_kind"
    )
