"""SFT: behaviour cloning of a linear teacher, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import nn

from rpd_sb3.algos.sft import SFT
from rpd_sb3.contract.bins import to_actions, to_tokens
from rpd_sb3.demos.files import Demonstrations, save
from rpd_sb3.envs import ActionTokens
from rpd_sb3.envs.action_tokens import targets
from rpd_sb3.students import TokenPolicy

WEIGHTS = np.array([[0.5, -0.3], [0.2, 0.4], [-0.1, 0.2]])
N = 600
N_BINS = 16
NETWORK: dict[str, Any] = {"net_arch": [32], "activation_fn": nn.ReLU}
LEARN: dict[str, Any] = {"learning_rate": 1e-2, "batch_size": 50, "seed": 0, "device": "cpu", "policy_kwargs": NETWORK}


class NeverStepped(gym.Env):
    """Shows spaces; a step is an error.

    :param image: show an image, channels last, instead of three values
    :param n_actions: A
    """

    control_mode = "delta"

    def __init__(self, image: bool = False, n_actions: int = 2) -> None:
        self.observation_space = spaces.Box(-1.0, 1.0, (3,), np.float32)
        if image:
            self.observation_space = spaces.Box(0, 255, (36, 40, 3), np.uint8)
        self.action_space = spaces.Box(-1.0, 1.0, (n_actions,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        raise AssertionError("SFT has stepped the environment")


def tokens_env() -> gym.Env:
    return ActionTokens(NeverStepped(), N_BINS)


def states(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (n, 3)).astype(np.float32)


def demonstrations(n: int = N, length: int = 10, **metadata: Any) -> Demonstrations:
    """Episodes of a linear teacher."""
    observations = states(n)
    actions = (observations @ WEIGHTS).astype(np.float32)
    starts = np.arange(n) % length == 0
    return Demonstrations(observations, actions, starts, np.zeros(n, np.float32), None, metadata)


@pytest.fixture
def file(tmp_path: Path) -> str:
    save(tmp_path / "demos.npz", demonstrations())
    return str(tmp_path / "demos.npz")


def action_error(model: PPO) -> float:
    """Mean squared distance to the teacher's action in 200 states that are not demonstrated."""
    seen = states(200, seed=1)
    actions, _ = model.predict(seen, deterministic=True)
    if isinstance(model.action_space, spaces.MultiDiscrete):
        actions = to_actions(actions, N_BINS)
    return float(np.square(actions - seen @ WEIGHTS).mean())


class Log(BaseCallback):
    """Remembers what happened when.

    :param stop_at: number of the step to stop at
    """

    def __init__(self, stop_at: int = 10**9) -> None:
        super().__init__()
        self.events: list[tuple[str, int]] = []
        self.stop_at = stop_at

    def _on_training_start(self) -> None:
        self.events.append(("training_start", self.num_timesteps))

    def _on_rollout_start(self) -> None:
        self.events.append(("rollout_start", self.num_timesteps))

    def _on_step(self) -> bool:
        self.events.append(("step", self.num_timesteps))
        return self.n_calls < self.stop_at

    def _on_training_end(self) -> None:
        self.events.append(("training_end", self.num_timesteps))


# Learning -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["bc", "mse"])
def test_continuous_student_learns_a_linear_teacher(file: str, loss: str) -> None:
    model = SFT("MlpPolicy", NeverStepped(), demonstrations=file, loss=loss, **LEARN)
    assert action_error(model) > 0.05
    assert action_error(model.learn(15_000)) < 1e-3


@pytest.mark.parametrize("policy", ["MlpPolicy", TokenPolicy])
def test_token_student_learns_a_linear_teacher(file: str, policy: Any) -> None:
    model = SFT(policy, tokens_env(), demonstrations=file, **LEARN)
    assert action_error(model) > 0.05
    # A uniform bin of width 2/15 alone has a mean squared error of 1.5e-3.
    assert action_error(model.learn(30_000)) < 4e-3


def test_bc_narrows_the_std_and_mse_leaves_it(file: str) -> None:
    std = {}
    for loss in ("bc", "mse"):
        model = SFT("MlpPolicy", NeverStepped(), demonstrations=file, loss=loss, **LEARN).learn(5_000)
        std[loss] = model.policy.log_std.exp().mean().item()
    assert std["mse"] == 1.0
    assert std["bc"] < 0.5


def test_only_the_first_demonstrations_are_learned(tmp_path: Path) -> None:
    demos = demonstrations(100, length=50)
    demos.actions[50:] = 1.0
    save(tmp_path / "two.npz", demos)
    save(tmp_path / "one.npz", demos.first(1))
    parameters = []
    for name, n_demos in (("two", 1), ("one", None), ("two", None)):
        path = str(tmp_path / f"{name}.npz")
        model = SFT("MlpPolicy", NeverStepped(), demonstrations=path, n_demos=n_demos, **LEARN).learn(500)
        parameters.append(th.nn.utils.parameters_to_vector(model.policy.parameters()))
    assert th.equal(parameters[0], parameters[1])
    assert not th.equal(parameters[0], parameters[2])


