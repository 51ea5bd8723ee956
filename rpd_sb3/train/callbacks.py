"""Evaluation, checkpoints and a progress bar during training.

Evaluation and checkpoints come between two rollouts, after the update: a saved or evaluated policy is the one that
``num_timesteps`` steps have trained.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, ProgressColumn, Task
from rich.table import Column
from rich.text import Text
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import safe_mean

from rpd_sb3.episodes.play import EvalResult, Evaluator
from rpd_sb3.labelling.access import find_vec_teacher
from rpd_sb3.train.folder import Evaluations, read_evaluations, save_model

N_CYCLES = 50
"""Last rollouts with their updates from which the time left is estimated."""
LINE_EVERY = 30.0
"""Seconds between two lines of progress where there is no terminal."""
Deferred = Callable[[], AbstractContextManager[None]]
"""Makes the context in which files are written, see :meth:`rpd_sb3.cli.interrupt.Interrupt.deferred`."""


class EveryNSteps(BaseCallback):
    """Calls :meth:`act` before the first rollout, and before the first rollout after every ``freq`` environment steps.

    :param freq: environment steps, counted over all environments; 0: never
    """

    def __init__(self, freq: int) -> None:
        super().__init__()
        self.freq = freq
        self._next = 0

    def _on_rollout_start(self) -> None:
        if self.freq > 0 and self.num_timesteps >= self._next:
            self._next = (self.num_timesteps // self.freq + 1) * self.freq
            self.act()

    def _on_step(self) -> bool:
        return True

    def act(self) -> None:
        raise NotImplementedError


class EvalSuccessCallback(EveryNSteps):
    """Evaluates the student, writes ``evaluations.npz`` in the layout of SB3's EvalCallback, keeps ``best_model.zip``.

    ``successes`` in that file are ``success_once``; ``successes_at_end`` is our addition. The best model has the highest
    ``success_once`` (return where there is no success), then the highest return; at a tie the later one wins.

    :param evaluator: plays the episodes
    :param freq: environment steps between evaluations; 0: only when :meth:`act` is called
    :param folder: of the run
    :param report: gets the number of steps and the result of each evaluation
    :param deferred: context in which files are written
    """

    def __init__(
        self,
        evaluator: Evaluator,
        freq: int,
        folder: Path,
        report: Callable[[int, EvalResult], None],
        deferred: Deferred = nullcontext,
    ) -> None:
        super().__init__(freq)
        self.evaluator = evaluator
        self.folder = folder
        self.report = report
        self.deferred = deferred
        self.timesteps: list[int] = []
        self.last: EvalResult | None = None
        self.duration = 0.0
        """Seconds spent so far."""
        self._arrays: dict[str, list[np.ndarray]] = {}
        self._best: tuple[float, ...] = ()

    def resume(self, timesteps: int) -> None:
        """Keep the evaluations in the folder up to the step at which training goes on.

        :param timesteps: that step
        """
        if self.freq > 0:
            self._next = (timesteps // self.freq + 1) * self.freq
        found = read_evaluations(self.folder)
        if found is None:
            return
        keep = found.timesteps <= timesteps
        self.timesteps = found.timesteps[keep].tolist()
        self._arrays = {name: list(values[keep]) for name, values in _arrays_of(found).items()}
        for i in range(len(self.timesteps)):
            self._best = max(self._best, self._score({name: rows[i] for name, rows in self._arrays.items()}))

    def act(self) -> None:
        start = time.monotonic()
        result = self.evaluator.student(self.model)
        self.last = result
        self.timesteps.append(self.num_timesteps)
        row = _arrays_of(result)
        for name, values in row.items():
            self._arrays.setdefault(name, []).append(values)
        with self.deferred():
            temporary = self.folder / ".evaluations.tmp.npz"
            np.savez(temporary, timesteps=self.timesteps, **self._arrays)  # type: ignore[arg-type]
            os.replace(temporary, self.folder / "evaluations.npz")
            if (score := self._score(row)) >= self._best:
                self._best = score
                save_model(self.model, self.folder / "best_model.zip", label_replay=False)
        self.duration += time.monotonic() - start
        self._log(result)
        self.report(self.num_timesteps, result)

    @staticmethod
    def _score(row: dict[str, np.ndarray]) -> tuple[float, ...]:
        mean_return = float(np.mean(row["results"]))
        return (float(np.mean(row["successes"])), mean_return) if "successes" in row else (mean_return,)

    def _log(self, result: EvalResult) -> None:
        if result.success_once is not None:
            self.logger.record("eval/success_once", result.success_once)
            self.logger.record("eval/success_at_end", result.success_at_end)
        self.logger.record("eval/mean_reward", result.mean_return)
        self.logger.record("eval/mean_ep_length", result.mean_length)
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)


def _arrays_of(result: EvalResult | Evaluations) -> dict[str, np.ndarray]:
    """The arrays by their names in ``evaluations.npz``."""
    arrays = {"results": result.returns, "ep_lengths": result.lengths}
    if result.once is not None and result.at_end is not None:
        arrays |= {"successes": result.once, "successes_at_end": result.at_end}
    return arrays


class CheckpointCallback(EveryNSteps):
    """Saves ``rl_model_<steps>_steps.zip``, and the label replay next to it.

    :param freq: environment steps between checkpoints; 0: none
    :param folder: of the run
    :param deferred: context in which files are written
    """

    def __init__(self, freq: int, folder: Path, deferred: Deferred = nullcontext) -> None:
        super().__init__(freq)
        self.folder = folder
        self.deferred = deferred

    def _on_training_start(self) -> None:
        if self.freq > 0:  # nothing to save at the start
            self._next = (self.num_timesteps // self.freq + 1) * self.freq

    def act(self) -> None:
        with self.deferred():
            save_model(self.model, self.folder / f"rl_model_{self.num_timesteps}_steps.zip")


class Pace:
    """How long training takes yet, from whole cycles of a rollout and its update.

    Within a rollout steps come fast, and none at all during its update: the speed of the last seconds says little.

    :param total: environment steps at the end
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._cycles: deque[tuple[float, int]] = deque(maxlen=N_CYCLES + 1)

    def begin_cycle(self, now: float, steps: int) -> None:
        """Note the start of a rollout.

        :param now: seconds
        :param steps: environment steps so far
        """
        self._cycles.append((now, steps))

    def time_left(self, now: float) -> float | None:
        """Seconds to the end of the last update; None before the first whole cycle is over.

        :param now: seconds
        """
        if len(self._cycles) < 2:
            return None
        (first, steps_then), (last, steps) = self._cycles[0], self._cycles[-1]
        n_cycles = len(self._cycles) - 1
        cycles_left = math.ceil(
            (self.total - steps) * n_cycles / (steps - steps_then)
        )  # training ends with a whole one
        return max(cycles_left * (last - first) / n_cycles - (now - last), 0.0)


