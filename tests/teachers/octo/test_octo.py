"""OctoTeacher's wiring, on a stand-in for octo; test_golden.py compares it with octo itself."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpd_sb3.cli.config import parse_pairs
from rpd_sb3.doctor import FAIL, OK
from rpd_sb3.doctor import teacher as doctor
from rpd_sb3.serve.__main__ import make_parser
from rpd_sb3.teachers import Query, make_teacher
from rpd_sb3.teachers.octo import OctoTeacher
from rpd_sb3.teachers.octo.package import CLASHES, COMMIT, explained, import_model_class
from rpd_sb3.teachers.remote.teacher import RemoteTeacher
from rpd_sb3.wire.spec import spec_from_json, spec_to_json
from tests.support import ROOT, fake_octo
from tests.support.fake_octo import FRAMES, NOISE, OLDEST, SEES, STEP, WORDS, WRIST, OctoModel
from tests.support.packages import packages
from tests.support.serving_helpers import serving


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return fake_octo.install(tmp_path, monkeypatch)


def make(checkpoint: str, **kwargs: Any) -> OctoTeacher:
    return OctoTeacher(checkpoint, **{"warm_up": False, **kwargs})


def query(values: Any, env_ids: Any = None, starts: Any = False, text: str = "push the cube") -> Query:
    """Images of one colour each."""
    values = np.asarray(values, np.uint8)
    n = len(values)
    images = np.broadcast_to(values[:, None, None, None], (n, *fake_octo.SIZE, 3)).copy()
    ids = np.arange(n) if env_ids is None else np.asarray(env_ids)
    return Query({"images.human": images, "instruction": np.full(n, text)}, ids, np.broadcast_to(starts, n))


# ---- the spec


def test_spec_says_what_the_teacher_takes_and_gives(checkpoint: str) -> None:
    spec = make(checkpoint, rotation="euler_xyz", control_mode="pd_ee_delta_pose").spec
    assert (spec.name, spec.labels, spec.inputs) == ("octo", {"action"}, ("images.human", "instruction"))
    assert spec.image_sizes == {"human": fake_octo.SIZE}
    assert spec.action_space.shape == (7,)
    assert (spec.gripper, spec.rotation, spec.control_mode) == ("0..1", "euler_xyz", "pd_ee_delta_pose")
    assert (spec.stateful, spec.stochastic) == (False, True)
    assert (spec.n_parameters, spec.n_bytes) == (3 * 4 + 4, 3 * 4 * 4 + 4 * 2)
    assert spec_from_json(spec_to_json(spec)) == spec


def test_samples_give_a_std_and_a_wrist_camera_an_input(checkpoint: str) -> None:
    spec = make(checkpoint, n_samples=2, camera="base", wrist_camera="hand").spec
    assert spec.labels == {"action", "std"}
    assert spec.inputs == ("images.base", "images.hand", "instruction")
    assert spec.image_sizes == {"base": fake_octo.SIZE, "hand": fake_octo.WRIST_SIZE}


@pytest.mark.parametrize(("kwargs", "stateful"), [({}, False), ({"horizon": 2}, True), ({"exec_horizon": 2}, True)])
def test_history_and_chunks_are_a_memory(checkpoint: str, kwargs: dict[str, Any], stateful: bool) -> None:
    assert make(checkpoint, **kwargs).spec.stateful == stateful


def test_the_registry_knows_paths_with_colons(checkpoint: str) -> None:
    teacher = make_teacher("octo:hf://org/name", "PickCube-v1", n_samples=2, warm_up=False)
    assert "std" in teacher.spec.labels
    assert vars(OctoModel.latest)["path"] == "hf://org/name"
    make_teacher(f"octo:{checkpoint}", "PickCube-v1", step=5, warm_up=False)
    assert (vars(OctoModel.latest)["path"], vars(OctoModel.latest)["step"]) == (checkpoint, 5)


# ---- answers


def test_action_follows_image_and_instruction(checkpoint: str) -> None:
    action = make(checkpoint).label(query([3, 7, 9]))["action"]
    assert action.dtype == np.float32
    assert action[:, SEES].tolist() == [3, 7, 9]
    assert action[:, WORDS].tolist() == [3, 3, 3]
    assert action[:, FRAMES].tolist() == [1, 1, 1]
    assert action[:, STEP].tolist() == [0, 0, 0]


def test_the_wrist_camera_has_its_own_input(checkpoint: str) -> None:
    teacher = make(checkpoint, wrist_camera="hand")
    asked = query([3])
    inputs = {**asked.inputs, "images.hand": np.full((1, *fake_octo.WRIST_SIZE, 3), 5, np.uint8)}
    assert teacher.label(asked._replace(inputs=inputs))["action"][0, [SEES, WRIST]].tolist() == [3, 5]


def test_an_instruction_is_tokenised_once(checkpoint: str) -> None:
    teacher = make(checkpoint)
    for _ in range(2):
        teacher.label(query([1, 2, 3], text="push"))
        teacher.label(query([1], text="pull"))
    assert OctoModel.latest.text_processor.encoded == ["push", "pull"]


def test_batches_are_padded_to_sizes_that_are_compiled(checkpoint: str) -> None:
    teacher = make(checkpoint, batch_sizes=[4, 1])
    answers = {n: teacher.label(query(range(n)))["action"] for n in (1, 3, 4, 6, 9)}
    assert OctoModel.latest.batches == [1, 4, 4, 4, 4, 4, 4, 1]
    for n, action in answers.items():
        assert action[:, SEES].tolist() == list(range(n))


def test_warm_up_compiles_every_size(checkpoint: str) -> None:
    make(checkpoint, batch_sizes=(1, 2, 8), warm_up=True)
    assert OctoModel.latest.batches == [1, 2, 8]


def test_noise_depends_on_seed_environment_and_count_alone(checkpoint: str) -> None:
    teacher = make(checkpoint, seed=3, batch_sizes=(1, 8))
    first, second = (teacher.label(query([1, 2, 3]))["action"][:, NOISE] for _ in range(2))
    assert len({*first.tolist(), *second.tolist()}) == 6
    other = make(checkpoint, seed=3, batch_sizes=(2,))
    assert other.label(query([9, 9], [2, 5]))["action"][0, NOISE] == first[2]
    assert other.label(query([9], [0]))["action"][0, NOISE] == first[0]
    assert other.label(query([9, 9, 9], [0, 2, 1]))["action"][:, NOISE].tolist() == [second[0], second[2], first[1]]
    assert make(checkpoint, seed=4).label(query([1]))["action"][0, NOISE] != first[0]


def test_an_environment_that_asks_twice_at_once_draws_twice(checkpoint: str) -> None:
    one_by_one, at_once = make(checkpoint), make(checkpoint)
    expected = [one_by_one.label(query([1], [4]))["action"][0, NOISE] for _ in range(3)]
    assert at_once.label(query([1, 1], [4, 4]))["action"][:, NOISE].tolist() == expected[:2]
    assert at_once.label(query([1], [4]))["action"][0, NOISE] == expected[2]


def test_samples_are_averaged_and_their_std_has_a_floor(checkpoint: str) -> None:
    import jax  # the stand-in

    from rpd_sb3.teachers.octo.sampler import sample_keys

    labels = make(checkpoint, n_samples=5, std_floor=0.1).label(query([3], [2]))
    (keys,) = sample_keys(jax.random.PRNGKey(0), np.array([2]), np.array([0]), 5)
    noise = np.array([np.random.default_rng(key).random() for key in keys])
    assert labels["action"][0, NOISE] == pytest.approx(noise.mean())
    assert labels["std"][0, NOISE] == pytest.approx(noise.std())
    assert labels["std"][0, SEES] == np.float32(0.1)
    assert labels["action"][0, SEES] == 3


def test_actions_are_unnormalized_where_the_mask_says(checkpoint: str) -> None:
    mask = np.array([True] * 3 + [False] + [True] * 3)
    statistics = {"mean": np.full(7, 10.0), "std": np.full(7, 2.0), "mask": mask}
    OctoModel.changes = {"dataset_statistics": {"action": statistics}}
    action = make(checkpoint).label(query([3], text="push the cube"))["action"][0]
    assert action[[SEES, FRAMES, WORDS]].tolist() == [3 * 2 + 10, 1 * 2 + 10, 3]


def test_unnorm_key_names_a_dataset(checkpoint: str) -> None:
    bridge = {**fake_octo.STATISTICS, "mean": np.full(7, 100.0)}
    OctoModel.changes = {
        "dataset_statistics": {"bridge": {"action": bridge}, "viola": {"action": fake_octo.STATISTICS}}
    }
    teacher = make(checkpoint, unnorm_key="bridge")
    assert teacher.label(query([3]))["action"][0, SEES] == 103
    assert teacher.spec.unnorm_key == "bridge"


# ---- memory


def test_history_grows_to_the_horizon_and_starts_afresh(checkpoint: str) -> None:
    teacher = make(checkpoint, horizon=3)
    starts = [True, False, False, False, True, False]
    actions = [teacher.label(query([10 * t], starts=start))["action"][0] for t, start in enumerate(starts)]
    assert [action[[FRAMES, OLDEST, SEES]].tolist() for action in actions] == [
        [1, 0, 0],
        [2, 0, 10],
        [3, 0, 20],
        [3, 10, 30],
        [1, 40, 40],
        [2, 40, 50],
    ]


def test_histories_of_environments_are_apart(checkpoint: str) -> None:
    teacher = make(checkpoint, horizon=2)
    teacher.label(query([1, 2, 3], starts=True))
    action = teacher.label(query([4, 5, 6], [2, 0, 1], starts=[False, False, True]))["action"]
    assert action[:, OLDEST].tolist() == [3, 1, 6]


def test_the_querys_images_may_be_overwritten(checkpoint: str) -> None:
    teacher = make(checkpoint, horizon=2)
    asked = query([1], starts=True)
    teacher.label(asked)
    asked.inputs["images.human"][:] = 99
    assert teacher.label(query([2]))["action"][0, OLDEST] == 1


def test_a_chunk_is_executed_before_the_model_is_asked_again(checkpoint: str) -> None:
    teacher = make(checkpoint, exec_horizon=3)
    steps = [teacher.label(query([t], starts=t == 0))["action"][0, [STEP, SEES]].tolist() for t in range(5)]
    assert steps == [[0, 0], [1, 0], [2, 0], [0, 3], [1, 3]]
    assert len(OctoModel.latest.batches) == 2


def test_only_environments_without_a_chunk_ask(checkpoint: str) -> None:
    teacher = make(checkpoint, exec_horizon=2, batch_sizes=(1, 2))
    teacher.label(query([1, 2], starts=True))
    action = teacher.label(query([3, 4], starts=[False, True]))["action"]
    assert action[:, [STEP, SEES]].tolist() == [[1, 1], [0, 4]]
    assert OctoModel.latest.batches == [2, 1]


def test_another_instruction_ends_a_chunk(checkpoint: str) -> None:
    teacher = make(checkpoint, exec_horizon=4)
    teacher.label(query([1], starts=True, text="push"))
    assert teacher.label(query([2], text="pull it"))["action"][0, [STEP, WORDS]].tolist() == [0, 2]


def test_history_goes_on_while_a_chunk_is_executed(checkpoint: str) -> None:
    teacher = make(checkpoint, horizon=2, exec_horizon=2)
    actions = [teacher.label(query([t], starts=t == 0))["action"][0] for t in range(3)]
    assert actions[2][[OLDEST, SEES, FRAMES]].tolist() == [1, 2, 2]


def test_std_of_a_chunk_belongs_to_its_step(checkpoint: str) -> None:
    teacher = make(checkpoint, exec_horizon=2, n_samples=3)
    stds = [teacher.label(query([1], starts=start))["std"] for start in (True, False)]
    assert [std.shape for std in stds] == [(1, 7), (1, 7)]


def test_a_query_that_fails_leaves_no_trace(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, undisturbed = (make(checkpoint, horizon=2) for _ in range(2))
    for one in (teacher, undisturbed):
        one.label(query([1], starts=True))
    with monkeypatch.context() as broken:
        broken.setattr(OctoModel, "run_transformer", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            teacher.label(query([2]))
    expected = undisturbed.label(query([3]))["action"]
    np.testing.assert_array_equal(teacher.label(query([3]))["action"], expected)


@pytest.mark.parametrize(
    ("env_ids", "message"), [([1, 1], "may name an environment only once"), ([0], "knows nothing of environment 0")]
)
def test_a_memory_wants_to_know_whose_it_is(checkpoint: str, env_ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(checkpoint, horizon=2).label(query([1] * len(env_ids), env_ids))


# ---- mistakes


@pytest.mark.parametrize("images", [np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 9, 8, 3), np.uint8)])
def test_other_images_are_refused(checkpoint: str, images: np.ndarray) -> None:
    asked = query([1, 2])
    with pytest.raises(ValueError, match=r"images.human must be uint8 of shape \(2, 8, 8, 3\), got"):
        make(checkpoint).label(asked._replace(inputs={**asked.inputs, "images.human": images}))


@pytest.mark.parametrize("instruction", [np.array(["push"]), np.array([1, 2]), np.array([b"push", b"pull"])])
def test_other_instructions_are_refused(checkpoint: str, instruction: np.ndarray) -> None:
    asked = query([1, 2])
    with pytest.raises(ValueError, match="instruction must be 2 strings"):
        make(checkpoint).label(asked._replace(inputs={**asked.inputs, "instruction": instruction}))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_samples": 1.5}, "n_samples=1.5 must be a whole number"),
        ({"horizon": 4}, "horizon=4 must be at most 3"),
        ({"exec_horizon": 5}, "exec_horizon=5 must be at most 4"),
        ({"std_floor": float("nan")}, "std_floor=nan must be"),
        ({"seed": -1}, "seed=-1 must be"),
        ({"step": 3}, "has no step 3; it has 0, 5"),
        ({"gripper": "open"}, "gripper='open' is unknown; choose one of -1..1, 0..1"),
        ({"wrist_camera": "human"}, "are both 'human'"),
        ({"batch_sizes": []}, r"batch_sizes=\[\] must be a list"),
        ({"batch_sizes": [8, 0]}, r"batch_sizes=0 must be"),
        ({"unnorm_key": "bridge"}, "leave unnorm_key out"),
    ],
)
def test_arguments_are_checked_at_once(checkpoint: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(checkpoint, **kwargs)


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"text_processor": None}, {}, "has no text processor"),
        ({"config": {"a": {"action_proprio_normalization_type": "bounds"}}}, {}, "normalized to 'bounds'"),
        (
            {"example_batch": {"observation": {"image_primary": np.zeros((1, 2, 8, 8, 3))}}},
            {"wrist_camera": "hand"},
            "has no image_wrist for camera 'hand'; its images are image_primary",
        ),
        ({"dataset_statistics": {"bridge": {"action": fake_octo.STATISTICS}}}, {}, "choose one of bridge"),
        (
            {"dataset_statistics": {name: {"action": fake_octo.STATISTICS} for name in ("bridge", "viola")}},
            {"unnorm_key": "brdge"},
            r"\(it has bridge, viola\); did you mean 'bridge'",
        ),
        ({"dataset_statistics": {"action": {"mean": np.zeros(14), "std": np.ones(14)}}}, {}, r"have shape \(14,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    checkpoint: str, changes: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    OctoModel.changes = changes
    with pytest.raises(ValueError, match=message):
        make(checkpoint, **kwargs)


def test_a_deterministic_head_has_no_samples(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_octo, "Head", fake_octo.ContinuousActionHead)
    assert not make(checkpoint).spec.stochastic
    with pytest.raises(ValueError, match="n_samples=2 must be 1: the head of .* is deterministic"):
        make(checkpoint, n_samples=2)


def test_a_missing_checkpoint_is_named(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'nowhere' does not exist: name the folder that holds config.json"):
        make("nowhere")
    for step in ("0", "5"):
        Path(checkpoint, step).rmdir()
    with pytest.raises(ValueError, match="has no steps"):
        make(checkpoint)
    Path(checkpoint, "dataset_statistics.json").unlink()
    with pytest.raises(ValueError, match="has no dataset_statistics.json"):
        make(checkpoint)
    with pytest.raises(ValueError, match="path='hf://' must be the folder"):
        make("hf://")
    with pytest.raises(ValueError, match="step=5 cannot be chosen"):
        make("hf://org/name", step=5)


def test_what_octo_cannot_load_is_one_sentence(checkpoint: str) -> None:
    OctoModel.load_error = OSError("We couldn't connect to the hub\nmany more lines")
    with pytest.raises(ValueError, match=r"cannot be loaded \(We couldn't connect to the hub\): .* t5-base"):
        make(checkpoint)
    OctoModel.load_error = ImportError("cannot import name 'FlaxAutoModel' from 'transformers'")
    with pytest.raises(ValueError, match="install transformers==4.36.2"):
        make(checkpoint)


# ---- the package


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_octo.forget_package(monkeypatch)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="the package octo is missing: install what requirements/octo.txt lists"):
        OctoTeacher("hf://org/name")
    (found,) = doctor.inspect_teacher("octo:hf://org/name")
    assert (found.status, found.value) == (FAIL, "not installed here: octo")


@pytest.mark.parametrize("files", [["__init__.py", "cli.py", "manager.py", "plugin.py"], []])
def test_another_package_of_that_name_is_recognised_without_executing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str]
) -> None:
    (tmp_path / "octo").mkdir()
    for name in files:
        (tmp_path / "octo" / name).write_text("raise RuntimeError('executed')")
    fake_octo.use_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="is not the robot model.*pip uninstall octo"):
        import_model_class()


def test_a_mixed_installation_is_recognised_without_executing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_octo.write_package(tmp_path, "raise RuntimeError('executed')")
    (tmp_path / "octo" / "manager.py").touch()
    fake_octo.use_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="is mixed with the package index's plugin framework"):
        import_model_class()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dlimp", "octo needs the module no_such_dlimp, which is missing: install"),
        ("raise AttributeError(\"module 'scipy.linalg' has no attribute 'tril'\")", "install scipy==1.11.4"),
        ("raise RuntimeError('jaxlib version 0.4.38 is newer than and incompatible')", "install jaxlib==0.4.20"),
        ("raise ValueError('numpy.dtype size changed.')", r"\(numpy.dtype size changed\): install what"),
        ("class OctoModel:\n    def sample_actions(self, pad_mask): ...", "is version 0.1 or older"),
    ],
)
def test_a_broken_environment_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    fake_octo.write_package(tmp_path, source)
    fake_octo.use_package(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=message):
        import_model_class()


def test_the_cause_behind_an_error_is_found() -> None:
    error = ValueError("Could not import octo.model.components.tokenizers:LanguageTokenizer")
    error.__cause__ = ModuleNotFoundError("No module named 'flax'", name="flax")
    assert explained(error).startswith("octo needs the module flax, which is missing")


def test_importing_the_teacher_imports_no_jax() -> None:
    code = "import sys, rpd_sb3.teachers.octo; print({'jax', 'octo', 'torch', 'tensorflow'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


# ---- the doctor


def test_the_doctor_looks_for_package_and_checkpoint(checkpoint: str, tmp_path: Path) -> None:
    assert [found.status for found in doctor.inspect_teacher(f"octo:{checkpoint}")] == [OK]
    assert [found.status for found in doctor.inspect_teacher("octo:hf://org/name")] == [OK]
    assert [found.status for found in doctor.inspect_teacher(f"octo:{tmp_path}")] == [FAIL]


# ---- what the documents show


def test_requirements_hold_what_the_service_needs_and_every_known_pin() -> None:
    text = (ROOT / "requirements" / "octo.txt").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert set(packages("options.extras_require", "teacher-server")) <= {re.split("[=<>]", line)[0] for line in lines}
    pins = {pin for versions in CLASHES.values() for pin in re.findall(r"\S+==[\d.]+\d", versions)}
    assert pins <= set(lines)
    assert COMMIT in text


def test_the_commands_of_the_page_exist(checkpoint: str) -> None:
    page = (ROOT / "docs" / "octo.md").read_text()
    assert COMMIT in page
    (served,) = (line.partition("rpd_sb3.serve ")[2] for line in page.splitlines() if "rpd_sb3.serve " in line)
    args = make_parser().parse_args(shlex.split(served))
    spec = make_teacher(args.teacher, "", **parse_pairs(args.teacher_kwargs, "")).spec
    assert (spec.control_mode, spec.rotation, "std" in spec.labels) == ("pd_ee_delta_pose", "axis_angle", True)
    options = re.findall(r"`(\w+:\S+?)`", page.partition("| option |")[2].partition("\n\n")[0])
    assert len(options) == 9
    make(checkpoint, **{**parse_pairs(options, ""), "horizon": 1, "unnorm_key": None})


def test_the_service_serves_it(checkpoint: str) -> None:
    with serving(lambda: make(checkpoint, horizon=2)) as service, closing(RemoteTeacher([service.url])) as teacher:
        answers = [teacher.submit(query([t, 2 * t], starts=t == 0)).result(10)["action"] for t in (0, 5)]
    assert answers[1][:, [SEES, OLDEST, FRAMES]].tolist() == [[5, 0, 2], [10, 0, 2]]