def test_same_seed_gives_the_same_student(file: str) -> None:
    models = [SFT("MlpPolicy", NeverStepped(), demonstrations=file, **LEARN).learn(500) for _ in range(2)]
    assert action_error(models[0]) == action_error(models[1])


def small(tmp_path: Path, n: int, batch_size: int, env: gym.Env | None = None, **kwargs: Any) -> SFT:
    """A student of n transitions."""
    save(tmp_path / "small.npz", demonstrations(n))
    path = str(tmp_path / "small.npz")
    kwargs = {"demonstrations": path, "batch_size": batch_size, "seed": 0, "device": "cpu"} | kwargs
    return SFT("MlpPolicy", NeverStepped() if env is None else env, **kwargs)


def test_minibatches_are_full_and_go_through_every_transition_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(tmp_path, 10, batch_size=4)
    seen: list[th.Tensor] = []
    evaluate = model.policy.evaluate_actions
    monkeypatch.setattr(model.policy, "evaluate_actions", lambda obs, act: (seen.append(obs), evaluate(obs, act))[1])
    model.learn(20)
    assert [len(batch) for batch in seen] == [4] * 5
    values = [batch[:, 0].tolist() for batch in seen]
    each_once = sorted(demonstrations(10).observations[:, 0].tolist())
    assert len({*values[0], *values[1]}) == len({*values[3], *values[4]}) == 8
    assert sorted(sum(values, [])) == sorted(2 * each_once)


def test_log_has_the_averages_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(tmp_path, 10, batch_size=5, env=tokens_env())
    losses: list[float] = []
    distill_loss = model.distill_loss
    monkeypatch.setattr(
        model, "distill_loss", lambda *args: (loss := distill_loss(*args), losses.append(loss[0].item()))[0]
    )
    model.learn(30)
    assert len(losses) == 6
    assert model.logger.name_to_value == {}, "written after the last pass"
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    model.learn(10)
    (row,) = np.atleast_1d(np.genfromtxt(tmp_path / "log" / "progress.csv", delimiter=",", names=True))
    assert row["trainloss"] == pytest.approx(np.mean(losses[-2:]), rel=1e-5)
    assert 0 <= row["trainaccuracy"] <= 1


def test_first_loss_is_the_negative_log_likelihood(tmp_path: Path) -> None:
    model = small(tmp_path, 8, batch_size=8, policy_kwargs={"log_std_init": -0.5})
    demos = demonstrations(8)
    with th.no_grad():
        mean = model.policy.get_distribution(th.as_tensor(demos.observations)).mode().numpy()
    z = (demos.actions - mean) / np.exp(-0.5)
    expected = (0.5 * z**2 - 0.5 + 0.5 * np.log(2 * np.pi)).sum(axis=1).mean()
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    model.learn(8)
    (row,) = np.atleast_1d(np.genfromtxt(tmp_path / "log" / "progress.csv", delimiter=",", names=True))
    assert row["trainloss"] == pytest.approx(expected, rel=1e-5)


def test_narrow_students_and_unlikely_demonstrations_have_finite_gradients(tmp_path: Path) -> None:
    model = small(tmp_path, 8, batch_size=8, loss="mse", policy_kwargs={"log_std_init": -60.0}).learn(80)
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_images_with_channels_last_are_learned_from(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (20, 36, 40, 3), dtype=np.uint8)
    save(tmp_path / "demos.npz", demonstrations(20)._replace(observations=images))
    path = str(tmp_path / "demos.npz")
    model = SFT("CnnPolicy", NeverStepped(image=True), demonstrations=path, batch_size=10, device="cpu").learn(20)
    assert model.num_timesteps == 20


# As an algorithm of SB3 -----------------------------------------------------------------------------------------------


def test_callbacks_see_every_minibatch(file: str) -> None:
    log = Log()
    model = SFT("MlpPolicy", NeverStepped(), demonstrations=file, **LEARN).learn(120, log)
    assert model.num_timesteps == 150
    assert log.events == [
        ("training_start", 0),
        ("rollout_start", 0),
        ("step", 50),
        ("rollout_start", 50),
        ("step", 100),
        ("rollout_start", 100),
        ("step", 150),
        ("training_end", 150),
    ]


def test_callback_can_stop_training(file: str) -> None:
    log = Log(stop_at=2)
    assert SFT("MlpPolicy", NeverStepped(), demonstrations=file, **LEARN).learn(1_000, log).num_timesteps == 100
    assert log.events[-2:] == [("step", 100), ("training_end", 100)]


