"""The OpenVLA model against what upstream's code answered, and what the comparison would catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from rpd_sb3.contract.bins import to_actions
from rpd_sb3.teachers.openvla import images as openvla_images
from rpd_sb3.teachers.openvla import loading
from rpd_sb3.teachers.openvla.checkpoint import open_checkpoint
from rpd_sb3.teachers.openvla.images import Preprocessor
from rpd_sb3.teachers.openvla.model import Batch, Noise, OpenVLAModel, batch_texts
from rpd_sb3.teachers.openvla.text import Prompts
from tests.support.openvla_helpers import (
    FEW,
    ROWS,
    TOLERANCES,
    Answers,
    answers,
    batch_of,
    goldens,
    images,
    instructions,
    load,
    preprocess,
    prompts,
    tokens_of,
)

CPU = th.device("cpu")


@pytest.fixture(scope="module")
def model(folder: Path) -> OpenVLAModel:
    return load(folder)


@pytest.fixture(scope="module")
def all_rows(folder: Path, model: OpenVLAModel) -> Answers:
    """The answers to all 18 rows in one batch."""
    return answers(model, batch_of(folder, ROWS))


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_mixed_batch_is_answered_as_upstream_answers_one_by_one(all_rows: Answers, name: str) -> None:
    assert all_rows.deviations(ROWS)[name] <= TOLERANCES[name]


def test_all_pixels_are_upstreams(all_rows: Answers) -> None:
    wanted = goldens()["pixel_sums"][[i for i, _ in ROWS]]
    np.testing.assert_allclose(all_rows.pixels.double().sum((2, 3)).numpy(), wanted, rtol=0, atol=1e-9)


def test_tokens_are_upstreams(all_rows: Answers) -> None:
    np.testing.assert_array_equal(all_rows.ids.numpy(), tokens_of(ROWS))


def test_the_best_of_all_other_logits_is_upstreams(all_rows: Answers) -> None:
    others = all_rows.logits.clone()
    others[..., 31744:32000] = -np.inf
    wanted = np.stack([goldens()["other_max_logit"][row] for row in ROWS])
    assert np.abs(others.amax(-1).numpy() - wanted).max() <= TOLERANCES["logits"]


def test_prompts_are_upstreams_token_ids(folder: Path) -> None:
    given, lengths = goldens()["input_ids"], goldens()["input_lens"]
    for j, ids in enumerate(prompts(folder, [(0, 0), (0, 1), (0, 2)])):
        assert ids == tuple(given[j, : lengths[j]])


def test_the_token_before_the_actions_is_not_doubled(folder: Path) -> None:
    """Where a trailing space in the template yields it already."""
    make = Prompts(folder / "tokenizer.json")
    known = make("lift the cube")
    tokenizer = make._tokenizer

    class WithSpace:
        def encode(self, text: str) -> object:
            return tokenizer.encode(f"{text} ")

    make._tokenizer = WithSpace()
    make._known.cache_clear()
    assert make("lift the cube") == known


def test_a_batch_is_one_row_at_a_time(folder: Path, model: OpenVLAModel, all_rows: Answers) -> None:
    for k in range(0, len(ROWS), 4):
        alone = answers(model, batch_of(folder, ROWS[k : k + 1]))
        assert (alone.logits[0] - all_rows.logits[k]).abs().max() <= 5e-4
        assert th.equal(alone.ids[0], all_rows.ids[k])


def test_permuted_rows_have_permuted_answers(folder: Path, model: OpenVLAModel) -> None:
    order = [4, 0, 5, 2, 1, 3]
    straight = answers(model, batch_of(folder, FEW))
    permuted = answers(model, batch_of(folder, [FEW[k] for k in order]))
    assert (permuted.logits - straight.logits[order]).abs().max() <= 5e-4
    assert th.equal(permuted.ids, straight.ids[order])


@th.inference_mode()
def test_an_end_of_sequence_token_does_not_stop_the_others(folder: Path, model: OpenVLAModel) -> None:
    wanted = goldens()
    ids = Prompts(folder / "tokenizer.json")(str(wanted["odd_instruction"]))
    assert ids == tuple(wanted["odd_input_ids"])
    batch = Batch(preprocess(folder, [(int(wanted["odd_image"]), 0)]), *batch_texts([ids], CPU))
    tokens, logits = model.generate(model.read(batch, 6), 7)
    np.testing.assert_array_equal(tokens[0].numpy(), wanted["odd_tokens_no_stop"])
    assert np.abs(logits[0, :, 31744:32000].numpy() - wanted["odd_logits_no_stop"]).max() <= TOLERANCES["logits"]
    assert np.abs(logits[0, :, 2].numpy() - wanted["odd_eos_logits_no_stop"]).max() <= TOLERANCES["logits"]


def test_ids_that_are_no_actions_stand_for_the_nearer_end_as_upstream_has_it() -> None:
    actions = to_actions(np.clip(31999 - goldens()["detok_ids"], 0, 255), 256)
    np.testing.assert_allclose(actions, goldens()["detok_norm"], rtol=0, atol=1e-7)


# Each of these is a mistake that somebody could make. Tokens alone would not show half of them.
Break = Callable[[Path, pytest.MonkeyPatch], Answers]


def answered(folder: Path, model: OpenVLAModel | None = None, **changed: object) -> Answers:
    """The answers to a few rows, with other ``pixels`` or ``ids`` of the prompts."""
    pixels, ids = changed.get("pixels"), changed.get("ids")
    pixels = preprocess(folder, FEW) if pixels is None else pixels
    texts = batch_texts(prompts(folder, FEW) if ids is None else ids, CPU)  # type: ignore[arg-type]
    return answers(model or load(folder), Batch(pixels, *texts))  # type: ignore[arg-type]


def epsilon(kind: type[nn.Module]) -> Break:
    def broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
        model = load(folder)
        norms = [module for module in model.modules() if isinstance(module, kind)]
        assert norms
        for norm in norms:
            norm.eps = 1e-5
        return answered(folder, model)

    return broken


def tanh_gelu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    model = load(folder)
    for block in model.vision_backbone.fused_featurizer.blocks:
        mlp = block.mlp
        mlp.forward = lambda x, mlp=mlp: mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh"))  # type: ignore[assignment]
    return answered(folder, model)


def exact_statistics(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    statistics = [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3)]
    make = Preprocessor(statistics, CPU, th.float32)
    return answered(folder, pixels=th.cat([make(image[None]) for image in images(FEW)]))


def depth(width: int, more: int) -> Break:
    def broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
        real = loading.tower_shape

        def shape(*args: object) -> object:
            found = real(*args)  # type: ignore[arg-type]
            return found._replace(depth=found.depth + more) if found.width == width else found

        monkeypatch.setattr(loading, "tower_shape", shape)
        return answered(folder)

    return broken


def final_norm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    model = load(folder)
    tower = model.vision_backbone.featurizer
    real = tower.forward
    tower.forward = lambda pixels: F.layer_norm(real(pixels), (64,), eps=1e-6)  # type: ignore[assignment]
    return answered(folder, model)


def swapped_pixels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    return answered(folder, pixels=preprocess(folder, FEW).roll(3, dims=1))


def swapped_features(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    model = load(folder)
    real = model.vision_backbone.forward
    model.vision_backbone.forward = lambda pixels: real(pixels).roll(128, dims=-1)  # type: ignore[assignment]
    return answered(folder, model)


def patches_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    model = load(folder)
    real = model._embed

    def embed(*args: object) -> object:
        embeddings, real_tokens, positions = real(*args)  # type: ignore[arg-type]
        return th.cat([embeddings[:, 1:257], embeddings[:, :1], embeddings[:, 257:]], 1), real_tokens, positions

    model._embed = embed  # type: ignore[assignment, method-assign]
    return answered(folder, model)


def no_token_before_actions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    return answered(folder, ids=[ids[:-1] for ids in prompts(folder, FEW)])


class AsWritten(str):
    """Text that stays as it is."""

    def lower(self) -> str:
        return str(self)


def not_lower_cased(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    make = Prompts(folder / "tokenizer.json")
    return answered(folder, ids=[make(AsWritten(text)) for text in instructions(FEW)])


def one_pass_resize(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    def resize(image: np.ndarray) -> np.ndarray:
        x = th.from_numpy(image).permute(2, 0, 1)[None].float()
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).round().clamp(0, 255)
        return x.to(th.uint8)[0].permute(1, 2, 0).numpy()

    monkeypatch.setattr(openvla_images, "_resize_with_pil", resize)
    return answered(folder)


def text_config(**changes: object) -> Break:
    def broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
        checkpoint = open_checkpoint(str(folder))
        checkpoint = replace(checkpoint, text_config=dict(checkpoint.text_config) | changes)
        return answered(folder, loading.load_model(checkpoint, CPU, th.float32))

    return broken


def unmasked_pads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Answers:
    batch = batch_of(folder, FEW)
    assert batch.real is not None
    return answers(load(folder), batch._replace(real=th.ones_like(batch.real)))


BREAKS: dict[str, tuple[Break, str]] = {
    "epsilon of RMSNorm 1e-5": (epsilon(nn.RMSNorm), "last_hidden"),
    "epsilon of RMSNorm 1e-5 in the config": (text_config(rms_norm_eps=1e-5), "last_hidden"),
    "epsilon of LayerNorm 1e-5": (epsilon(nn.LayerNorm), "vision_features"),
    "tanh GELU in SigLIP": (tanh_gelu, "vision_features"),
    "ImageNet's statistics unrounded": (exact_statistics, "pixels"),
    "one DINOv2 block more": (depth(64, 1), "vision_features"),
    "one DINOv2 block fewer": (depth(64, -1), "vision_features"),
    "one SigLIP block more": (depth(128, 1), "vision_features"),
    "one SigLIP block fewer": (depth(128, -1), "vision_features"),
    "a norm after the last block": (final_norm, "vision_features"),
    "the towers' pixels swapped": (swapped_pixels, "pixels"),
    "the towers' features swapped": (swapped_features, "vision_features"),
    "patches before BOS": (patches_first, "last_hidden"),
    "no 29871 before the actions": (no_token_before_actions, "last_hidden"),
    "instructions not lower-cased": (not_lower_cased, "last_hidden"),
    "resize in one pass": (one_pass_resize, "pixels"),
    "another RoPE theta": (text_config(rope_theta=5e5), "last_hidden"),
    "pads not masked": (unmasked_pads, "last_hidden"),
}
"""The mistake, and the first quantity that shows it."""


@pytest.mark.parametrize("name", BREAKS)
def test_the_comparison_catches(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken, shown_by = BREAKS[name]
    deviations = broken(folder, monkeypatch).deviations(FEW)
    wrong = [key for key in TOLERANCES if not deviations[key] <= 2 * TOLERANCES[key]]
    assert wrong[0] == shown_by
    assert wrong[-1] == "logits"


def test_the_comparison_of_a_few_rows_holds_without_a_mistake(folder: Path) -> None:
    deviations = answered(folder).deviations(FEW)
    assert all(deviations[key] <= TOLERANCES[key] for key in TOLERANCES), deviations


@pytest.mark.parametrize("rows", [FEW, [(0, 1), (1, 1)]], ids=["mixed", "alike"])
class TestScoring:
    """Of given tokens, for prompts of different lengths and of the same."""

    @pytest.fixture
    def batch(self, folder: Path, rows: list[tuple[int, int]]) -> Batch:
        return batch_of(folder, rows)

    @th.inference_mode()
    def test_own_tokens_have_the_logits_of_generation(self, model: OpenVLAModel, batch: Batch) -> None:
        prompted = model.read(batch, 6)
        ids, logits = model.generate(prompted, 7)
        assert (model.score(prompted, ids) - logits).abs().max() <= TOLERANCES["logits"]

    @th.inference_mode()
    def test_any_tokens_have_the_logits_of_training(self, model: OpenVLAModel, batch: Batch) -> None:
        tokens = th.from_numpy(np.random.default_rng(0).integers(31744, 32000, (len(batch.bos), 7)))
        scored = model.score(model.read(batch, 6), tokens)
        assert scored.dtype == th.float32
        assert (scored - model(batch, tokens)).abs().max() <= TOLERANCES["logits"]

    @th.inference_mode()
    def test_a_score_depends_on_earlier_tokens_only(self, model: OpenVLAModel, batch: Batch) -> None:
        prompted = model.read(batch, 6)
        tokens = th.full((len(batch.bos), 7), 31900)
        other = tokens.clone()
        other[:, 3] = 31800
        changed = (model.score(prompted, tokens) - model.score(prompted, other)).abs().amax((0, 2)) > 1e-2
        assert changed.tolist() == [False] * 4 + [True] * 3

    @th.inference_mode()
    def test_read_prompts_can_be_used_again(self, model: OpenVLAModel, batch: Batch) -> None:
        prompted = model.read(batch, 6)
        before = model.generate(prompted, 7)
        tokens = th.full((len(batch.bos), 7), 31900)
        scores = model.score(prompted, tokens)
        for ours, theirs in zip(model.generate(prompted, 7), before):
            assert th.equal(ours, theirs)
        assert th.equal(model.score(prompted, tokens), scores)

    @th.inference_mode()
    def test_repeated_prompts_are_answered_alike_and_apart(self, model: OpenVLAModel, batch: Batch) -> None:
        prompted = model.read(batch, 6)
        ids, logits = model.generate(prompted, 7)
        repeated_ids, repeated_logits = model.generate(prompted.repeated(3), 7)
        assert th.equal(repeated_ids, ids.repeat_interleave(3, dim=0))
        assert (repeated_logits - logits.repeat_interleave(3, dim=0)).abs().max() <= 5e-4
        assert th.equal(model.generate(prompted, 7)[0], ids)


def test_samples_are_drawn_from_the_softmax() -> None:
    """Share of each of 5 ids in 40000 draws, within 5 standard deviations."""
    logits = th.tensor([9.0, 1.0, 0.0, 2.0, -1.0, 1.5, 9.0])
    noise = Noise(1, 5, 2.0, th.Generator().manual_seed(0))
    n = 40_000
    ids = noise.sample(logits.expand(n, -1))
    wanted = th.softmax(logits[1:6] / 2.0, 0).numpy()
    shares = np.bincount(ids.numpy(), minlength=7) / n
    assert shares[0] == shares[6] == 0
    assert (np.abs(shares[1:6] - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / n)).all()


@th.inference_mode()
def test_sampled_first_tokens_follow_the_models_softmax(folder: Path, model: OpenVLAModel) -> None:
    n, prompted = 1000, model.read(batch_of(folder, [(0, 0)]), 0)
    noise = Noise(31744, 31999, 2.0, th.Generator().manual_seed(0))
    ids, logits = model.generate(prompted.repeated(n), 1, noise)
    wanted = th.softmax(logits[0, 0, 31744:32000] / 2.0, 0).double().numpy()
    shares = np.bincount(ids[:, 0].numpy() - 31744, minlength=256) / n
    assert (np.abs(shares - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / n) + 1 / n).all()
    assert wanted.max() > 0.05, "the softmax is far from uniform"


@th.inference_mode()
def test_only_actions_are_sampled(folder: Path, model: OpenVLAModel) -> None:
    prompted = model.read(batch_of(folder, FEW), 6).repeated(8)
    noise = Noise(31744, 31999, 100.0, th.Generator().manual_seed(0))
    ids, _ = model.generate(prompted, 7, noise)
    assert 31744 <= int(ids.min()) < 31800
    assert 31950 < int(ids.max()) <= 31999
