"""A task in tokens or continuous actions that a teacher knows by heart, and a rollout to look at before it is trained on.

Shape letters: N queries, K tokens of an action, V bins of a token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos.buffers import LabelledSamples, Student
from rpd_sb3.algos.loop import OnPolicyDistillation
from rpd_sb3.envs import EpisodeSeeds
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherSpec

K, V = 2, 5
TOKENS = spaces.MultiDiscrete([V] * K)
BOX = spaces.Box(-1.0, 1.0, (K,), np.float32)
SMALL: dict[str, Any] = {
    "n_steps": 8,
    "batch_size": 8,
    "n_epochs": 2,
    "seed": 0,
    "device": "cpu",
    "policy_kwargs": {"net_arch": [16]},
}
LEARNING: dict[str, Any] = {
    **SMALL,
    "n_steps": 32,
    "batch_size": 64,
    "n_epochs": 8,
    "learning_rate": LinearSchedule(1e-2, 1e-3, 1.0),
    "gamma": 0.0,
    "gae_lambda": 0.0,
    "policy_kwargs": {"net_arch": [32]},
}


def right_tokens(points: np.ndarray) -> np.ndarray:
    """The quarter of [-1, 1] that each coordinate lies in: 0 to 3; the last bin is never right."""
    return np.clip(np.floor((points + 1) * 2), 0, 3).astype(int)


class PointEnv(gym.Env):
    """Each observation is a new random point of [-1, 1]^K, each step is rewarded by ``reward`` times the right tokens.

    :param reward: of a right token
    :param tokens: tokens, which are right as :func:`right_tokens` says; False: continuous actions, without reward
    :param length: steps of an episode
    :param truncates: episodes end at a time limit; False: they terminate
    """

    def __init__(self, reward: float = 0.0, tokens: bool = True, length: int = 4, truncates: bool = False) -> None:
        self.reward, self.tokens, self.length, self.truncates = reward, tokens, length, truncates
        self.observation_space = spaces.Box(-1.0, 1.0, (K,), np.float32)
        self.action_space: spaces.Space = TOKENS if tokens else BOX

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._point(), {}

    def _point(self) -> np.ndarray:
        self.point = self.np_random.uniform(-1, 1, K).astype(np.float32)
        return self.point

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        right = (action == right_tokens(self.point)) if self.tokens else np.zeros(K)
        self.steps += 1
        over = self.steps == self.length
        info = {"is_success": bool(right.all())}
        return (
            self._point(),
            self.reward * float(right.sum()),
            over and not self.truncates,
            over and self.truncates,
            info,
        )


Logits = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]
"""From points (N, K) and the student's tokens (N, K), or None, to logits (N, K, V)."""


def sharp(points: np.ndarray, actions: np.ndarray | None = None) -> np.ndarray:
    """Nearly certain of the right tokens."""
    return (6.0 * np.eye(V)[right_tokens(points)]).astype(np.float32)


def echo(points: np.ndarray, actions: np.ndarray | None = None) -> np.ndarray:
    """Undecided about the first token, nearly certain that the second one repeats the student's first."""
    logits = np.zeros((len(points), K, V), np.float32)
    logits[:, 0, V - 1] = -6.0
    if actions is not None:
        logits[:, 1] = 6.0 * np.eye(V)[actions[:, 0].astype(int)]
    return logits


def rough(points: np.ndarray, actions: np.ndarray | None = None) -> np.ndarray:
    """Any logits; those of the second token depend on the student's first."""
    weights = np.random.default_rng(5).normal(0, 2, (K, K, V)).astype(np.float32)
    logits = np.einsum("ni,ikv->nkv", points, weights)
    if actions is not None:
        logits[:, 1] += 2 * np.eye(V, dtype=np.float32)[actions[:, 0].astype(int)]
    return logits.astype(np.float32)


class TokenTeacher(LocalTeacher):
    """Gives logits, and as its action their likeliest tokens."""

    def __init__(self, logits: Logits = sharp, labels: frozenset[str] = frozenset({"action", "logits"})) -> None:
        super().__init__()
        self.logits, self.n_asked = logits, 0
        self.spec = TeacherSpec("tokens", labels, ("state",), TOKENS, n_bins=V)

    def label(self, query: Query) -> Labels:
        self.n_asked += len(query.env_ids)
        logits = self.logits(query.inputs["state"], query.actions)
        everything = {"action": logits.argmax(2), "logits": logits}
        return {name: everything[name] for name in self.spec.labels}


class GaussianTeacher(LocalTeacher):
    """Gives what ``answer`` makes of the points (N, K): a mean and a std, each (N, K)."""

    def __init__(self, answer: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> None:
        super().__init__()
        self.answer = answer
        self.spec = TeacherSpec("gaussian", frozenset({"action", "std"}), ("state",), BOX)

    def label(self, query: Query) -> Labels:
        mean, std = self.answer(query.inputs["state"])
        return {"action": np.asarray(mean, np.float32), "std": np.asarray(std, np.float32)}


def make_venv(teacher: LocalTeacher | None = None, n_envs: int = 4, **kwargs: Any) -> Any:
    """Environments that can start alike, with a teacher if there is one; other arguments are :class:`PointEnv`'s."""
    venv = DummyVecEnv([lambda: EpisodeSeeds(Monitor(PointEnv(**kwargs)))] * n_envs)
    return venv if teacher is None else VecTeacher(venv, teacher)


def peaked(model: PPO, gain: float = 100.0) -> Any:
    """The model with a policy far from the uniform distribution that training starts from."""
    net: Any = model.policy.action_net
    getattr(net, "head", net).weight.data *= gain
    return model


def collected(model: OnPolicyDistillation) -> Any:
    """The model with one rollout and its labels in the buffer, before it is prepared and trained on."""
    _, callback = model._setup_learn(model.n_steps * model.n_envs)
    callback.on_training_start({}, {})
    model.collect_rollouts(model.env, callback, model.rollout_buffer, model.n_steps)
    model._gather_labels()
    return model


def whole_rollout(model: Any) -> tuple[LabelledSamples, Student, th.Tensor]:
    """The rollout as one minibatch, the student on it, and the surrogate's loss."""
    batch = next(model.rollout_buffer.get(None))
    student, surrogate, _, _ = model._ppo_losses(batch, defaultdict(list))
    return batch, student, surrogate


def accuracy(model: PPO, logits: Logits = sharp) -> float:
    """Share of greedy tokens that the teacher finds likeliest, on fresh points, given the student's own earlier tokens."""
    points = np.random.default_rng(1).uniform(-1, 1, (500, K)).astype(np.float32)
    actions, _ = model.predict(points, deterministic=True)
    return float((actions == logits(points, actions).argmax(2)).mean())


def same_parameters(a: PPO, b: PPO) -> bool:
    """True if two policies are equal to the last bit."""
    ours, theirs = a.policy.state_dict(), b.policy.state_dict()
    return all(th.equal(value, theirs[name]) for name, value in ours.items())


def gradients(loss: th.Tensor, model: PPO) -> list[th.Tensor]:
    """Of all parameters of the actor."""
    policy: Any = model.policy
    parameters = [*policy.action_net.parameters(), *policy.mlp_extractor.policy_net.parameters()]
    return list(th.autograd.grad(loss, parameters, retain_graph=True))