@pytest.mark.parametrize(("env", "name"), [(NeverStepped, "mse"), (tokens_env, "accuracy")])
def test_log_has_a_line_for_each_pass(file: str, tmp_path: Path, env: Any, name: str) -> None:
    model = SFT("MlpPolicy", env(), demonstrations=file, **LEARN)
    model.set_logger(configure(str(tmp_path / "log"), ["csv"]))
    model.learn(3 * N)
    rows = np.genfromtxt(tmp_path / "log" / "progress.csv", delimiter=",", names=True)
    columns = {column.replace("train", ""): rows[column] for column in rows.dtype.names}
    assert columns["timetotal_timesteps"].tolist() == [N, 2 * N, 3 * N]
    assert columns["n_updates"].tolist() == [12, 24, 36]
    assert columns["loss"][0] > columns["loss"][1] > columns["loss"][2]
    assert np.isfinite(columns[name]).all()


def test_learning_rate_follows_its_schedule(file: str) -> None:
    model = SFT("MlpPolicy", NeverStepped(), demonstrations=file, **LEARN | {"learning_rate": lambda left: left})
    model.learn(200)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.25)


def test_saved_model_predicts_without_the_file_and_goes_on_with_it(file: str, tmp_path: Path) -> None:
    model = SFT(TokenPolicy, tokens_env(), demonstrations=file, **LEARN).learn(600)
    model.save(tmp_path / "model")
    Path(file).rename(tmp_path / "elsewhere.npz")
    loaded = SFT.load(tmp_path / "model", device="cpu")
    seen = states(20)
    np.testing.assert_array_equal(
        loaded.predict(seen, deterministic=True)[0], model.predict(seen, deterministic=True)[0]
    )
    loaded.set_env(DummyVecEnv([tokens_env]))
    with pytest.raises(ValueError, match="do not exist"):
        loaded.learn(50)
    Path(tmp_path / "elsewhere.npz").rename(file)
    assert loaded.learn(50, reset_num_timesteps=False).num_timesteps == 650


def test_saved_model_does_not_hold_the_demonstrations(file: str, tmp_path: Path) -> None:
    model = SFT("MlpPolicy", NeverStepped(), demonstrations=file, **LEARN)
    model.save(tmp_path / "model")
    assert SFT.load(tmp_path / "model", device="cpu")._demos is None


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        (NeverStepped, {"demonstrations": None}, "SFT needs demonstrations: name a file"),
        (NeverStepped, {"loss": "l1"}, "loss='l1' is unknown; choose one of bc, mse"),
        (tokens_env, {"loss": "mse"}, "loss='mse' needs a Box action space"),
        (NeverStepped, {"batch_size": 0}, "batch_size=0 must be positive"),
        (NeverStepped, {"n_demos": 61}, "61 demonstrations are asked for, but there are 60"),
        (lambda: NeverStepped(n_actions=3), {}, r"actions of shape \(2,\), but the env takes Box\(-1.0, 1.0, \(3,\)"),
        (lambda: NeverStepped(image=True), {}, r"has observations \(3,\) float32, but the env shows Box\(0, 255"),
        (lambda: VecNormalize(DummyVecEnv([NeverStepped])), {}, "but the env is in VecNormalize"),
    ],
)
def test_what_does_not_fit_is_refused(file: str, env: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFT("MlpPolicy", env(), **{"demonstrations": file, "device": "cpu", **options})


def test_demonstrations_of_another_control_mode_are_refused(tmp_path: Path) -> None:
    for mode in ("delta", "absolute"):
        save(tmp_path / f"{mode}.npz", demonstrations(10, control_mode=mode))
    SFT("MlpPolicy", NeverStepped(), demonstrations=str(tmp_path / "delta.npz"), device="cpu")
    with pytest.raises(ValueError, match="has actions for 'absolute', but the env takes 'delta'"):
        SFT("MlpPolicy", NeverStepped(), demonstrations=str(tmp_path / "absolute.npz"), device="cpu")


def test_targets() -> None:
    actions = demonstrations(10).actions
    assert np.array_equal(targets(actions, spaces.MultiDiscrete([N_BINS] * 2)), to_tokens(actions, N_BINS))
    assert np.array_equal(targets(actions, spaces.Box(-1.0, 1.0, (2,))), actions)
    with pytest.raises(ValueError, match=r"from -2 to 1.*outside of what the env takes, \[-1, 1\] in tokens; rescale"):
        targets(np.array([[1.0, -2.0]], np.float32), spaces.MultiDiscrete([N_BINS] * 2))
    with pytest.raises(ValueError, match="needs a Box or action tokens, but the env takes Discrete"):
        targets(actions, spaces.Discrete(4))
