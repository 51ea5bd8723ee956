"""The progress bar: what it says, and that its time left is right where updates take most of the time."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv

from rpd_sb3.train.callbacks import N_CYCLES, Pace, ProgressCallback
from tests.support.helpers import CountingEnv


def test_the_time_left_is_that_of_whole_cycles() -> None:
    pace = Pace(total=1000)
    assert pace.time_left(0.0) is None
    pace.begin_cycle(5.0, 0)
    assert pace.time_left(6.0) is None, "steps of a rollout come fast, and its update is still to come"
    pace.begin_cycle(15.0, 100)  # ten seconds for each 100 steps
    assert pace.time_left(15.0) == 90.0
    assert pace.time_left(22.0) == 83.0, "it goes on during the update"
    pace.begin_cycle(27.0, 200)  # this one took twelve
    assert pace.time_left(27.0) == 8 * 11.0
    assert pace.time_left(500.0) == 0.0


def test_the_last_rollout_is_a_whole_one() -> None:
    pace = Pace(total=240)
    pace.begin_cycle(0.0, 0)
    pace.begin_cycle(10.0, 100)
    assert pace.time_left(10.0) == 20.0


def test_a_resumed_run_counts_from_where_it_goes_on() -> None:
    pace = Pace(total=1000)
    pace.begin_cycle(0.0, 700)
    pace.begin_cycle(10.0, 800)
    assert pace.time_left(10.0) == 20.0


def test_what_was_long_ago_does_not_count() -> None:
    pace, now = Pace(total=10_000), 0.0
    for cycle in range(2 * N_CYCLES + 1):
        pace.begin_cycle(now, 10 * cycle)
        now += 100.0 if cycle < N_CYCLES else 1.0
    assert pace.time_left(now - 1.0) == 10_000 / 10 - 2 * N_CYCLES


class Clock:
    """Stands still until it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Succeeding(CountingEnv):
    """Every episode is a success, and every step takes a second."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def step(self, action: Any) -> Any:
        self.clock.now += 1.0
        return *super().step(action)[:4], {"is_success": True}


def learned(is_terminal: bool) -> tuple[ProgressCallback, Clock, str]:
    """A bar after four rollouts of ten steps, its clock, and what was on the screen."""
    clock = Clock()
    venv = DummyVecEnv([lambda: Succeeding(clock)])
    model = PPO("MlpPolicy", venv, n_steps=10, batch_size=10, n_epochs=1, device="cpu", seed=0)
    callback = ProgressCallback(40, clock)
    screen = io.StringIO()
    callback._bar.live.console = Console(file=screen, force_terminal=is_terminal, width=200)
    model.learn(40, callback=callback)
    callback.close()
    return callback, clock, screen.getvalue()


def test_the_line_says_how_far_how_well_and_how_long() -> None:
    callback, clock, _ = learned(is_terminal=False)
    assert callback.line() == "100% | 40/40 steps | success 100% | 0:00:40 elapsed | 0:00:00 left | 1 fps"
    callback.num_timesteps = 25
    clock.now += 3600
    assert callback.line().startswith("62% | 25/40 steps | success 100% | 1:00:40 elapsed | ")
    callback.pace.begin_cycle(clock.now, 40)
    callback.pace.total = 60
    clock.now += 2
    assert callback.line().startswith("42% | 25/60 steps | success 100% | 1:00:42 elapsed | 0:30:18 left | ")


def test_before_the_first_update_the_time_left_is_not_known() -> None:
    callback, _, _ = learned(is_terminal=False)
    callback.pace = Pace(40)
    assert " | time left not known yet | " in callback.line()


def test_the_bar_ends_with_the_line() -> None:
    _, _, screen = learned(is_terminal=True)
    assert "100% | 40/40 steps | success 100% | 0:00:40 elapsed | 0:00:00 left | 1 fps" in screen


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rpd_sb3.train.callbacks.LINE_EVERY", 15.0)
    learned(is_terminal=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if "steps" in line]
    assert lines == ["50% | 20/40 steps | success 100% | 0:00:20 elapsed | 0:00:20 left | 1 fps"]
