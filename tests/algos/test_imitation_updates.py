"""Imitation with optimizer steps of its own: how many there are, on what, and what they leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from rpd_sb3.algos import GRPO, OPD, PPD, RPD
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.students import TokenPolicy
from tests.support.helpers import CountingEnv, EchoTeacher
from tests.support.token_helpers import SMALL as SMALL_TOKENS
from tests.support.token_helpers import TokenTeacher, rough
from tests.support.token_helpers import make_venv as make_token_venv

ROLLOUT = 14
NONE = 1e-9
"""So few updates for each transition that there is none."""


def make_venv(teacher: EchoTeacher | None = None) -> VecEnv:
    venv = DummyVecEnv([lambda i=i: CountingEnv(number=i, length=3 + i, reward=lambda action: 1.0) for i in range(2)])
    return VecTeacher(venv, teacher or EchoTeacher())


def make(imitation_updates: float | None, teacher: EchoTeacher | None = None, **kwargs: Any) -> RPD:
    settings: dict[str, Any] = {
        "n_steps": ROLLOUT // 2,
        "batch_size": 7,
        "n_epochs": 2,
        "device": "cpu",
        "seed": 0,
        "label_replay": 100,
        "replay_batch_size": 6,
        "ppo_coef": 0.0,
        "vf_coef": 0.0,
    }
    return RPD("MlpPolicy", make_venv(teacher), imitation_updates=imitation_updates, **(settings | kwargs))


class Watch(BaseCallback):
    """Seeds the draws of each update, and counts the optimizer steps up to the start of each rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.n_steps = 0
        self.counts: list[int] = []

    def _on_training_start(self) -> None:
        self.model.policy.optimizer.register_step_post_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.n_steps += 1

    def _on_rollout_start(self) -> None:
        self.counts.append(self.n_steps)

    def _on_rollout_end(self) -> None:
        np.random.seed(1)  # noqa: NPY002

    def _on_step(self) -> bool:
        return True


def learned(model: Any, steps: int = ROLLOUT) -> dict[str, th.Tensor]:
    return model.learn(steps, callback=Watch()).policy.state_dict()


def assert_equal(one: dict[str, th.Tensor], other: dict[str, th.Tensor]) -> None:
    for name, values in one.items():
        assert th.equal(values, other[name]), name


def test_the_steps_descend_the_distance_to_replayed_labels_and_nothing_else() -> None:
    expected = make(NONE, distill_coef=0.5)
    learned(expected)
    np.random.seed(1)  # noqa: NPY002
    policy: Any = expected.policy
    for _ in range(3):
        observations, labels = expected.label_replay_buffer.sample(6)  # type: ignore[union-attr]
        mean = policy.get_distribution(th.as_tensor(observations)).mode()
        loss = 0.5 * (mean - th.as_tensor(labels["action"])).square().mean()
        policy.optimizer.zero_grad()
        loss.backward()
        th.nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        policy.optimizer.step()
    assert_equal(learned(make(3 / ROLLOUT, distill_coef=0.5)), policy.state_dict())


def test_ppos_epochs_are_left_out_where_they_have_nothing_to_learn() -> None:
    model = make(NONE)
    before = {name: values.clone() for name, values in model.policy.state_dict().items()}
    assert_equal(learned(model), before)
    assert model._n_updates == 0


@pytest.mark.parametrize("kwargs", [{"ppo_coef": 1.0}, {"vf_coef": 0.5}, {"ent_coef": 0.1}])
def test_ppos_epochs_come_without_the_distillation_term(kwargs: dict[str, Any]) -> None:
    model = make(NONE, **kwargs)
    assert_equal(learned(model), learned(make(None, distill_coef=0.0, **kwargs)))
    assert model._n_updates == 2


