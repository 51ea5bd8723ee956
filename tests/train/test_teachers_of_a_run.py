"""How often a run makes its teacher, and what it asks it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from rpd_sb3.teachers import Labels, LocalTeacher, Query, TeacherError, TeacherSpec
from rpd_sb3.train import __main__ as train
from rpd_sb3.train import build
from rpd_sb3.train import folder as runs
from rpd_sb3.train.hyperparams import RunConfig
from tests.support.train_helpers import NAME, result_of, rpd, trained, weights_of


class CountingTeacher(LocalTeacher):
    """Counts its queries, and fails after as many as ``patience``.

    Random answers depend on the answers before; those with a memory on the earlier queries of that environment.
    """

    made: ClassVar[list[CountingTeacher]] = []

    def __init__(self, stochastic: bool = False, stateful: bool = False, patience: int = 10**6) -> None:
        super().__init__()
        self.spec = TeacherSpec(
            "counting",
            frozenset({"action"}),
            ("state",),
            spaces.Box(-1.0, 1.0, (1,), np.float32),
            stochastic=stochastic,
            stateful=stateful,
        )
        self.queries = 0
        self._patience = patience
        self._rng = np.random.default_rng(0)
        self._seen: Counter[int] = Counter()
        self.made.append(self)

    def label(self, query: Query) -> Labels:
        self.queries += 1
        if self.queries > self._patience:
            raise TeacherError("the teacher is dead")
        action = np.tanh(query.inputs["state"][:, 1:] - query.inputs["state"][:, :1])
        if self.spec.stochastic:
            action = action + self._rng.normal(0.0, 0.3, action.shape)
        if self.spec.stateful:
            for row, env in enumerate(query.env_ids.tolist()):
                self._seen[env] = 0 if query.episode_starts[row] else self._seen[env] + 1
                action[row] *= 0.5 ** (self._seen[env] % 7)
        return {"action": np.clip(action, -1.0, 1.0).astype(np.float32)}


COUNTING = f"{__name__}:CountingTeacher"


@pytest.fixture(autouse=True)
def made() -> Iterator[list[CountingTeacher]]:
    CountingTeacher.made.clear()
    yield CountingTeacher.made
    CountingTeacher.made.clear()


def test_training_and_evaluation_ask_the_same_teacher(logs: Path, made: list[CountingTeacher]) -> None:
    trained(rpd(logs, COUNTING, "--eval-freq", "16", n=64))
    assert [teacher.queries for teacher in made] == [
        1 + 32 + 10 + 10
    ]  # at the start, training, its episodes, agreement


@pytest.mark.parametrize("kind", ["stochastic", "stateful"])
def test_evaluations_do_not_change_the_labels(logs: Path, made: list[CountingTeacher], kind: str) -> None:
    weights = []
    for freq in ("16", "64"):
        argv = rpd(logs, COUNTING, "--teacher-kwargs", f"{kind}:true", "--eval-freq", freq, n=64)
        weights.append(weights_of(trained(argv) / f"{NAME}.zip"))
    assert [teacher.queries for teacher in made] == [1 + 32, 10 + 10] * 2
    assert th.equal(*weights)


@pytest.mark.parametrize(
    ("name", "kind", "n"),
    [
        ("http://gpu-box:8000", "stochastic", 1),  # clients share the draws of a service
        ("https://gpu-box:8000", "stochastic", 1),
        ("http://gpu-box:8000", "stateful", 2),  # but each has a memory of its own there
        (COUNTING, "stochastic", 2),
    ],
)
def test_second_client_of_a_service(
    monkeypatch: pytest.MonkeyPatch, made: list[CountingTeacher], name: str, kind: str, n: int
) -> None:
    monkeypatch.setattr(build, "open_teacher", lambda *args: CountingTeacher(**{kind: True}))
    first, second = build.open_teachers("Tiny-v0", RunConfig(teacher=name), ExitStack())
    assert len(made) == n
    assert (first is second) == (n == 1)


def test_teacher_that_fails_ends_the_run_but_not_the_model(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One query at the start, 10 in its evaluation, 14 of the first rollout's 16.
    assert train.main(rpd(logs, COUNTING, "--teacher-kwargs", "patience:25")) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["error: the teacher is dead"]
    folder = logs / "rpd_ppo" / f"{NAME}_1"
    assert captured.out.splitlines()[-1] == str(folder)
    assert runs.timesteps(folder / f"{NAME}.zip") == 32
    assert result_of(folder)["complete"] is False


def test_teacher_that_dies_after_the_training_costs_the_agreement_only(
    logs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # As above, and 16 in training; then 10 for the agreement.
    assert train.main(rpd(logs, COUNTING, "--teacher-kwargs", "patience:30", n=32)) == 0
    assert "no agreement: the teacher is dead" in capsys.readouterr().out
    result = result_of(logs / "rpd_ppo" / f"{NAME}_1")
    assert (result["complete"], result["agreement"]) == (True, None)
    assert result["latency_ms"]["median"] > 0
