"""What is written in each format acts as SB3's predict does, and holds no pickle."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy

from rpd_sb3.contract.bins import Bounds, to_actions
from rpd_sb3.export.deploy import DeployablePolicy, camera_view, check_exportable, input_specs, numbers_of_parameters
from rpd_sb3.export.formats import load_torch, torch_act, write_onnx, write_torch
from rpd_sb3.students import TokenPolicy
from tests.export.conftest import Exported
from tests.support import ROOT
from tests.support.export_helpers import ACTION, IMAGE, POLICIES, STATE, TOKENS, make_policy, observations
from tests.support.packages import BLOCK

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def predict(policy: ActorCriticPolicy, batch: dict[str, np.ndarray]) -> np.ndarray:
    """SB3's own answer; it takes images channels last, too."""
    obs: Any = batch if isinstance(policy.observation_space, spaces.Dict) else next(iter(batch.values()))
    return policy.predict(obs, deterministic=True)[0]


@pytest.fixture
def archive(exported: Exported) -> Path:
    """A policy that sees an image and a state, as PyTorch archive."""
    return exported(write_torch, "both")


def graph_of(path: Path) -> Any:
    return onnx.load(path).graph


@pytest.mark.parametrize("kind", POLICIES)
def test_onnx_acts_as_sb3_predicts(kind: str, exported: Exported) -> None:
    policy = POLICIES[kind]()
    session = onnxruntime.InferenceSession(exported(write_onnx, kind), providers=["CPUExecutionProvider"])
    batch = observations(input_specs(policy.observation_space))
    expected = predict(policy, batch)
    assert len(np.unique(expected)) >= 2
    if kind == "vector":  # some are clipped
        assert 0 < (np.isclose(expected, ACTION.low) | np.isclose(expected, ACTION.high)).mean() < 1
    for rows in (slice(None), *(slice(i, i + 1) for i in range(3))):
        (action,) = session.run(None, {name: array[rows] for name, array in batch.items()})
        assert (action.dtype, action.shape) == (expected.dtype, expected[rows].shape)
        np.testing.assert_allclose(action, expected[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["compact", "image", "both", "autoregressive"])
def test_pt2_acts_as_sb3_predicts_and_unpickles_nothing(kind: str, exported: Exported) -> None:
    policy = POLICIES[kind]()
    specs = input_specs(policy.observation_space)
    path = exported(write_torch, kind)
    forbidden = mock.Mock(side_effect=AssertionError("something is unpickled"))
    with (
        mock.patch("pickle.load", forbidden),
        mock.patch("pickle.loads", forbidden),
        mock.patch("pickle.Unpickler", forbidden),
        mock.patch("torch._weights_only_unpickler.load", forbidden),
    ):
        act = torch_act(load_torch(path), specs)
    batch = observations(specs)
    np.testing.assert_allclose(act(batch)["action"], predict(policy, batch), atol=1e-5, rtol=0)


def test_pt2_runs_without_this_library(exported: Exported, tmp_path: Path) -> None:
    policy = POLICIES["vector"]()
    shutil.copy(exported(write_torch, "vector"), tmp_path)
    batch = observations(input_specs(policy.observation_space))
    np.save(tmp_path / "obs.npy", batch["state"])
    code = BLOCK.format(absent=["rpd_sb3", "stable_baselines3", "gymnasium"]) + (
        "import numpy as np, torch\n"
        "policy = torch.export.load('policy.pt2').module()\n"
        "np.save('action.npy', policy(torch.from_numpy(np.load('obs.npy')))[0].detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=60)
    np.testing.assert_allclose(np.load(tmp_path / "action.npy"), predict(policy, batch), atol=1e-5, rtol=0)


Members = dict[str, bytes]


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def _pickled_weight(members: Members) -> None:
    """A pickle that does not look like one, and a configuration that asks for it."""
    config = json.loads(members["data/weights/model_weights_config.json"])
    next(iter(config["config"].values()))["use_pickle"] = True
    members["data/weights/model_weights_config.json"] = json.dumps(config).encode()
    members["data/weights/weight_0"] = pickle.dumps(Evil(), protocol=2) + b"\n"


def _pickled_constant(members: Members) -> None:
    config = {"config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}}}
    members["data/constants/model_constants_config.json"] = json.dumps(config).encode()
    members["data/constants/opaque_obj_0"] = pickle.dumps(Evil())


def _changed(old: str, new: str) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        graph = members["models/model.json"].decode()
        assert old in graph
        members["models/model.json"] = graph.replace(old, new).encode()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pickled_weight, "weight_0"),
        (_pickled_constant, "opaque_obj_0"),
        (lambda members: members.update({"data/weights/model.pt": pickle.dumps(Evil())}), "data/weights/model.pt"),
        (lambda members: members.update({"data/sample_inputs/model.pt": pickle.dumps(Evil())}), "sample_inputs"),
        (_changed("Symbol(", "__import__('pathlib').Path('ran').touch("), "__import__"),
        (_changed("L['inputs'][1]", "__import__('pathlib').Path('ran').touch()"), "__import__"),
        (_changed("torch.ops.aten.relu.default", "torch.os.system"), "torch.os.system"),
        (_changed("torch.ops.aten.relu.default", "torch.ops.aten.from_file.default"), "from_file"),
        (_changed("builtins.dict", "collections.defaultdict"), "collections.defaultdict"),
        (_changed('\\"type\\": \\"builtins.dict', '\\"\\\\u0074ype\\":\\"os.path'), "os.path"),
        (lambda members: members.pop("models/model.json"), "can load"),
    ],
)
def test_archive_that_could_run_code_is_refused(
    change: Callable[[Members], Any], message: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(archive) as file:
        members = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    change(members)
    with zipfile.ZipFile("policy.pt2", "w") as file:
        for name, content in members.items():
            file.writestr(f"policy/{name}", content)
    with pytest.raises(ValueError, match=message):
        load_torch(Path("policy.pt2"))(*(th.zeros(1, 36, 40, 3, dtype=th.uint8), th.zeros(1, 5)))
    assert not Path("ran").exists()


def test_archive_with_two_members_of_a_name_is_refused(archive: Path, tmp_path: Path) -> None:
    """Readers of zip files differ in which of them they take."""
    twice = shutil.copy(archive, tmp_path / "policy.pt2")
    with zipfile.ZipFile(twice, "a") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("policy/models/model.json", b"{}")
    with pytest.raises(ValueError, match="models/model.json"):
        load_torch(twice)


@pytest.mark.parametrize("kind", ["tokens", "autoregressive"])
@pytest.mark.parametrize("bounds", [None, Bounds(np.array([-0.1, 1.0, -2.0]), np.array([0.1, -1.0, 2.0]))])
def test_tokens_become_the_actions_that_the_environment_takes(kind: str, bounds: Bounds | None) -> None:
    policy = POLICIES[kind]()
    specs = input_specs(policy.observation_space)
    batch = observations(specs, n=64)
    tokens = predict(policy, batch)
    with th.no_grad():
        action, chosen = DeployablePolicy(policy, True, bounds)(th.from_numpy(batch["state"]))
    assert np.array_equal(chosen.numpy(), tokens)
    assert np.array_equal(action.numpy(), to_actions(tokens, 8, bounds).clip(-1.0, 1.0))  # as ActionTokens acts


def test_image_graph_is_small(exported: Exported) -> None:
    """One transposition and one cast, for the image; weights of the value function are left out."""
    policy = POLICIES["image"]()
    path = exported(write_onnx, "image")
    operators = [node.op_type for node in graph_of(path).node]
    assert (operators.count("Cast"), operators.count("Transpose"), operators.count("Conv")) == (1, 1, 3)
    assert len(operators) <= 17
    numbers = numbers_of_parameters(DeployablePolicy(policy), policy)
    assert numbers["policy"] < numbers["total"] == sum(parameter.numel() for parameter in policy.parameters())
    assert path.stat().st_size < 4 * numbers["policy"] + 5000


def test_graph_has_named_inputs_and_any_batch(exported: Exported) -> None:
    graph = graph_of(exported(write_onnx, "both"))
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"rgb": ["batch", 36, 40, 3], "state": ["batch", 5], "action": ["batch", 3]}


