"""A label is one action in training, evaluation and recordings, whatever the teacher's conventions are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from rpd_sb3.algos.sft import SFT
from rpd_sb3.contract.bins import Bounds, centres
from rpd_sb3.contract.conventions import convert_token_bounds
from rpd_sb3.demos.files import Demonstrations, save
from rpd_sb3.demos.record import record
from rpd_sb3.envs import ActionTokens, make_env, make_vec_env
from rpd_sb3.envs.action_tokens import find_token_bounds, targets
from rpd_sb3.envs.factory import with_token_bounds
from rpd_sb3.episodes.play import teacher_actor
from rpd_sb3.evaluate import __main__ as evaluate
from rpd_sb3.labelling import VecTeacher
from rpd_sb3.train import __main__ as train
from tests.support.arm_env import ARM, HIGH, LOW, UNIT_BOX, ArmEnv, ArmTeacher, right_tokens

TOKENS = spaces.MultiDiscrete([256] * 7)


def arm(tokens: bool, space: spaces.Box = UNIT_BOX) -> tuple[VecTeacher, list[np.ndarray]]:
    """One arm with its teacher, and what it has been asked to do."""
    venv = make_vec_env(ARM, 1, seed=0, vec_env="dummy", tokens=tokens, teacher=ArmTeacher().spec, space=space)
    return VecTeacher(venv, ArmTeacher(), wait=True), venv.get_attr("acted")[0]


def wanted(states: np.ndarray) -> np.ndarray:
    """The teacher's actions in the arm's conventions, written down by hand."""
    share = (centres(256)[right_tokens(states)] + 1) / 2
    actions = np.array(LOW) + share * (np.array(HIGH) - np.array(LOW))
    actions[:, 3:6] *= -1
    actions[:, 6] = 2 * actions[:, 6] - 1
    return actions.clip(-1, 1)


HALF_A_BIN = (np.array(HIGH) - np.array(LOW)) * [1, 1, 1, 1, 1, 1, 2] / 255 / 2 + 1e-6


def by_label(venv: VecEnv, obs: np.ndarray) -> np.ndarray:
    """A student that has learnt the label of its action."""
    label = VecTeacher.label(venv)["action"]  # type: ignore[arg-type]
    return np.clip(label, -1, 1)


def by_logits(venv: VecEnv, obs: np.ndarray) -> np.ndarray:
    """A student that has learnt the likeliest token."""
    return VecTeacher.label(venv)["logits"].argmax(-1)  # type: ignore[arg-type]


def by_evaluation(venv: VecEnv, obs: np.ndarray) -> np.ndarray:
    """The teacher in the evaluation."""
    return teacher_actor(venv)(obs, np.ones(1, bool))


def played(tokens: bool, act: Callable[..., np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What the arm did in 20 steps, and what the teacher wanted."""
    venv, acted = arm(tokens)
    obs, states = venv.reset(), []
    for _ in range(20):
        states.append(np.array(obs[0]))
        obs, *_ = venv.step(act(venv, obs))
    return np.array(acted), wanted(np.array(states))


@pytest.mark.parametrize(
    ("tokens", "act"), [(False, by_label), (False, by_evaluation), (True, by_logits), (True, by_evaluation)]
)
def test_a_label_is_one_action_in_training_and_evaluation(tokens: bool, act: Callable[..., np.ndarray]) -> None:
    acted, right = played(tokens, act)
    assert (np.abs(acted - right) <= (HALF_A_BIN if tokens else 1e-6)).all()


