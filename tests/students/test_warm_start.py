"""Weights of a saved model: what is taken from the file, what is refused, and that nothing of it is executed."""

from __future__ import annotations

import io
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy

from rpd_sb3.students import AutoregressivePolicy, RunningNorm, TokenPolicy
from rpd_sb3.students.warm_start import load_weights
from tests.support.tiny_env import TinyEnv

WEIGHTS = "policy.pth"


def make_model(seed: int = 0, **kwargs: Any) -> PPO:
    return PPO("MlpPolicy", TinyEnv(), n_steps=8, batch_size=8, seed=seed, device="cpu", policy_kwargs=kwargs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model with weights that no seed gives."""
    make_model(seed=1).learn(8).save(tmp_path / "model.zip")
    return tmp_path / "model.zip"


def state(policy: ActorCriticPolicy) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def same(a: dict[str, th.Tensor], b: dict[str, th.Tensor]) -> bool:
    return a.keys() == b.keys() and all(th.equal(value, b[name]) for name, value in a.items())


def repack(path: Path, **members: bytes | None) -> Path:
    """A copy with other members; None leaves one out, and ``policy_pth`` stands for ``policy.pth``."""
    changes = {name.replace("_pth", ".pth"): content for name, content in members.items()}
    copy = path.with_name("copy.zip")
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as out:
        contents: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
        for name, content in (contents | changes).items():
            if content is not None:
                out.writestr(name, content)
    return copy


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.path,)


def saved_by_torch(content: object) -> bytes:
    buffer = io.BytesIO()
    th.save(content, buffer)
    return buffer.getvalue()


def test_loaded_weights_are_those_of_the_saved_model(saved: Path) -> None:
    model, other = make_model(), PPO.load(saved, device="cpu")
    assert not same(state(model.policy), state(other.policy))
    load_weights(model.policy, saved)
    assert same(state(model.policy), state(other.policy))
    obs = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    np.testing.assert_array_equal(model.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("policy_class", [TokenPolicy, AutoregressivePolicy])
def test_students_of_tokens_and_their_statistics_are_loaded(policy_class: type[TokenPolicy], tmp_path: Path) -> None:
    spaces_ = spaces.Box(-1.0, 1.0, (5,), np.float32), spaces.MultiDiscrete([8] * 3)
    policy, other = (policy_class(*spaces_, lambda _: 1e-3, features_extractor_class=RunningNorm) for _ in range(2))
    other.features_extractor(th.randn(32, 5))  # statistics of observations
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr(WEIGHTS, saved_by_torch(other.state_dict()))
    assert not same(state(policy), state(other))
    load_weights(policy, str(tmp_path / "model.zip"))
    assert same(state(policy), state(other))


@pytest.mark.parametrize(
    ("kwargs", "detail"),
    [
        ({"net_arch": [32]}, r"'mlp_extractor.policy_net.0.weight' has the shape \(64, 2\) there and \(32, 2\) here"),
        ({"net_arch": [64]}, r"has the shape \(64, 64\) there and None here"),
        ({"net_arch": [64, 64, 64]}, r"has the shape None there and \(64, 64\) here"),
    ],
)
def test_another_architecture_is_refused_and_changes_nothing(saved: Path, kwargs: dict[str, Any], detail: str) -> None:
    policy = make_model(**kwargs).policy
    before = state(policy)
    with pytest.raises(
        ValueError, match=rf"^warm_start='.*model.zip' is a model of another architecture: .*{detail}"
    ) as e:
        load_weights(policy, saved)
    assert "\n" not in str(e.value)
    assert str(e.value).endswith("give both the same policy and policy_kwargs")
    assert same(state(policy), before)


REFUSED = r"^warm_start='.*' cannot be read as a saved SB3 model: "


def refuses(path: Path, why: str) -> None:
    """Says so in one sentence and leaves the policy as it is."""
    policy = make_model().policy
    before = state(policy)
    with pytest.raises(ValueError, match=REFUSED + why) as refusal:
        load_weights(policy, path)
    assert "\n" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value), "PyTorch's advice to trust the file"
    assert same(state(policy), before)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refuses(tmp_path / "nothing.zip", r".*No such file or directory")


def test_a_file_that_is_not_a_zip_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_bytes(pickle.dumps({"a": 1}))
    refuses(tmp_path / "model.zip", "File is not a zip file$")


def test_damaged_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(WEIGHTS, bytes(5000))
    content = bytearray(path.read_bytes())
    content[30 + len(WEIGHTS)] = 0xFF  # the first byte after the local header
    path.write_bytes(content)
    refuses(path, "Error -3 while decompressing data")


def test_a_zip_without_weights_is_refused(saved: Path) -> None:
    refuses(repack(saved, policy_pth=None), ".*no item named 'policy.pth'")


def test_weights_damaged_anywhere_are_refused_in_one_sentence(saved: Path) -> None:
    rng, policy, good = random.Random(0), make_model().policy, saved_by_torch(make_model().policy.state_dict())
    messages = []
    for _ in range(60):
        content = bytearray(good)
        for _ in range(30):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path = repack(saved, policy_pth=bytes(content[: rng.choice([len(content), rng.randrange(len(content))])]))
        try:
            load_weights(policy, path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 30, "the others have other numbers as weights"
    assert all(message.startswith("warm_start=") and "\n" not in message for message in messages)


@pytest.mark.parametrize("content", [[th.zeros(2)], {"a": 1.0}, {"policy": {"a": th.zeros(1)}}], ids=str)
def test_other_content_than_weights_by_name_is_refused(saved: Path, content: object) -> None:
    refuses(repack(saved, policy_pth=saved_by_torch(content)), "its policy.pth is not a mapping")


def test_code_among_the_weights_is_refused_and_not_executed(saved: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "exploded"
    for content in (saved_by_torch({"a": Bomb(bomb)}), pickle.dumps(Bomb(bomb))):
        refuses(repack(saved, policy_pth=content), "its policy.pth is damaged, or holds more than weights$")
        assert not bomb.exists()
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert bomb.exists(), "it would have exploded"


@pytest.mark.parametrize("kind", ["bomb", "garbage", "missing"])
def test_nothing_but_the_weights_is_read(saved: Path, tmp_path: Path, kind: str) -> None:
    bomb = tmp_path / "exploded"
    content = {"bomb": pickle.dumps(Bomb(bomb)), "garbage": b"\x80garbage", "missing": None}[kind]
    others = ("data", "policy.optimizer_pth", "pytorch_variables_pth", "_stable_baselines3_version", "system_info.txt")
    expected = PPO.load(saved, device="cpu").policy
    policy = make_model().policy
    load_weights(policy, repack(saved, **dict.fromkeys(others, content)))
    assert same(state(policy), state(expected))
    assert not bomb.exists()


def test_only_the_member_with_the_weights_is_opened(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, real = [], zipfile.ZipFile.open
    monkeypatch.setattr(
        zipfile.ZipFile, "open", lambda self, name, *args, **kw: opened.append(name) or real(self, name, *args, **kw)
    )
    load_weights(make_model().policy, saved)
    assert opened == [WEIGHTS]
