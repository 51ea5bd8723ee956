"""OpenVLA on a GPU: the same answers as on the CPU, recorded or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch as th

from rpd_sb3.contract.teacher import Labels
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from tests.support.openvla_helpers import goldens, question, tokens_of

pytestmark = pytest.mark.skipif(not th.cuda.is_available(), reason="no GPU")


def expected(rows: list[tuple[int, int]]) -> Labels:
    at = [i for i, _ in rows], [j for _, j in rows]
    return {"action": goldens()["actions"][at], "logits": goldens()["logits"][at][..., ::-1]}


MIXED = [(4, 0), (5, 2), (4, 1), (5, 1), (4, 2)]
SAME = [(4, 1), (5, 1)]


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("rows", [MIXED, SAME])
@pytest.mark.parametrize("scored", [True, False])
def test_float32_answers_are_upstreams(folder: Path, graphs: bool, rows: list[tuple[int, int]], scored: bool) -> None:
    tokens = 31999 - tokens_of(rows) if scored else None
    teacher = OpenVLATeacher(str(folder), device="cuda", dtype="fp32", cuda_graphs=graphs, image_size=None)
    for _ in range(2):  # the recording, and a replay
        labels = teacher.label(question(rows, tokens))
        assert np.abs(labels["action"] - expected(rows)["action"]).max() < 1e-6
        assert np.abs(labels["logits"] - expected(rows)["logits"]).max() < 5e-4
    teacher.close()


def test_a_graph_is_replayed_with_new_inputs(folder: Path) -> None:
    teacher = OpenVLATeacher(str(folder), device="cuda", dtype="fp32", image_size=None)
    for rows in ([(4, 0)], [(5, 0)], [(4, 0)]):
        labels = teacher.label(question(rows))
        assert np.abs(labels["logits"] - expected(rows)["logits"]).max() < 5e-4
    teacher.close()


def test_samples_differ_from_answer_to_answer(folder: Path) -> None:
    teacher = OpenVLATeacher(str(folder), device="cuda", dtype="fp32", n_samples=16, image_size=None)
    first, second = (teacher.label(question(SAME)) for _ in range(2))
    assert np.array_equal(first["logits"], second["logits"])
    assert not np.array_equal(first["std"], second["std"])
    again = OpenVLATeacher(str(folder), device="cuda", dtype="fp32", n_samples=16, image_size=None, cuda_graphs=False)
    assert again.label(question(SAME))["std"].shape == first["std"].shape
    teacher.close()
    again.close()


def test_tensor_resize_deviates_little(folder: Path) -> None:
    teacher = OpenVLATeacher(str(folder), device="cuda", dtype="fp32", resize="tensor", image_size=None)
    deviation = np.abs(teacher.label(question(MIXED))["logits"] - expected(MIXED)["logits"]).max()
    print(f"resize on the GPU: logits deviate by up to {deviation:.2e}")
    assert deviation < 0.05
    teacher.close()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_agrees_mostly(folder: Path, dtype: str) -> None:
    teacher = OpenVLATeacher(str(folder), device="cuda", dtype=dtype, image_size=None)
    labels, wanted = teacher.label(question(MIXED)), expected(MIXED)["logits"]
    agreement = (labels["logits"].argmax(-1) == wanted.argmax(-1)).mean()
    print(f"{dtype}: {agreement:.0%} of tokens as in float32")
    assert agreement > 0.5
    assert np.abs(labels["logits"][:, 0] - wanted[:, 0]).max() < 1.0  # the first token's, before choices differ
    teacher.close()