def test_tokens_within_reach_are_acted_to_the_last_digit() -> None:
    """Where nothing is clipped, evaluation and training with tokens do exactly what the label says."""
    acted, right = played(True, by_evaluation)
    inside = np.abs(right) < 1
    assert inside.mean() > 0.5
    np.testing.assert_allclose(acted[inside], right[inside], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tokens", [True, False])
def test_a_recording_holds_the_actions_that_are_evaluated(tokens: bool) -> None:
    venv, acted = arm(tokens)
    demos = record(venv, 4, seed=3)
    np.testing.assert_allclose(demos.actions, wanted(np.asarray(demos.observations)), rtol=0, atol=1e-6)
    assert (np.abs(np.array(acted) - demos.actions) <= (HALF_A_BIN if tokens else 1e-6)).all()


def test_a_recording_is_the_same_with_tokens_and_without() -> None:
    with_tokens, without = (record(arm(tokens)[0], 4, seed=3) for tokens in (True, False))
    np.testing.assert_array_equal(with_tokens.actions, without.actions)


def test_a_recording_of_a_teacher_that_acts_with_tokens_holds_what_was_acted() -> None:
    class Tokens(ArmTeacher):
        def __init__(self) -> None:
            super().__init__()
            self.spec = replace(self.spec, action_space=TOKENS)

        def label(self, query: Any) -> dict[str, np.ndarray]:
            return super().label(query) | {"action": right_tokens(query.inputs["state"])}

    venv = make_vec_env(ARM, 1, seed=0, vec_env="dummy", tokens=True, teacher=Tokens().spec)
    demos = record(VecTeacher(venv, Tokens()), 4, seed=3)
    np.testing.assert_array_equal(demos.actions, np.array(venv.get_attr("acted")[0]))
    np.testing.assert_allclose(demos.actions, wanted(np.asarray(demos.observations)), rtol=0, atol=1e-6)


def recorded(n: int = 4) -> tuple[Demonstrations, Bounds]:
    venv, _ = arm(True)
    bounds = find_token_bounds(venv)
    assert bounds is not None
    return record(venv, n, seed=3), bounds


def test_targets_of_a_recording_are_tokens_that_act_as_recorded() -> None:
    demos, bounds = recorded()
    tokens = targets(demos.actions, TOKENS, bounds)
    env = ActionTokens(ArmEnv(), bounds=bounds)
    acted = np.array([env.action(row) for row in tokens])
    assert (np.abs(acted - demos.actions) <= HALF_A_BIN).all()
    inside = np.abs(demos.actions) < 1
    np.testing.assert_array_equal(tokens[inside], right_tokens(np.asarray(demos.observations))[inside])


def test_sft_clones_tokens_with_the_environments_bounds(tmp_path: Path) -> None:
    """One state, over and over: after a few steps its action is within a bin of the demonstrated one."""
    demos, _ = recorded(1)
    n = 64
    seen, actions = np.asarray(demos.observations)[:1].repeat(n, 0), demos.actions[:1].repeat(n, 0)
    starts, rewards = np.arange(n) % 8 == 0, np.zeros(n, np.float32)
    save(tmp_path / "demos.npz", Demonstrations(seen / 1000, actions, starts, rewards, None, {}))
    venv = make_vec_env(ARM, 1, seed=0, vec_env="dummy", tokens=True, teacher=ArmTeacher().spec)
    model = SFT(
        "MlpPolicy",
        venv,
        demonstrations=str(tmp_path / "demos.npz"),
        batch_size=16,
        learning_rate=0.02,
        seed=0,
        device="cpu",
    )
    model.learn(640)
    tokens, _ = model.predict(seen[:1] / 1000, deterministic=True)
    venv.step(tokens)
    assert (np.abs(venv.get_attr("acted")[0][-1] - actions[0]) <= HALF_A_BIN).all()


# A student without its teacher


def test_bounds_are_written_out_where_the_teacher_has_them() -> None:
    teacher, bounds = ArmTeacher().spec, convert_token_bounds(ArmTeacher().spec)
    assert bounds is not None
    written = with_token_bounds({"tokens": True, "length": 3}, teacher)
    assert written == {"length": 3, "tokens": {"n_bins": 256, "low": [*bounds.low], "high": [*bounds.high]}}
    assert with_token_bounds(written, teacher) == written
    np.testing.assert_array_equal(make_env(ARM, **written).get_wrapper_attr("token_bounds"), bounds)


@pytest.mark.parametrize("options", [{}, {"tokens": False}])
def test_nothing_is_written_out_without_tokens(options: dict[str, Any]) -> None:
    assert with_token_bounds(options, ArmTeacher().spec) == options


def test_nothing_is_written_out_without_bounds() -> None:
    assert with_token_bounds({"tokens": 16}, None) == {"tokens": 16}
    plain = replace(ArmTeacher().spec, gripper=None, rotation_sign=1, token_bounds=None)
    assert with_token_bounds({"tokens": 16}, plain) == {"tokens": 16}


def test_a_run_keeps_the_bounds_for_its_evaluation_without_the_teacher(tmp_path: Path) -> None:
    words = (
        "--algo opd --teacher tests.support.arm_env:ArmTeacher --n-envs 1 --vec-env dummy --eval-episodes 1 --no-video"
    )
    small = ["-n", "16", "-f", str(tmp_path), "-params", "n_steps:8", "batch_size:8", "n_epochs:1"]
    assert train.main([*words.split(), "--env", ARM, "--env-kwargs", "tokens:true", *small]) == 0
    (config,) = tmp_path.glob("**/config.yml")
    tokens = yaml.safe_load(config.read_text())["env_kwargs"]["tokens"]
    np.testing.assert_array_equal([tokens["low"], tokens["high"]], convert_token_bounds(ArmTeacher().spec))
    args = evaluate.make_parser().parse_args(["--run", str(config.parent), "--model", "last", "--vec-env", "dummy"])
    command = evaluate.EvaluateCommand(args)
    np.testing.assert_array_equal(find_token_bounds(command.evaluator.venv), convert_token_bounds(ArmTeacher().spec))
    command.close()
