"""What a section of a config may hold, and what is made of it."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import pytest
import torch as th

from rpd_sb3.algos import ALGOS, RPD
from rpd_sb3.cli.config import find_config, load_section, load_yaml
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.students import RunningNorm
from rpd_sb3.train.hyperparams import RUN_KEYS, CosineSchedule, build_hyperparams, check_section, hyperparameters
from tests.support import ROOT

PPO = ALGOS["ppo"]


def test_scientific_notation_is_a_number_at_any_depth() -> None:
    config = check_section({"policy_kwargs": {"optimizer_kwargs": {"eps": "1e-5"}}}, PPO)
    assert config.hyperparams["policy_kwargs"]["optimizer_kwargs"]["eps"] == 1e-5


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("lin_3e-4", (3e-4, 1.5e-4, 0.0)),
        ("lin_1.2_0.6", (1.2, 0.2, 0.0)),
        ("lin_1_1", (1.0, 0.5, 0.0)),
        ("cos_1.0", (1.0, 0.5, 0.0)),
        ("cos_2", (2.0, 1.0, 0.0)),
    ],
)
def test_schedule_goes_to_zero(text: str, values: tuple[float, ...]) -> None:
    schedule = build_hyperparams(check_section({"learning_rate": text}, PPO), PPO)["learning_rate"]
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx(values, abs=1e-15)


def test_a_linear_schedule_may_end_before_training_does() -> None:
    share = build_hyperparams(check_section({"teacher_share": "lin_1.0_0.6"}, RPD), RPD)["teacher_share"]
    assert [share(progress) for progress in (0.7, 0.4, 0.3)] == pytest.approx([0.5, 0.0, 0.0])


def test_cosine_schedule_is_flat_at_both_ends() -> None:
    schedule = CosineSchedule(1.0)
    assert schedule(0.75) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 1 - schedule(0.99) < 3e-4


def test_cosine_schedule_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(CosineSchedule(0.3)))(0.5) == pytest.approx(0.15)


def test_class_names_become_classes() -> None:
    names = {
        "activation_fn": "torch.nn.ReLU",
        "features_extractor_class": "rpd_sb3.students.RunningNorm",
        "optimizer_class": "torch.optim.SGD",
    }
    built = build_hyperparams(check_section({"policy_kwargs": names}, PPO), PPO)["policy_kwargs"]
    assert built == {
        "activation_fn": th.nn.ReLU,
        "features_extractor_class": RunningNorm,
        "optimizer_class": th.optim.SGD,
    }


def test_only_known_keys_are_resolved() -> None:
    section = {"policy_kwargs": {"optimizer_kwargs": {"activation_fn": "torch.nn.ReLU"}}}
    built = build_hyperparams(check_section(section, PPO), PPO)["policy_kwargs"]
    assert built["optimizer_kwargs"]["activation_fn"] == "torch.nn.ReLU"


def test_config_keeps_what_the_file_says() -> None:
    section = {"n_envs": 2, "learning_rate": "lin_3e-4", "policy_kwargs": {"activation_fn": "torch.nn.ReLU"}}
    config = check_section(section, PPO)
    build_hyperparams(config, PPO)
    assert config.as_dict() == section | {"n_timesteps": 100_000}
    assert check_section(config.as_dict(), PPO) == config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gama": 1}, "'gama' for RPD; did you mean 'gamma'"),
        ({"seed": 1}, "'seed'"),
        ({"gamma": "lin_0.9"}, "gamma='lin_0.9'.*no schedule"),
        ({"learning_rate": "lin_x"}, "learning_rate='lin_x'.*a schedule like"),
        ({"learning_rate": "exp_1"}, "learning_rate='exp_1'.*a schedule like"),
        ({"learning_rate": "lin_1_0"}, "learning_rate='lin_1_0'.*a schedule like"),
        ({"learning_rate": "lin_1_1.5"}, "learning_rate='lin_1_1.5'.*a schedule like"),
        ({"learning_rate": "cos_1_0.5"}, "learning_rate='cos_1_0.5'.*a schedule like"),
        ({"teacher_share": "half"}, "teacher_share='half'.*a schedule like"),
        ({"n_envs": 0}, "n_envs=0"),
        ({"n_timesteps": "lots"}, "n_timesteps='lots' must be a whole number"),
        ({"policy": "MlpPolice"}, "'MlpPolice' is unknown"),
        ({"policy_kwargs": {"netarch": [64]}}, "'netarch' in policy_kwargs; did you mean 'net_arch'"),
        ({"policy_kwargs": {3: 4}}, "3 in policy_kwargs"),
        ({"env_kwargs": ["reward", "dense"]}, "env_kwargs=.* must be a mapping"),
        ({"n_envs": 4, "n_steps": 8, "batch_size": 64}, r"batch_size=64.* 8 \* 4 = 32"),
    ],
)
def test_bad_section_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_section(section, RPD)


def test_policy_kwargs_may_be_left_empty() -> None:
    assert build_hyperparams(check_section({"policy_kwargs": None}, PPO), PPO) == {"policy_kwargs": None}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("activation_fn", "ReLU"),
        ("activation_fn", "torch.nn.Relu"),
        ("activation_fn", "torch.optim.Adam"),
        ("features_extractor_class", "subprocess.Popen"),
        ("features_extractor_class", ".extractors.Mine"),
        ("features_extractor_class", ""),
        ("features_extractor_class", ["subprocess", "Popen"]),
        ("optimizer_class", "subprocess.Popen"),
    ],
)
def test_class_of_another_kind_is_refused(key: str, name: Any) -> None:
    with pytest.raises(ValueError, match=rf"policy_kwargs.{key}=.* must be the full name of a subclass"):
        check_section({"policy_kwargs": {key: name}}, PPO)


def test_options_of_vec_teacher_are_those_of_its_constructor() -> None:
    options = {"timeout": 3, "patience": "1e3", "on_failure": "wait", "instruction": None}
    options |= {"take_over_steps": 40.0, "take_over_at_start": 0}
    config = check_section({"vec_teacher_kwargs": options}, RPD)
    assert config.vec_teacher_kwargs == options | {"patience": 1000.0}
    assert isinstance(config.vec_teacher_kwargs["take_over_steps"], int)
    documented = (ROOT / "docs" / "serving.md").read_text() + (ROOT / "docs" / "openpi.md").read_text()
    named = set(re.findall(r"vec_teacher_kwargs\.(\w+)", documented))
    assert named
    assert named <= options.keys()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("timout", 3, "'timout' in vec_teacher_kwargs; did you mean 'timeout'"),
        ("seed", 3, "'seed' in vec_teacher_kwargs; known are .*patience"),
        ("label_fraction", 0.5, "'label_fraction' in vec_teacher_kwargs"),
        ("teacher_share", 0.5, "'teacher_share' in vec_teacher_kwargs"),
        ("take_over_steps", 2.5, r"vec_teacher_kwargs.take_over_steps=2\.5 must be a whole number"),
        ("timeout", "abc", "vec_teacher_kwargs.timeout='abc' must be a number"),
    ],
)
def test_bad_option_of_vec_teacher_is_named(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_section({"vec_teacher_kwargs": {key: value}}, RPD)


def test_arguments_of_all_classes_that_pass_kwargs_on_are_known() -> None:
    known = hyperparameters(RPD)
    assert {"loss", "distill_coef", "label_replay", "gamma", "target_kl", "policy_kwargs"} <= known.keys()
    assert not known.keys() & {"self", "policy", "env", "seed", "device", "verbose", "kwargs", "monitor_wrapper"}
    assert "loss" not in hyperparameters(PPO)


# The configs that come with the library -------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGOS)
def test_every_section_of_the_zoo_is_valid(algo: str) -> None:
    for section in load_yaml(find_config(algo)).values():
        check_section(section, ALGOS[algo])


def test_the_head_of_a_config_names_every_run_key() -> None:
    head = find_config("rpd_ppo").read_text().partition("default: &default")[0]
    assert [key for key in RUN_KEYS if key not in head] == []


@pytest.mark.parametrize("algo", ["ppo", "rpd_ppo"])
@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_has_a_sparse_and_a_dense_section(algo: str, env_id: str) -> None:
    sections = load_yaml(find_config(algo))
    assert sections[env_id].get("env_kwargs", {}).get("reward", "sparse") == "sparse"
    assert sections[f"{env_id}-dense"]["env_kwargs"]["reward"] == "dense"
    assert sections[f"{env_id}-dense"]["gamma"] == 0.8
    assert ("teacher" in sections[env_id]) == (algo == "rpd_ppo")


@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("obs", ["rgb", "rgb+state"])
def test_every_task_has_sections_for_pixels_and_the_baseline_sees_the_same(env_id: str, obs: str) -> None:
    ours, ppo = (load_section(find_config(algo), env_id, asked=[obs]) for algo in ("rpd_ppo", "ppo"))
    assert ours["env_kwargs"]["obs"] == obs
    assert ours["env_kwargs"] == ppo["env_kwargs"]
    for key in ("features_extractor_class", "net_arch", "activation_fn"):
        assert ours["policy_kwargs"][key] == ppo["policy_kwargs"][key]


@pytest.mark.parametrize("algo", ["ppo", "rpd_ppo"])
@pytest.mark.parametrize(
    ("section", "gamma", "reward"), [("paper-sparse", 0.99, "sparse"), ("paper-dense", 0.8, "dense")]
)
def test_paper_sections_have_the_authors_numbers(algo: str, section: str, gamma: float, reward: str) -> None:
    config = check_section(load_section(find_config(algo), "PickCube-v1", section=section), ALGOS[algo])
    expected = {
        "n_steps": 50,
        "batch_size": 133,
        "n_epochs": 8,
        "learning_rate": 3e-4,
        "gamma": gamma,
        "gae_lambda": 0.9,
        "clip_range": 0.2,
        "normalize_advantage": True,
        "ent_coef": 0.0,
        "vf_coef": 0.25,
        "max_grad_norm": 0.5,
        "target_kl": 0.1333,
    }
    if algo == "rpd_ppo":
        expected |= {"loss": "mse", "distill_coef": 1.0}
    assert config.hyperparams == expected
    assert (config.n_timesteps, config.n_envs, config.policy) == (30_000_000, 128, "PaperCnnPolicy")
    assert config.env_kwargs == {
        "obs": "rgb",
        "camera": "human",
        "image_size": 256,
        "reward": reward,
        "control_mode": "pd_ee_delta_pose",
        "on_success": "truncate",
    }
