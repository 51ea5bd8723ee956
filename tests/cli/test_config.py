"""Sections, command-line pairs and the checks on them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch as th

from rpd_sb3.algos import ALGOS, RPD
from rpd_sb3.cli.config import find_config, load_section, load_yaml, merge, parse_pairs
from rpd_sb3.envs.tasks import TASKS
from rpd_sb3.train.hyperparams import CosineSchedule, build_hyperparams, check_section, hyperparameters

PPO = ALGOS["ppo"]


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("text", "expected"), [("3e-4", 3e-4), ("1E5", 1e5), ("-2.5e+3", -2500.0), (".5e1", 5.0)])
def test_scientific_notation_is_a_number(text: str, expected: float) -> None:
    assert check_section({"ent_coef": text}, PPO).hyperparams["ent_coef"] == expected


def test_scientific_notation_is_a_number_at_any_depth() -> None:
    config = check_section({"policy_kwargs": {"optimizer_kwargs": {"eps": "1e-5"}}}, PPO)
    assert config.hyperparams["policy_kwargs"]["optimizer_kwargs"]["eps"] == 1e-5


def test_whole_float_becomes_int() -> None:
    config = check_section({"n_timesteps": "1e5", "n_steps": "2e2", "n_envs": 2}, PPO)
    assert (config.n_timesteps, config.hyperparams["n_steps"]) == (100_000, 200)
    assert isinstance(config.n_timesteps, int)
    assert isinstance(config.hyperparams["n_steps"], int)


@pytest.mark.parametrize(
    ("text", "values"), [("lin_3e-4", (3e-4, 1.5e-4, 0.0)), ("cos_1.0", (1.0, 0.5, 0.0)), ("cos_2", (2.0, 1.0, 0.0))]
)
def test_schedule_goes_to_zero(text: str, values: tuple[float, ...]) -> None:
    schedule = build_hyperparams(check_section({"learning_rate": text}, PPO), PPO)["learning_rate"]
    assert [schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx(values, abs=1e-15)


def test_cosine_schedule_is_flat_at_both_ends() -> None:
    schedule = CosineSchedule(1.0)
    assert schedule(0.75) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert 1 - schedule(0.99) < 3e-4


def test_cosine_schedule_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(CosineSchedule(0.3)))(0.5) == pytest.approx(0.15)


def test_class_names_become_classes() -> None:
    section = {"policy_kwargs": {"activation_fn": "torch.nn.ReLU", "optimizer_class": "torch.optim.SGD"}}
    built = build_hyperparams(check_section(section, PPO), PPO)["policy_kwargs"]
    assert built == {"activation_fn": th.nn.ReLU, "optimizer_class": th.optim.SGD}


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
        ({"gama": 1}, "unknown key 'gama' for RPD; did you mean 'gamma'"),
        ({"env": "PickCube-v1"}, "unknown key 'env'"),
        ({"seed": 1}, "unknown key 'seed'"),
        ({"normalize": True}, "unknown key 'normalize'"),
        ({"gamma": "0.9x"}, "gamma='0.9x' must be a number"),
        ({"gamma": None}, "gamma=None must be a number"),
        ({"gamma": float("nan")}, "gamma=nan must be a number"),
        ({"gamma": "lin_0.9"}, "gamma='lin_0.9' must be a number, it takes no schedule"),
        ({"learning_rate": "lin_"}, "learning_rate='lin_' must be a number, or a schedule like"),
        ({"learning_rate": "cos_fast"}, "learning_rate='cos_fast' must be"),
        ({"learning_rate": "exp_1"}, "learning_rate='exp_1' must be"),
        ({"learning_rate": True}, "learning_rate=True must be a number or a schedule"),
        ({"n_steps": 1.5}, "n_steps=1.5 must be a whole number"),
        ({"n_envs": 0}, "n_envs=0 must be at least 1"),
        ({"n_timesteps": "lots"}, "n_timesteps='lots' must be a whole number"),
        ({"use_sde": 1}, "use_sde=1 must be true or false"),
        ({"loss": 3}, "loss=3 must be a name"),
        ({"policy": "MlpPolice"}, "policy 'MlpPolice' is unknown; RPD has MlpPolicy"),
        ({"teacher": 3}, "teacher=3 must be a name"),
        ({"policy_kwargs": "dict(net_arch=[64])"}, "policy_kwargs must be a mapping.*strings are not evaluated"),
        ({"policy_kwargs": {"netarch": [64]}}, "unknown key 'netarch' in policy_kwargs; did you mean 'net_arch'"),
        ({"policy_kwargs": {"activation_fn": "nn.ReLU"}}, "activation_fn='nn.ReLU' must be the full name of a class"),
        ({"policy_kwargs": {"activation_fn": "torch.nn.Relu"}}, "activation_fn='torch.nn.Relu' must be the full"),
        ({"policy_kwargs": {"activation_fn": "torch.nn.functional.relu"}}, "relu' is no class"),
        ({"policy_kwargs": {"activation_fn": "ReLU"}}, "activation_fn='ReLU' must be the full name"),
        ({"env_kwargs": ["reward", "dense"]}, "env_kwargs must be a mapping"),
        ({"vec_teacher_kwargs": {"timout": 3}}, "unknown key 'timout' in vec_teacher_kwargs; known are timeout"),
        ({"n_envs": 4, "n_steps": 8, "batch_size": 64}, r"batch_size=64 is larger than .* 8 \* 4 = 32 transitions"),
    ],
)
def test_bad_section_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_section(section, RPD)


def test_arguments_of_all_classes_that_pass_kwargs_on_are_known() -> None:
    known = hyperparameters(RPD)
    assert {"loss", "distill_coef", "label_replay", "gamma", "target_kl", "policy_kwargs"} <= known.keys()
    assert not known.keys() & {"self", "policy", "env", "seed", "device", "verbose", "kwargs", "monitor_wrapper"}
    assert "loss" not in hyperparameters(PPO)


# Files ----------------------------------------------------------------------------------------------------------------

SECTIONS = (
    "default: {gamma: 0.1}\nA-v0: {gamma: 0.2}\nA-v0-dense: {gamma: 0.3}\npaper: {gamma: 0.4}\nA-v0-rgb: {gamma: 0.5}\n"
    "C-v0: {gamma: 0.6}\nC-v0-rgb: {gamma: 0.7}\nC-v0-rgb-dense: {gamma: 0.8}\n"
)


@pytest.mark.parametrize(
    ("env_id", "asked", "section", "gamma"),
    [
        ("A-v0", [], None, 0.2),
        ("A-v0", ["dense"], None, 0.3),
        ("A-v0", ["sparse"], None, 0.2),
        ("B-v0", ["dense"], None, 0.1),
        ("A-v0", ["dense"], "paper", 0.4),
        ("B-v0", [], "A-v0-dense", 0.3),
        ("A-v0", ["rgb"], None, 0.5),
        ("A-v0", ["rgb", "dense"], None, 0.5),
        ("A-v0", ["rgb+state"], None, 0.2),
        ("C-v0", ["rgb", "dense"], None, 0.8),
        ("C-v0", ["rgb", "sparse"], None, 0.7),
    ],
)
def test_section_lookup(tmp_path: Path, env_id: str, asked: list[str], section: str | None, gamma: float) -> None:
    path = write(tmp_path, SECTIONS)
    assert load_section(path, env_id, asked=asked, section=section) == {"gamma": gamma}


@pytest.mark.parametrize(
    ("text", "section", "message"),
    [
        (SECTIONS, "papr", "has no section 'papr', only default, A-v0, .*; did you mean 'paper'"),
        ("A-v0: {}", None, "has no section 'B-v0' or 'default', only A-v0"),
        ("B-v0: 3", None, "section 'B-v0': expected a mapping, got 3"),
        ("- 1\n", None, "expected a mapping at the top, got list"),
        ("", None, "expected a mapping at the top, got NoneType"),
        ("B-v0:\n  gamma: [1\nC: 3\n", None, "config.yml, line 3: "),
        ("B-v0: !!python/object/apply:os.system [exit]\n", None, "config.yml, line 1: "),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, section: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_section(write(tmp_path, text), "B-v0", section=section)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config file .*nix.yml' cannot be read: .*No such file"):
        load_section(tmp_path / "nix.yml", "A-v0")


# Command line ---------------------------------------------------------------------------------------------------------


def test_pairs_are_yaml_and_nest() -> None:
    pairs = [
        "gamma:0.8",
        "policy_kwargs.log_std_init:-1",
        "policy_kwargs.net_arch:[8, 8]",
        "obs:rgb+state",
        "x:",
        "a:b:c",
    ]
    assert parse_pairs(pairs, "-params") == {
        "gamma": 0.8,
        "policy_kwargs": {"log_std_init": -1, "net_arch": [8, 8]},
        "obs": "rgb+state",
        "x": None,
        "a": "b:c",
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["gamma"], "-params: 'gamma' is not of the form key:value"),
        ([":3"], "-params: ':3' is not of the form key:value"),
        (["a:[1"], r"-params: the value of 'a:\[1' is not YAML"),
        (["a:1", "a.b:2"], "-params: 'a.b:2' contradicts"),
    ],
)
def test_bad_pair_is_named(pairs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_pairs(pairs, "-params")


def test_merge_keeps_the_other_keys_of_a_mapping() -> None:
    section = {"gamma": 0.9, "policy_kwargs": {"net_arch": [64], "log_std_init": 0}}
    merged = merge(section, {"policy_kwargs": {"log_std_init": -1}, "n_steps": 8})
    assert merged == {"gamma": 0.9, "n_steps": 8, "policy_kwargs": {"net_arch": [64], "log_std_init": -1}}
    assert section["policy_kwargs"] == {"net_arch": [64], "log_std_init": 0}


# The configs that come with the library -------------------------------------------------------------------------------


@pytest.mark.parametrize("algo", ALGOS)
def test_every_section_of_the_zoo_is_valid(algo: str) -> None:
    path = find_config(algo)
    for name in load_yaml(path):
        check_section(load_section(path, "", section=name), ALGOS[algo])


@pytest.mark.parametrize("algo", ["ppo", "rpd_ppo"])
@pytest.mark.parametrize("env_id", TASKS)
def test_every_task_has_a_sparse_and_a_dense_section(algo: str, env_id: str) -> None:
    sections = load_yaml(find_config(algo))
    assert sections[env_id].get("env_kwargs", {}).get("reward", "sparse") == "sparse"
    assert sections[f"{env_id}-dense"]["env_kwargs"]["reward"] == "dense"
    assert sections[f"{env_id}-dense"]["gamma"] == 0.8
    assert ("teacher" in sections[env_id]) == (algo == "rpd_ppo")


@pytest.mark.parametrize("algo", ["ppo", "rpd_ppo"])
@pytest.mark.parametrize("env_id", TASKS)
@pytest.mark.parametrize("obs", ["rgb", "rgb+state"])
def test_every_task_has_sections_for_pixels(algo: str, env_id: str, obs: str) -> None:
    section = load_section(find_config(algo), env_id, asked=[obs])
    assert section["env_kwargs"]["obs"] == obs
    assert section["policy_kwargs"]["features_extractor_class"] == "rpd_sb3.students.CompactCNN"


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
