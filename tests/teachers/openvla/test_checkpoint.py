"""OpenVLA's checkpoint folders: what is read, what may be missing, and how a broken one is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch as th
from safetensors.numpy import load_file, save_file

from rpd_sb3.teachers.openvla import loading
from rpd_sb3.teachers.openvla.checkpoint import TEXT_DEFAULTS, Checkpoint, open_checkpoint
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from tests.support.openvla_helpers import FIXTURE, load, make_checkpoint

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
STATISTICS = "dataset_statistics.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("openvla"))


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("openvla_shards"), n_shards=3)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of the test's own; files are to be replaced, not written into."""
    return copy(whole, tmp_path / "tiny")


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    return target


def put(path: Path, content: bytes | str | object) -> None:
    """Replace a file."""
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def change(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    put(path, {key: value for key, value in content.items() if value is not None})


def change_weights(folder: Path, function: Callable[[dict[str, Any]], object], name: str = WEIGHTS) -> None:
    weights = load_file(folder / name)
    function(weights)
    (folder / name).unlink()
    save_file(weights, folder / name)


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(str(folder))


def header(content: object, data: bytes = b"") -> bytes:
    """A safetensors file."""
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def broken(message: str) -> Any:
    """An error of one sentence."""
    return pytest.raises(ValueError, match=rf"^(?s:(?!.*\n).*){message}")


def test_shards_are_the_single_file(whole: Path, in_shards: Path) -> None:
    one, three = load(whole).state_dict(), load(in_shards).state_dict()
    assert one.keys() == three.keys()
    assert all(th.equal(one[name], three[name]) for name in one)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Where tensors that are read from files lie, by name."""
    places: dict[str, int] = {}

    @contextmanager
    def opened(*args: Any, **kwargs: Any) -> Iterator[Any]:
        def get_tensor(name: str) -> th.Tensor:
            tensor = file.get_tensor(name)
            places[name] = tensor.data_ptr()
            return tensor

        with safetensors.safe_open(*args, **kwargs) as file:
            yield SimpleNamespace(get_tensor=get_tensor)

    monkeypatch.setattr(loading, "safe_open", opened)
    return places


UNUSED = [
    "vision_backbone.featurizer.blocks.3.",
    "vision_backbone.fused_featurizer.blocks.2.",
    "vision_backbone.featurizer.norm.",
    "vision_backbone.fused_featurizer.norm.",
    "vision_backbone.fused_featurizer.attn_pool.",
]


def test_what_inference_never_uses_is_not_read(whole: Path, read: dict[str, int]) -> None:
    load(whole)
    unused = [name for name in opened(whole).tensors if name not in read]
    assert unused
    assert all(name.startswith(tuple(UNUSED)) for name in unused)
    assert all(any(name.startswith(prefix) for name in unused) for prefix in UNUSED)


@pytest.mark.parametrize("prefix", UNUSED[2:])
def test_what_inference_never_uses_may_be_missing(whole: Path, folder: Path, prefix: str) -> None:
    def drop(weights: dict[str, Any]) -> None:
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]

    change_weights(folder, drop)
    expected, actual = load(whole).state_dict(), load(folder).state_dict()
    assert all(th.equal(expected[name], actual[name]) for name in expected)


def test_weights_of_the_wanted_dtype_are_not_copied(whole: Path, read: dict[str, int]) -> None:
    weights = dict(load(whole).named_parameters())
    assert weights
    assert all(weight.data_ptr() == read[name] for name, weight in weights.items())


def test_the_model_has_no_other_memory_than_its_weights(whole: Path) -> None:
    """Nothing is left of the model that was laid out before they were read."""
    model = load(whole)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(buffer.numel() for buffer in model.buffers()) < 100
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_have_the_dtype_that_is_asked_for_and_frequencies_stay_float32(whole: Path, dtype: str) -> None:
    model = loading.load_model(opened(whole), th.device("cpu"), loading.DTYPES[dtype])
    assert {weight.dtype for weight in model.parameters()} == {loading.DTYPES[dtype]}
    assert model.language_model.model.rotary_emb.inv_freq.dtype == th.float32


def test_what_a_published_config_leaves_out_is_filled_in(folder: Path) -> None:
    change(folder / CONFIG, text_config={"model_type": "llama", "pad_token_id": 32000, "vocab_size": 32064})
    checkpoint = opened(folder)
    assert dict(checkpoint.text_config) == TEXT_DEFAULTS
    assert checkpoint.text_config["rms_norm_eps"] == 1e-6
    assert checkpoint.text_config["hidden_size"] == 4096
    assert (checkpoint.n_bins, checkpoint.first_unused_id) == (256, 32000)


def test_what_the_config_says_replaces_the_defaults(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(folder / CONFIG, text_config=config["text_config"] | {"rms_norm_eps": 1e-5, "vocab_size": 32128})
    checkpoint = opened(folder)
    assert checkpoint.text_config["rms_norm_eps"] == 1e-5
    assert checkpoint.first_unused_id == 32064


def stats(low: list[float], high: list[float], **more: Any) -> dict[str, Any]:
    return {"action": {"q01": low, "q99": high, **more}}


def test_the_statistics_of_a_fine_tuned_model_replace_those_of_the_base(folder: Path) -> None:
    put(folder / STATISTICS, {"mine": stats([-0.5, 0.0], [0.5, 1.0], mask=[True, False])})
    assert opened(folder).statistics(None) == ("mine", (-0.5, -1.0), (0.5, 1.0))
    with broken("has no unnorm_key 'toy_kitchen', only mine"):
        opened(folder).statistics("toy_kitchen")


def test_without_a_mask_all_dimensions_are_normalized(folder: Path) -> None:
    put(folder / STATISTICS, {"mine": stats([-0.5, 0.0], [0.5, 1.0])})
    assert opened(folder).statistics("mine") == ("mine", (-0.5, 0.0), (0.5, 1.0))


def test_an_unknown_dataset_is_answered_with_the_closest(folder: Path) -> None:
    with broken("has no unnorm_key 'toy_kichen', only toy_kitchen; did you mean 'toy_kitchen'"):
        OpenVLATeacher(str(folder), device="cpu", unnorm_key="toy_kichen")


def test_one_of_several_datasets_has_to_be_chosen(folder: Path) -> None:
    put(folder / STATISTICS, {"a": stats([0], [1]), "b": stats([0], [2])})
    assert opened(folder).statistics("b").high == (2.0,)
    with broken("was trained on several datasets: choose unnorm_key, one of a, b$"):
        opened(folder).statistics(None)


@pytest.mark.parametrize(
    "wrong",
    [
        stats([float("nan")], [1.0]),
        stats([0.0, 0.0], [1.0]),
        stats([0.0], [1.0], mask=[True, False]),
        stats([], []),
        stats(["low"], [1.0]),  # type: ignore[list-item]
        {"proprio": {}},
        [],
    ],
)
def test_statistics_that_cannot_be_used_are_refused(folder: Path, wrong: object) -> None:
    put(folder / STATISTICS, {"mine": wrong})
    with broken("the statistics of 'mine' cannot be used: "):
        opened(folder).statistics(None)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, content: bytes | str | object) -> Callable[[Path], None]:
    return lambda folder: put(folder / name, content)


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / CONFIG, **changes)


def truncate(folder: Path) -> None:
    put(folder / WEIGHTS, (folder / WEIGHTS).read_bytes()[:-1])


BROKEN: list[tuple[Callable[[Path], None], str]] = [
    (remove(CONFIG), "has no config.json: it is not a complete OpenVLA checkpoint"),
    (write(CONFIG, "{"), "config.json is not valid JSON"),
    (write(CONFIG, []), "config.json must hold a JSON object, but holds a list"),
    (config(model_type="llama"), "has model_type='llama'; an OpenVLA checkpoint has 'openvla'"),
    (config(arch_specifier=None), "has arch_specifier=None"),
    (config(text_config=None), "config.json has no text_config"),
    (config(norm_stats=None), "has no norm_stats in config.json and no dataset_statistics.json"),
    (config(norm_stats=["toy_kitchen"]), "the statistics of 'toy_kitchen' cannot be used"),
    (remove("tokenizer.json"), "has no tokenizer.json"),
    (write("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    (write("preprocessor_config.json", {}), "tvf_normalize_params cannot be used: KeyError"),
    (
        write("preprocessor_config.json", {"tvf_normalize_params": [{"mean": [0, 0, 0], "std": [1, 1, 1]}]}),
        "expected 2 towers of 3 channels",
    ),
    (remove(WEIGHTS), "lacks model.safetensors, 1 of 1 files of weights"),
    (truncate, "is not a safetensors file, or an incomplete one .*: copy it again"),
    (
        write(WEIGHTS, header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))),
        "has no complete vision tower vision_backbone.featurizer",
    ),
]


@pytest.mark.parametrize(("break_it", "message"), BROKEN)
def test_a_broken_checkpoint_is_refused_in_one_sentence(
    folder: Path, break_it: Callable[[Path], None], message: str
) -> None:
    break_it(folder)
    with broken(message):
        OpenVLATeacher(str(folder), device="cpu")


SHARD = "model-00002-of-00003.safetensors"


def lose_a_tensor(folder: Path) -> None:
    change_weights(folder, lambda weights: weights.pop(min(weights)), SHARD)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (remove(SHARD), f"lacks {SHARD}, 1 of 3 files of weights"),
        (lose_a_tensor, f"{SHARD} lacks the tensor"),
        (write(INDEX, {"metadata": {}}), "index.json has no weight_map"),
        (write(INDEX, {"weight_map": {"a": 5}}), "index.json has no weight_map"),
    ],
)
def test_broken_shards_are_refused(
    in_shards: Path, tmp_path: Path, break_it: Callable[[Path], None], message: str
) -> None:
    folder = copy(in_shards, tmp_path / "tiny")
    break_it(folder)
    with broken(message):
        opened(folder)


@pytest.mark.parametrize("name", ["language_model.lm_head.weight", "vision_backbone.featurizer.blocks.1.attn.qkv.bias"])
def test_a_missing_weight_is_named(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.pop(name))
    with broken(f"tiny lacks 1 of 101 weights, e.g. {name}$"):
        load(folder)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_tower_without_what_tells_its_size_is_incomplete(folder: Path, name: str) -> None:
    change_weights(folder, lambda weights: weights.pop(f"vision_backbone.fused_featurizer.{name}"))
    with broken(f"has no complete vision tower vision_backbone.fused_featurizer: .*{name}' is missing$"):
        load(folder)


def test_a_weight_of_another_shape_is_named(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(folder / CONFIG, text_config=config["text_config"] | {"vocab_size": 32128})
    with broken(r"has the shape \(32064, 64\), but config and other weights need \(32128, 64\)"):
        load(folder)


@pytest.mark.parametrize("path", ["/no/such/folder", "./org/name", "name", "a/b/c", "org/"])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(path: str) -> None:
    with broken("there is no folder .*; give an OpenVLA checkpoint's folder"):
        open_checkpoint(path)


def test_a_hub_id_that_cannot_be_had_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def no_network(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network\nand a long explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with broken("there is no folder 'org/name', and as a hub id it cannot be downloaded: no network$"):
        open_checkpoint("org/name")


def test_a_hub_id_is_looked_up_in_the_cache_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with broken("there is no folder 'no-such-org/no-such-name', and as a hub id it cannot be downloaded: "):
        open_checkpoint("no-such-org/no-such-name")


def test_a_hub_id_is_downloaded_without_what_is_not_needed(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(name: str, allow_patterns: list[str]) -> str:
        assert (name, allow_patterns) == ("org/name", ["*.json", "*.safetensors"])
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("org/name").folder == whole


def test_the_fixture_has_no_weights() -> None:
    assert not list(FIXTURE.glob("*.safetensors"))