class ProgressCallback(BaseCallback):
    """A bar with steps, success rate of the rollouts, speed, latency of the teacher, elapsed time and time left.

    Where the output is not a terminal, a line at most every :data:`LINE_EVERY` seconds.

    :param total: environment steps at the end
    :param clock: tells the seconds
    """

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.pace = Pace(total)
        self.clock = clock
        self._bar = Progress(BarColumn(bar_width=20), _Line(self), refresh_per_second=4)
        self._task = self._bar.add_task("", total=total)
        self._start = (0.0, 0)
        self._printed = 0.0
        self._success: float | None = None

    def _on_training_start(self) -> None:
        self._start = (self.clock(), self.num_timesteps)
        self._printed = self._start[0]
        self._bar.start()

    def _on_rollout_start(self) -> None:
        now = self.clock()
        self.pace.begin_cycle(now, self.num_timesteps)
        if not self._bar.console.is_terminal and now - self._printed >= LINE_EVERY:
            self._printed = now
            print(self.line(), flush=True)

    def _on_step(self) -> bool:
        self._bar.update(self._task, completed=self.num_timesteps)
        return True

    def _on_rollout_end(self) -> None:
        if self.model.ep_success_buffer:
            self._success = safe_mean(self.model.ep_success_buffer)

    def line(self) -> str:
        """``42% | 21,504/51,200 steps | success 34% | 0:04:04 elapsed | 0:05:37 left | 88 fps``"""
        now, total = self.clock(), self.pace.total
        start, steps = self._start
        parts = [f"{min(self.num_timesteps / total, 1):.0%}", f"{self.num_timesteps:,}/{total:,} steps"]
        if self._success is not None:
            parts.append(f"success {self._success:.0%}")
        left = self.pace.time_left(now)
        parts += [
            f"{_clock(now - start)} elapsed",
            "time left not known yet" if left is None else f"{_clock(left)} left",
        ]
        parts.append(f"{(self.num_timesteps - steps) / max(now - start, 1e-9):.0f} fps")
        vec_teacher = find_vec_teacher(self.model.env)
        if vec_teacher is not None and vec_teacher.label_latency is not None:
            parts.append(f"label {1000 * vec_teacher.label_latency:.0f} ms")
        return " | ".join(parts)

    def close(self) -> None:
        """Take the bar away; also needed when training was interrupted."""
        if self.model is not None:
            self._bar.update(self._task, completed=self.num_timesteps)
        self._bar.stop()


class _Line(ProgressColumn):
    """The callback's line, made anew whenever the bar is drawn: its times go on during an update."""

    def __init__(self, callback: ProgressCallback) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.callback = callback

    def render(self, task: Task) -> Text:
        return Text("" if self.callback.model is None else self.callback.line())


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
