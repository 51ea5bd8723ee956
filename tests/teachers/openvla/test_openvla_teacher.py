"""OpenVLA as a teacher: labels, samples, what environments are told, the service, and the images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from PIL import Image

from rpd_sb3.contract.bins import Bounds, centres, to_actions
from rpd_sb3.teachers import Labels, Query, TeacherError, make_teacher
from rpd_sb3.teachers.openvla.images import Preprocessor, crop_center, resize_in_two_passes
from rpd_sb3.teachers.openvla.teacher import OpenVLATeacher
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from rpd_sb3.wire.spec import spec_from_json, spec_to_json
from tests.support.openvla_helpers import goldens, images, question, tokens_of
from tests.support.serving_helpers import serving

FOUR = [(0, 0), (1, 2), (2, 1), (3, 0)]
TWO = [(4, 1), (5, 2)]
LOW = (-0.0312, -0.0405, -0.0248, -0.0811, -0.0953, -0.2144, -1.0)
HIGH = (0.0295, 0.0417, 0.0389, 0.0842, 0.0764, 0.2071, 1.0)


def make(folder: Path, **kwargs: Any) -> OpenVLATeacher:
    return OpenVLATeacher(str(folder), **{"device": "cpu", "image_size": 224, **kwargs})


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[OpenVLATeacher]:
    made = make(folder)
    yield made
    made.close()


def ask(teacher: OpenVLATeacher, actions: np.ndarray | None = None) -> Labels:
    return teacher.label(question(FOUR, actions, 224))


def upstreams(name: str) -> np.ndarray:
    return np.stack([goldens()[name][row] for row in FOUR])


def test_actions_are_upstreams(teacher: OpenVLATeacher) -> None:
    action = ask(teacher)["action"]
    assert action.dtype == np.float32
    np.testing.assert_allclose(action, upstreams("actions"), rtol=0, atol=1e-6)


def test_logits_are_upstreams_in_ascending_order_of_the_action(teacher: OpenVLATeacher) -> None:
    logits = ask(teacher)["logits"]
    assert (logits.shape, logits.dtype) == ((4, 7, 256), np.float32)
    np.testing.assert_allclose(logits, upstreams("logits")[..., ::-1], rtol=0, atol=5e-4)


def test_the_likeliest_bin_is_the_action(teacher: OpenVLATeacher) -> None:
    labels = ask(teacher)
    bounds = Bounds(*map(np.array, teacher.spec.token_bounds or ()))
    np.testing.assert_array_equal(to_actions(labels["logits"].argmax(-1), 256, bounds), labels["action"])


def test_its_own_tokens_as_the_students_change_nothing(teacher: OpenVLATeacher) -> None:
    own = 31999 - tokens_of(FOUR)
    with_tokens, without = ask(teacher, own), ask(teacher)
    np.testing.assert_allclose(with_tokens["logits"], without["logits"], rtol=0, atol=5e-4)
    np.testing.assert_array_equal(with_tokens["action"], without["action"])


def test_logits_are_those_after_the_students_tokens(teacher: OpenVLATeacher) -> None:
    """After another third token, the first three distributions are the same, the others are not."""
    tokens = 31999 - tokens_of(FOUR)
    tokens[:, 2] = (tokens[:, 2] + 100) % 255
    given, own = ask(teacher, tokens), ask(teacher)
    changed = np.abs(given["logits"] - own["logits"]).max(axis=(0, 2)) > 1e-2
    assert changed.tolist() == [False] * 3 + [True] * 4
    np.testing.assert_array_equal(given["action"], own["action"])  # stays that of its own tokens


def test_continuous_actions_of_the_student_are_not_looked_at(teacher: OpenVLATeacher) -> None:
    plain, given = ask(teacher), ask(teacher, np.full((4, 2), np.nan, np.float32))
    for name in plain:
        np.testing.assert_array_equal(plain[name], given[name])


@pytest.mark.parametrize("tokens", [np.zeros((4, 6), int), np.full((4, 7), 256), np.full((4, 7), -1)])
def test_tokens_out_of_range_or_shape_are_refused(teacher: OpenVLATeacher, tokens: np.ndarray) -> None:
    with pytest.raises(TeacherError, match=r"tokens \(N, 7\) from 0 to 255, but got \(4, [67]\) from"):
        ask(teacher, tokens)


def test_the_last_token_is_scored_as_itself(teacher: OpenVLATeacher) -> None:
    """255 and 254 stand for one action, but for two ids, after which the model goes on differently."""
    last, before = (ask(teacher, np.full((4, 7), token))["logits"] for token in (255, 254))
    assert np.abs(last[:, 1] - before[:, 1]).max() > 0.1


def test_samples_have_the_mean_and_std_of_their_actions(folder: Path) -> None:
    """At a temperature of almost zero all samples are the likeliest tokens: the std is its floor."""
    sampling = make(folder, n_samples=5, temperature=1e-6, std_floor=0.01)
    labels = ask(sampling)
    np.testing.assert_allclose(labels["action"], upstreams("actions"), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(labels["std"], np.full((4, 7), 0.01, np.float32))
    sampling.close()


def test_the_spread_of_samples_is_in_the_units_of_the_dataset(folder: Path) -> None:
    """At an enormous temperature all 256 tokens are equally likely: uniform over the bounds."""
    sampling = make(folder, n_samples=200, temperature=1e6, std_floor=1e-6)
    labels = sampling.label(question([(0, 0)], size=224))
    width = np.subtract(HIGH, LOW)
    wanted = width * centres(256).std() / 2
    np.testing.assert_allclose(labels["std"][0], wanted, rtol=0.15)
    np.testing.assert_allclose(labels["action"][0], np.add(LOW, HIGH) / 2, rtol=0, atol=float(width.max()) / 10)
    assert (labels["action"].dtype, labels["std"].dtype) == (np.float32, np.float32)
    sampling.close()


def test_samples_leave_the_logits_alone(folder: Path, teacher: OpenVLATeacher) -> None:
    sampling = make(folder, n_samples=2)
    np.testing.assert_array_equal(ask(sampling)["logits"], ask(teacher)["logits"])
    sampling.close()


def test_the_seed_decides_the_samples(folder: Path) -> None:
    stds = []
    for seed in (1, 1, 2):
        sampling = make(folder, n_samples=4, temperature=5.0, seed=seed)
        stds.append([ask(sampling)["std"] for _ in range(2)])
        sampling.close()
    np.testing.assert_array_equal(stds[0], stds[1])
    assert not np.array_equal(stds[0], stds[2])
    assert not np.array_equal(*stds[0]), "the next answer has other samples"


def test_the_spec_says_what_the_checkpoint_is(folder: Path) -> None:
    options = {"camera": "base", "gripper": "1..0", "rotation": "euler_xyz", "rotation_sign": -1}
    made = make(folder, n_samples=2, control_mode="pd_ee_delta_pose", **options)
    spec = made.spec
    assert spec_from_json(spec_to_json(spec)) == spec
    assert spec.n_parameters == sum(parameter.numel() for parameter in made._model.parameters())
    assert spec.n_bytes == 4 * spec.n_parameters
    made.close()
    made.close()  # twice does no harm
    assert spec.labels == {"action", "std", "logits"}
    assert spec.inputs == ("images.base", "instruction")
    assert spec.image_sizes == {"base": (224, 224)}
    assert spec.action_space == spaces.Box(-1.0, 1.0, (7,), np.float32)
    assert (spec.n_bins, spec.unnorm_key, spec.stateful) == (256, "toy_kitchen", False)
    assert (spec.gripper, spec.rotation, spec.rotation_sign) == ("1..0", "euler_xyz", -1)
    assert spec.control_mode == "pd_ee_delta_pose"
    assert spec.token_bounds == (LOW, HIGH)


def test_without_samples_there_is_no_std(teacher: OpenVLATeacher) -> None:
    assert teacher.spec.labels == set(ask(teacher)) == {"action", "logits"}
    assert not teacher.spec.stochastic


def test_without_an_image_size_any_will_do(folder: Path) -> None:
    made = make(folder, image_size=None)
    assert made.spec.image_sizes == {}
    action = made.label(question(TWO))["action"]
    np.testing.assert_allclose(action, np.stack([goldens()["actions"][row] for row in TWO]), rtol=0, atol=1e-6)
    made.close()


def test_a_service_answers_as_the_teacher_in_this_process(folder: Path, teacher: OpenVLATeacher) -> None:
    tokens = 31999 - tokens_of(FOUR)
    with serving(lambda: make_teacher(f"openvla:{folder}", "Any-v0", device="cpu", image_size=224)) as running:
        remote = RemoteTeacher([running.url])
        assert remote.spec == teacher.spec
        for actions in (None, tokens, tokens.astype(np.float32)):
            query = question(FOUR, actions, 224)
            answer, wanted = remote.submit(query).result(20), teacher.label(query)
            for name in ("action", "logits"):
                np.testing.assert_array_equal(answer[name], wanted[name])
        remote.close()


def test_a_service_refuses_images_of_another_size_than_announced(folder: Path) -> None:
    with serving(lambda: make(folder, image_size=224)) as running:
        remote = RemoteTeacher([running.url])
        with pytest.raises(TeacherError, match=r"images.human' must have shape \[N, 224, 224, 3\], got \[2, 256"):
            remote.submit(question(TWO)).result(20)
        remote.close()


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_instruction_is_refused(teacher: OpenVLATeacher, text: str) -> None:
    query = question(FOUR[:1], size=224)
    empty = Query({**query.inputs, "instruction": np.array([text])}, query.env_ids, query.episode_starts)
    with pytest.raises(ValueError, match="needs an instruction.*but got '"):
        teacher.label(empty)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 224, 224, 3), np.float32),
        np.zeros((2, 3, 224, 224), np.uint8),
        np.zeros((224, 224, 3), np.uint8),
        np.zeros((2, 0, 224, 3), np.uint8),
    ],
)
def test_other_arrays_than_images_are_refused(teacher: OpenVLATeacher, wrong: np.ndarray) -> None:
    query = Query({"images.human": wrong, "instruction": np.array(["lift it"] * 2)}, np.arange(2), np.ones(2, bool))
    with pytest.raises(ValueError, match=r"needs images.human as \(N, H, W, 3\) uint8 RGB, but got \("):
        teacher.label(query)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_samples": 1}, "n_samples=1 must be 0, or at least 2"),
        ({"temperature": float("nan")}, "temperature=nan and std_floor=0.02 must be positive"),
        ({"std_floor": -1.0}, "std_floor=-1.0 must be positive"),
        ({"gripper": "open"}, "gripper='open' is unknown; choose one of -1..1"),
        ({"rotation_sign": 2}, "rotation_sign=2 must be 1 or -1"),
        ({"image_size": 0}, "image_size=0 must be at least 1"),
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of auto, bf16"),
        ({"device": "cuda:99"}, "device 'cuda:99' does not exist"),
        ({"resize": "bilinear"}, "resize='bilinear' is unknown; choose one of pil, tensor"),
    ],
)
def test_an_argument_that_cannot_be_right_is_refused(folder: Path, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(folder, **kwargs)


IMPORT_WITHOUT_TRANSFORMERS = """
import sys
from unittest.mock import MagicMock

