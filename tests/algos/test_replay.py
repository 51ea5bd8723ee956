"""The label replay: which pairs it keeps, that pairs stay pairs, where they lie and what they take there."""

from __future__ import annotations

import os
import threading
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.algos import RPD
from rpd_sb3.algos import replay as replay_module
from rpd_sb3.algos.replay import LabelReplay, choose_device, pair_bytes, prefetched
from rpd_sb3.labelling import VecTeacher
from tests.support.helpers import CountingEnv, EchoTeacher

CPU = th.device("cpu")


def pairs(start: int, n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    numbers = np.arange(start, start + n, dtype=np.float32)
    return numbers[:, None], {"action": -numbers[:, None]}


def kept(replay: LabelReplay) -> set[int]:
    observations, labels = replay.sample(500)
    np.testing.assert_array_equal(observations, -labels["action"])
    return set(observations[:, 0].int().tolist())  # type: ignore[index]


def test_the_newest_pairs_are_kept() -> None:
    replay = LabelReplay(5)
    replay.extend(*pairs(0, 3))
    assert kept(replay) == {0, 1, 2}
    replay.extend(*pairs(3, 4))
    assert kept(replay) == {2, 3, 4, 5, 6}
    replay.extend(*pairs(7, 12))
    assert kept(replay) == {14, 15, 16, 17, 18}
    replay.extend(*pairs(19, 1))
    assert kept(replay) == {15, 16, 17, 18, 19}


def test_dict_observations_and_dtypes_survive() -> None:
    replay = LabelReplay(4)
    replay.extend(
        {"rgb": np.full((2, 3, 8, 8), 7, np.uint8), "state": np.ones((2, 5), np.float32)}, {"action": np.ones((2, 7))}
    )
    observations, _ = replay.sample(3)
    assert isinstance(observations, dict)
    assert observations["rgb"].shape == (3, 3, 8, 8)
    assert observations["rgb"].dtype == th.uint8


@pytest.mark.parametrize("n", [3, 5, 12])
def test_a_saved_replay_goes_on_where_it_was(n: int, tmp_path: Path) -> None:
    replay, loaded = LabelReplay(5), LabelReplay(5)
    replay.extend(*pairs(0, n))
    replay.save(str(tmp_path / "replay.npz"))
    loaded.load(str(tmp_path / "replay.npz"))
    for one in (replay, loaded):
        one.extend(*pairs(n, 2))
    assert kept(loaded) == kept(replay) == set(range(max(0, n - 3), n + 2))


def test_a_replay_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    replay = LabelReplay(5)
    replay.extend(*pairs(0, 5))
    replay.save(str(tmp_path / "replay.npz"))
    with pytest.raises(ValueError, match="holds 5 pairs, but label_replay=3"):
        LabelReplay(3).load(str(tmp_path / "replay.npz"))


@pytest.mark.parametrize("dict_obs", [False, True])
def test_pairs_of_a_rollout_are_appended_step_by_step_where_there_are_labels(dict_obs: bool) -> None:
    rng = np.random.default_rng(0)
    ours, one_by_one = LabelReplay(150), LabelReplay(150)
    for _ in range(3):
        frames = rng.integers(0, 256, (5, 40, 2, 3), dtype=np.uint8).swapaxes(0, 1)  # as in the compact buffer
        labels = {"action": rng.normal(size=(40, 5, 7)).astype(np.float32)}
        where = rng.random((40, 5)) < 0.6
        observations: Any = {"rgb": frames, "state": labels["action"][..., :2]} if dict_obs else frames
        ours.extend(observations, labels, where)
        for step, env in np.argwhere(where):
            one: Any = {k: v[step, env][None] for k, v in observations.items()} if dict_obs else frames[step, env][None]
            one_by_one.extend(one, {"action": labels["action"][step, env][None]})
    assert (ours.size, ours._next) == (one_by_one.size, one_by_one._next)
    for name, values in one_by_one._arrays.items():
        np.testing.assert_array_equal(ours._arrays[name], values, strict=True)


@pytest.mark.parametrize("change", ["cut", "pickled"])
def test_a_file_that_is_no_replay_is_refused(change: str, tmp_path: Path) -> None:
    path = str(tmp_path / "replay.npz")
    values = np.zeros((3, 2)) if change == "cut" else np.array([None])
    np.savez(path, **{"next": 0, "obs/": values})  # type: ignore[arg-type]
    if change == "cut":
        with zipfile.ZipFile(path) as file:
            whole = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, data in whole.items():
                file.writestr(name, data if name == "next.npy" else data[:-1])
    with pytest.raises(ValueError, match="ends too early" if change == "cut" else "was not written by LabelReplay"):
        LabelReplay(5).load(path)


FRAME = 84 * 84 * 3


def test_reading_a_replay_takes_its_memory_once(tmp_path: Path) -> None:
    replay = LabelReplay(1000)
    replay.extend(np.ones((1000, FRAME), np.uint8), {"action": np.ones((1000, 7), np.float32)})
    path, size = str(tmp_path / "replay.npz"), 1000 * FRAME
    tracemalloc.start()
    try:
        replay.save(path)
        assert tracemalloc.get_traced_memory()[1] < size
        tracemalloc.reset_peak()
        loaded = LabelReplay(1000)
        loaded.load(path)
        assert tracemalloc.get_traced_memory()[1] < 1.5 * size
    finally:
        tracemalloc.stop()
    for name, values in replay._arrays.items():
        np.testing.assert_array_equal(loaded._arrays[name], values)


def test_a_pair_is_drawn_by_numpys_global_generator() -> None:
    replay = LabelReplay(50)
    replay.extend(*pairs(0, 50))
    np.random.seed(3)  # noqa: NPY002
    drawn = [int(replay.sample(1).observations[0, 0]) for _ in range(4)]  # type: ignore[index]
    assert drawn == [np.random.RandomState(3).randint(50, size=4)[i] for i in range(4)]


def image_pairs(n: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    rng = np.random.default_rng(n)
    frames = rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)
    state = rng.normal(size=(n, 5)).astype(np.float32)
    return {"rgb": frames, "state": state}, {"action": state[:, :2], "taken_action": np.arange(n)}


def test_fetched_batches_are_those_that_would_have_been_drawn() -> None:
    replay = LabelReplay(40)
    replay.extend(*image_pairs(40))
    np.random.seed(5)  # noqa: NPY002
    expected = [replay.sample(16) for _ in range(7)]
    for elsewhere in (CPU, th.device("cpu", 0)):  # the second counts as another device
        np.random.seed(5)  # noqa: NPY002
        for one, other in zip(expected, list(replay.batches(7, 16, elsewhere)), strict=True):
            for name, values in one.observations.items():  # type: ignore[union-attr]
                assert th.equal(other.observations[name], values)  # type: ignore[index]
                assert other.observations[name].dtype == values.dtype  # type: ignore[index]
            assert all(th.equal(other.labels[name], values) for name, values in one.labels.items())
    assert list(replay.batches(0, 16, th.device("cpu", 0))) == []


def test_the_next_one_is_made_while_this_one_is_in_use() -> None:
    began = [threading.Event() for _ in range(4)]
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        began[made[-1]].set()
        return made[-1]

    got = []
    for i in prefetched(make, 4):
        got.append(i)
        assert i == 3 or began[i + 1].wait(timeout=10)
    assert got == [0, 1, 2, 3]
    assert made == got


def test_an_error_of_the_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(prefetched(lambda: 1 // 0, 3))


def test_a_file_written_by_numpy_is_read_and_the_other_way_round(tmp_path: Path) -> None:
    observations, labels = image_pairs(30)
    columns: dict[str, Any] = {f"obs/{k}": v for k, v in observations.items()}
    columns |= {f"label/{k}": v for k, v in labels.items()}
    np.savez(tmp_path / "old.npz", next=0, **columns)
    replay = LabelReplay(30)
    replay.load(str(tmp_path / "old.npz"))
    replay.save(str(tmp_path / "new.npz"))
    with np.load(tmp_path / "new.npz", allow_pickle=False) as file:
        assert set(file.files) == {"next", *columns}
        assert file["next"].shape == ()
        for name, values in columns.items():
            np.testing.assert_array_equal(file[name], values, strict=True)


SPACE = spaces.Dict({"rgb": spaces.Box(0, 255, (3, 8, 8), np.uint8), "state": spaces.Box(-1, 1, (5,), np.float32)})


@pytest.mark.parametrize(
    ("space", "labels", "expected"),
    [
        (spaces.Box(-1, 1, (2,), np.float32), ("action", "std"), 3 * 4 * 2),
        (spaces.MultiDiscrete([16, 8, 16]), ("logits",), 3 * 8 + 3 * 16 * 4),
        (spaces.Discrete(4), ("action", "value"), 8 + 4 + 4),
    ],
)
def test_bytes_of_a_pair(space: spaces.Space, labels: tuple[str, ...], expected: int) -> None:
    assert pair_bytes(SPACE, space, labels) == 3 * 8 * 8 + 5 * 4 + expected


def make(**kwargs: Any) -> RPD:
    venv = VecTeacher(DummyVecEnv([CountingEnv]), EchoTeacher())
    return RPD("MlpPolicy", venv, n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0, **kwargs)


def test_a_full_replay_takes_as_much_as_was_checked() -> None:
    model = make(label_replay=20)
    model.learn(24)
    replay = model.label_replay_buffer
    assert replay is not None
    assert replay.size == 20
    taken = sum(values.untyped_storage().nbytes() for values in replay._arrays.values())
    assert taken == 20 * pair_bytes(model.observation_space, model.action_space, model.needs) == 20 * 4 * (3 + 2 + 2)


def test_a_replay_that_does_not_fit_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replay_module, "_available_bytes", lambda: 28_000)
    message = (
        r"RPD: label_replay=1000 needs 0\.00 GiB on cpu, of whose 0\.00 GiB .* it may take 80%; use label_replay=800"
    )
    for device in ("cpu", "auto"):
        with pytest.raises(ValueError, match=message):
            make(label_replay=1000, replay_device=device)
    model = make(label_replay=800)
    model.save(tmp_path / "model")
    monkeypatch.setattr(replay_module, "_available_bytes", lambda: 1000)
    loaded = RPD.load(tmp_path / "model")  # to act
    loaded.set_env(model.env)
    with pytest.raises(ValueError, match="label_replay=800 needs"):
        loaded.learn(8)
    with pytest.raises(ValueError, match="label_replay=800 needs"):
        RPD.load(tmp_path / "model", env=model.env)


def test_a_replay_on_the_gpu_needs_the_student_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="replay_device='cuda' needs the student there too, but it is on cpu"):
        make(label_replay=100, replay_device="cuda")
    with pytest.raises(ValueError, match="RPD: replay_device='gpu' is unknown; choose one of auto, cuda, cpu"):
        make(replay_device="gpu")


@pytest.mark.parametrize(("free", "expected"), [(999, "cpu"), (1000, "cuda:1")])
def test_auto_is_the_students_device_where_the_full_replay_fits(
    free: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th.cuda, "mem_get_info", lambda device: (free, 10_000))
    gpu = th.device("cuda", 1)
    assert choose_device("auto", gpu, 800) == th.device(expected)
    assert choose_device("cuda", gpu, 800) == gpu
    assert choose_device("cpu", gpu, 800) == CPU
    assert choose_device("auto", CPU, 800) == CPU


@pytest.mark.parametrize("version", [1, 2])
def test_the_memory_limit_of_a_container_counts(version: int, tmp_path: Path) -> None:
    if version == 1:
        files = {
            "memory.limit_in_bytes": "1000",
            "memory.usage_in_bytes": "700",
            "memory.stat": "total_inactive_file 50",
        }
        (tmp_path / "memory").mkdir()
        files = {f"memory/{name}": text for name, text in files.items()}
    else:
        files = {"memory.max": "1000", "memory.current": "700", "memory.stat": "anon 650\ninactive_file 50"}
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    assert replay_module._container_bytes(str(tmp_path)) == 350


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    assert replay_module._container_bytes(str(tmp_path)) is None
    for name, text in {"memory.max": "max", "memory.current": "700", "memory.stat": "inactive_file 50"}.items():
        (tmp_path / name).write_text(text)
    assert replay_module._container_bytes(str(tmp_path)) is None


@pytest.mark.skipif(not Path("/proc/meminfo").is_file(), reason="Linux tells what is available there")
def test_what_the_machine_can_give_lies_between_its_free_and_all_of_its_memory() -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    available = replay_module._available_bytes()
    assert available is not None
    assert os.sysconf("SC_AVPHYS_PAGES") * page / 2 < available < os.sysconf("SC_PHYS_PAGES") * page
