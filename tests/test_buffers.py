"""Labels in the rollout buffer; the label replay: which pairs it keeps, and that pairs stay pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from rpd_sb3.buffers import LabelledRolloutBuffer, LabelReplay


def test_transition_is_labelled_only_if_all_of_its_labels_came() -> None:
    box = spaces.Box(-1, 1, (2,))
    buffer = LabelledRolloutBuffer(3, box, box, n_envs=2)
    buffer.reset()
    here, gone = np.ones(2), np.full(2, np.nan)
    rows = [
        [{"teacher_action": here, "teacher_std": here}, {"teacher_action": here, "teacher_std": gone}],
        [{}, {"teacher_action": gone, "teacher_std": gone}],
        [{"teacher_action": here, "teacher_std": here}, {}],
    ]
    names = frozenset({"action", "std"})
    for row in rows:
        buffer.add_labels(row, names)
    assert buffer.gather_labels(names) == 0.5
    np.testing.assert_array_equal(buffer.labelled, [[True, False], [False, False], [True, False]])
    np.testing.assert_array_equal(buffer.labels["action"][..., 0], [[1, 0], [0, 0], [1, 0]])


def pairs(start: int, n: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    numbers = np.arange(start, start + n, dtype=np.float32)
    return numbers[:, None], {"action": -numbers[:, None]}


def kept(replay: LabelReplay) -> set[int]:
    observations, labels = replay.sample(500)
    np.testing.assert_array_equal(observations, -labels["action"])
    return set(observations[:, 0].astype(int))


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
    assert observations["rgb"].dtype == np.uint8


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