for name in ("tokenizers", "transformers", "transformers.models.llama.modeling_llama"):
    sys.modules[name] = MagicMock()  # they take long to import
import rpd_sb3.teachers.openvla.teacher

print({"stable_baselines3", "sb3_contrib"} & set(sys.modules))
"""


def test_it_needs_nothing_of_the_students_side() -> None:
    """Its environment has no Stable-Baselines3, see requirements/openvla.txt."""
    command = [sys.executable, "-c", IMPORT_WITHOUT_TRANSFORMERS]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


STATISTICS = [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))]


def preprocessor(dtype: th.dtype = th.float32, **kwargs: Any) -> Preprocessor:
    return Preprocessor(STATISTICS, th.device("cpu"), dtype, **kwargs)


def test_resizing_on_the_device_is_pils_up_to_one_level_of_few_values() -> None:
    seen = np.stack(images(TWO))
    ours = resize_in_two_passes(th.from_numpy(seen).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    theirs = np.stack([np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)) for x in seen])
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() == 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("resize", ["pil", "tensor"])
def test_wide_images_are_squeezed_whole(resize: str) -> None:
    """The left half is black, the right half white, before and after."""
    wide = np.zeros((1, 100, 300, 3), np.uint8)
    wide[:, :, 150:] = 255
    pixels = preprocessor(resize=resize)(wide)
    assert pixels.shape == (1, 6, 224, 224)
    assert pixels[0, 0, :, :108].max() == 0.0
    assert pixels[0, 0, :, 116:].min() == 1.0


@pytest.mark.parametrize("resize", ["pil", "tensor"])
def test_images_of_the_towers_size_are_not_resampled(resize: str) -> None:
    seen = np.stack(images(FOUR))
    pixels = preprocessor(resize=resize)(seen)
    np.testing.assert_array_equal((pixels[:, :3] * 255).round().permute(0, 2, 3, 1).numpy(), seen)
    assert th.equal(pixels[:, 3:], (pixels[:, :3] - 0.5) / 0.5)


def crop_reference(image: np.ndarray) -> np.ndarray:
    """The middle 90 % of the area (H, W, 3) at the full size, bilinear, in float64."""
    side = np.sqrt(0.9)
    at = (1 - side) / 2 * 223 + np.arange(224) * side
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, 223), at - low
    x = image.astype(np.float64) / 255
    rows = x[low] * (1 - share)[:, None, None] + x[high] * share[:, None, None]
    columns = rows[:, low] * (1 - share)[:, None] + rows[:, high] * share[:, None]
    return np.clip(columns * 255.5, 0, 255).astype(np.uint8)


def test_the_centre_crop_is_bilinear_interpolation_of_the_middle() -> None:
    image = images(FOUR)[0]
    ours = crop_center(th.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    difference = np.abs(ours.astype(int) - crop_reference(image))
    assert difference.max() <= 1  # where float32 and float64 fall on two sides of a whole number
    assert (difference > 0).mean() < 0.005


def test_the_centre_crop_comes_before_the_normalisation() -> None:
    image = images(FOUR)[1]
    pixels = preprocessor(center_crop=True)(image[None])
    cropped = crop_center(th.from_numpy(image).permute(2, 0, 1)[None])
    assert th.equal(pixels[:, :3], cropped.float() / 255)


def test_pixels_have_the_weights_dtype() -> None:
    assert preprocessor(th.bfloat16)(np.stack(images(FOUR))).dtype == th.bfloat16


def test_bfloat16_agrees_mostly(folder: Path) -> None:
    made = make(folder, dtype="bf16")
    agreement = (ask(made)["logits"][:, 0].argmax(-1) == upstreams("logits")[:, 0, ::-1].argmax(-1)).mean()
    made.close()
    assert agreement >= 0.75
