"""Signals that wait for the end of what must not be interrupted."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch as th

from rpd_sb3.cli.interrupt import Interrupt


def test_signal_waits_for_the_end_of_a_deferred_block() -> None:
    done = []
    with Interrupt() as interrupt:
        with pytest.raises(KeyboardInterrupt), interrupt.deferred():  # noqa: PT012
            os.kill(os.getpid(), signal.SIGTERM)
            done.append("inside")
        done.append("after")
        with interrupt.deferred():
            done.append("once only")
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one kills
        assert interrupt.exit_code == 143
    assert done == ["inside", "after", "once only"]


def test_optimiser_step_is_not_interrupted() -> None:
    class Stubborn(th.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            os.kill(os.getpid(), signal.SIGINT)
            super().step()

    weight = th.nn.Parameter(th.ones(1))
    optimizer = Stubborn([weight], lr=1.0)
    weight.grad = th.ones(1)
    with Interrupt() as interrupt:
        interrupt.watch(optimizer)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert weight.item() == 0.0