@pytest.mark.parametrize("write", [write_onnx, write_torch])
def test_no_path_of_this_machine_is_written(write: Any, exported: Exported) -> None:
    content = exported(write, "vector").read_bytes()
    assert str(ROOT).encode() not in content
    assert b".py" not in content


def test_camera_view_puts_channels_last() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 36, 40), np.uint8)
    assert np.array_equal(camera_view(image, IMAGE), image.transpose(0, 2, 3, 1))
    last = spaces.Box(0, 255, (36, 40, 3), np.uint8)
    assert camera_view(image.transpose(0, 2, 3, 1), last).shape == (2, 36, 40, 3)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            lambda: RecurrentActorCriticPolicy(STATE, ACTION, lambda _: 1.0),
            "m.zip is recurrent: its action depends on what",
        ),
        (
            lambda: make_policy(TokenPolicy, STATE, TOKENS, eval_temperature=0.5),
            "draws its tokens at random, eval_temp.*=0.5",
        ),
        (lambda: make_policy(ActorCriticPolicy, spaces.Discrete(3), ACTION), r"observes 'state' as Discrete\(3\)"),
        (lambda: th.nn.Linear(1, 1), "m.zip has a Linear, an export needs an actor-critic policy"),
    ],
)
def test_what_cannot_be_exported(policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_exportable(SimpleNamespace(policy=policy()), "m.zip")  # type: ignore[arg-type]
