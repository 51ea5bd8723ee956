"""OctoTeacher against octo itself, on a real checkpoint. In Octo's environment, where there is no PyTorch for conftest.py:

``OCTO_CHECKPOINT=FOLDER python -m pytest --noconftest -m slow tests/teachers/octo/test_golden.py``, where the folder is
octo-base-1.5, a fine-tuned one, or a small random one of its structure.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from rpd_sb3.contract.teacher import Query
from rpd_sb3.teachers.octo import OctoTeacher
from rpd_sb3.teachers.octo.sampler import sample_keys

PATH = os.environ.get("OCTO_CHECKPOINT", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PATH, reason="OCTO_CHECKPOINT names no checkpoint")]

SEED = 7
INSTRUCTIONS = ("pick up the red cube", "push the blue cube to the goal")
TOLERANCE = 1e-3
"""Twenty steps of diffusion amplify the last bits, in which products of different batches differ: 6e-4 at most was seen
in 0.4 % of the values of octo's own samples."""
MEDIAN = 1e-5


@pytest.fixture(scope="module")
def model() -> Any:
    return pytest.importorskip("octo.model.octo_model").OctoModel.load_pretrained(PATH)


@pytest.fixture(scope="module")
def unnorm_key(model: Any) -> str | None:
    return None if "action" in model.dataset_statistics else sorted(model.dataset_statistics)[0]


def make(unnorm_key: str | None, **kwargs: Any) -> OctoTeacher:
    return OctoTeacher(PATH, unnorm_key=unnorm_key, seed=SEED, warm_up=False, **kwargs)


def images(n: int, size: int = 256) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def query(pictures: np.ndarray, env_ids: Any = None, start: bool = True, wrist: np.ndarray | None = None) -> Query:
    n = len(pictures)
    ids = np.arange(n) if env_ids is None else np.asarray(env_ids)
    inputs = {"images.human": pictures, "instruction": np.array([INSTRUCTIONS[i % 2] for i in ids])}
    if wrist is not None:
        inputs["images.hand"] = wrist
    return Query(inputs, ids, np.full(n, start))


def octos_own(
    model: Any,
    unnorm_key: str | None,
    pictures: np.ndarray,
    env_id: int,
    count: int,
    n_samples: int = 1,
    wrist: np.ndarray | None = None,
) -> np.ndarray:
    """Chunks (S, K, A) of one environment, each by a call of ``sample_actions`` for one image, or one history (T, H, W, 3)."""
    import jax

    statistics = model.dataset_statistics if unnorm_key is None else model.dataset_statistics[unnorm_key]
    keys = sample_keys(jax.random.PRNGKey(SEED), np.array([env_id], np.uint32), np.array([count], np.uint32), n_samples)
    observation = {"image_primary": pictures[None], "timestep_pad_mask": np.ones((1, len(pictures)), bool)}
    if wrist is not None:
        observation["image_wrist"] = wrist[None]
    tasks = model.create_tasks(texts=[INSTRUCTIONS[env_id % 2]])
    calls = [
        model.sample_actions(observation, tasks, unnormalization_statistics=statistics["action"], rng=key)
        for key in keys[0]
    ]
    return np.concatenate([np.asarray(call) for call in calls])


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    difference = np.abs(ours - theirs)
    assert difference.max() < TOLERANCE
    assert np.median(difference) < MEDIAN


def test_action_is_octos_own_sample(model: Any, unnorm_key: str | None) -> None:
    teacher = make(unnorm_key, batch_sizes=(8,))
    pictures = images(5)
    for count in range(2):
        labels = teacher.label(query(pictures))
        theirs = np.stack([octos_own(model, unnorm_key, pictures[i : i + 1], i, count)[0, 0] for i in range(5)])
        assert_close(labels["action"], theirs)
    assert set(labels) == {"action"}


def test_mean_and_std_are_those_of_octos_own_samples(model: Any, unnorm_key: str | None) -> None:
    labels = make(unnorm_key, n_samples=6, std_floor=1e-4, batch_sizes=(4,)).label(query(images(3)))
    theirs = np.stack([octos_own(model, unnorm_key, images(3)[i : i + 1], i, 0, 6)[:, 0] for i in range(3)], axis=1)
    assert_close(labels["action"], theirs.mean(axis=0))
    assert_close(labels["std"], np.maximum(theirs.std(axis=0), 1e-4))


def test_an_answer_does_not_depend_on_its_batch(unnorm_key: str | None) -> None:
    together = make(unnorm_key, n_samples=2, batch_sizes=(1, 8)).label(query(images(5)))
    teacher = make(unnorm_key, n_samples=2, batch_sizes=(1, 8))
    alone = [teacher.label(query(images(5)[i : i + 1], [i])) for i in reversed(range(5))][::-1]
    for name in ("action", "std"):
        assert_close(together[name], np.concatenate([labels[name] for labels in alone]))


def test_padding_changes_no_bit(unnorm_key: str | None) -> None:
    full = make(unnorm_key, batch_sizes=(8,)).label(query(images(8)))["action"]
    padded = make(unnorm_key, batch_sizes=(8,)).label(query(images(8)[:5]))["action"]
    np.testing.assert_array_equal(padded, full[:5])


def test_history_and_chunk_are_octos_own(model: Any, unnorm_key: str | None) -> None:
    teacher = make(unnorm_key, horizon=2, exec_horizon=2, batch_sizes=(2,))
    steps = [images(2) // (t + 1) for t in range(5)]
    answers = [teacher.label(query(step, start=t == 0))["action"] for t, step in enumerate(steps)]
    for env in range(2):
        # Draws take place at t = 2 and 4 after the first, whose history is cut short by a mask.
        for count, t in ((1, 2), (2, 4)):
            pictures = np.stack([steps[t - 1][env], steps[t][env]])
            theirs = octos_own(model, unnorm_key, pictures, env, count)[0]
            assert_close(answers[t][env], theirs[0])
        assert_close(
            answers[3][env], octos_own(model, unnorm_key, np.stack([steps[1][env], steps[2][env]]), env, 1)[0, 1]
        )


def test_masked_frames_do_not_matter(unnorm_key: str | None) -> None:
    sampler = make(unnorm_key, horizon=2, batch_sizes=(1,))._sampler
    mask, row = np.array([[False, True]]), (INSTRUCTIONS[:1], [0], [0])
    present = images(1)[0]
    pasts = (present, images(2)[1])
    first, second = (sampler.draw({"image_primary": np.stack([past, present])[None]}, mask, *row) for past in pasts)
    np.testing.assert_array_equal(first, second)


def test_the_wrist_camera_is_looked_at(model: Any, unnorm_key: str | None) -> None:
    if "image_wrist" not in model.example_batch["observation"]:
        pytest.skip("the checkpoint has no wrist camera")
    pictures, wrist = images(2), images(2, 128)
    labels = make(unnorm_key, wrist_camera="hand", batch_sizes=(2,)).label(query(pictures, wrist=wrist))
    theirs = [octos_own(model, unnorm_key, pictures[i : i + 1], i, 0, 1, wrist[i : i + 1])[0, 0] for i in range(2)]
    assert_close(labels["action"], np.stack(theirs))
    without = make(unnorm_key, batch_sizes=(2,)).label(query(pictures))["action"]
    assert not np.allclose(labels["action"], without, atol=1e-2)