def test_fractions_of_a_step_are_left_for_the_next_rollout(tmp_path: Path) -> None:
    model, watch = make(2.5 / ROLLOUT), Watch()
    model.learn(4 * ROLLOUT, callback=watch)
    assert watch.counts == [0, 2, 5, 7]
    assert watch.n_steps == 10
    assert model.logger.name_to_value["train/imitation_updates"] == 3
    model.learn(ROLLOUT, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    assert RPD.load(tmp_path / "model")._owed_updates == model._owed_updates == 0.5


def test_the_mean_loss_of_the_steps_is_logged() -> None:
    model = make(2 / ROLLOUT)
    losses: list[float] = []
    distill_loss = model.distill_loss

    def watched(*args: Any) -> Any:
        loss, values = distill_loss(*args)
        losses.append(loss.item())
        return loss, values

    model.distill_loss = watched  # type: ignore[method-assign]
    learned(model)
    assert len(losses) == 2
    assert model.logger.name_to_value["train/distill_loss"] == pytest.approx(np.mean(losses))


def test_nothing_is_owed_while_the_reward_leads() -> None:
    model, watch = make(1.0, distill_coef=lambda progress: float(progress > 0.6)), Watch()
    model.learn(3 * ROLLOUT, callback=watch)
    assert watch.counts == [0, ROLLOUT, 2 * ROLLOUT]
    assert watch.n_steps == 2 * ROLLOUT, "the last rollout begins at a third"
    assert model.label_replay_buffer.size == 2 * ROLLOUT  # type: ignore[union-attr]
    assert model._owed_updates == 0.0


def test_weight_decay_spares_what_imitation_does_not_use() -> None:
    decay = {"optimizer_class": th.optim.AdamW, "optimizer_kwargs": {"weight_decay": 0.5}}
    model = make(1.0, policy_kwargs=decay)
    before = {name: values.clone() for name, values in model.policy.state_dict().items()}
    after = learned(model)
    assert th.equal(after["value_net.weight"], before["value_net.weight"])
    assert not th.equal(after["action_net.weight"], before["action_net.weight"])


def test_token_distributions_are_replayed_too() -> None:
    kwargs = SMALL_TOKENS | {"label_replay": 100, "replay_batch_size": 8, "imitation_updates": 0.25}
    model = OPD(TokenPolicy, make_token_venv(TokenTeacher(rough)), **kwargs).learn(64)
    logged = model.logger.name_to_value
    assert logged["train/imitation_updates"] == 0.25 * model.n_steps * model.n_envs
    assert {"train/reverse_kl", "train/distill_loss"} <= logged.keys()
    assert "train/k3" not in logged, "an estimate from the current student's own tokens"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_replay": 0}, "label_replay=0 above 0"),
        ({"replay_batch_size": None}, "replay_batch_size=None to be a number"),
        ({"imitation_updates": 0.0}, r"imitation_updates=0\.0 must be positive"),
        ({"imitation_updates": float("nan")}, "imitation_updates=nan must be positive"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**({"imitation_updates": 1.0} | kwargs))


def test_algorithms_that_cannot_replay_refuse() -> None:
    kwargs: dict[str, Any] = {"imitation_updates": 1.0, "label_replay": 9, "replay_batch_size": 3}
    for key, value in {"imitation_updates": 1.0, "label_replay": 9, "image_shift": 2}.items():
        with pytest.raises(ValueError, match=rf"OPD: {key}={value} needs estimator='full'"):
            OPD(TokenPolicy, make_token_venv(TokenTeacher(rough)), estimator="sampled", **{key: value})
    with pytest.raises(ValueError, match=r"PPD: imitation_updates=1\.0 has no ratio"):
        PPD("MlpPolicy", make_venv(), imitation_updates=1.0)
    with pytest.raises(ValueError, match="GRPO: label_replay=9 is for a teacher's labels, and GRPO asks none"):
        GRPO("MlpPolicy", make_venv(), **kwargs)
    with pytest.raises(ValueError, match=r"GRPO: imitation_updates=1\.0 is for a teacher's labels, and GRPO asks none"):
        GRPO("MlpPolicy", make_venv(), imitation_updates=1.0)
