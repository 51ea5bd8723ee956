"""SIGINT and SIGTERM as one exception that never leaves a file or a network half written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupt:
    """Turns SIGINT and SIGTERM into one KeyboardInterrupt; the second signal kills as usual.

    Inside :meth:`deferred`, and between the start and the end of each optimiser step of :meth:`watch`, it waits for the end: neither files nor
    networks are left half written.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came."""
        self._depth = 0
        self._due = False
        self._old: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        return 128 + (self.signum or signal.SIGINT)

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread gets signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for other in self._old:
            signal.signal(other, signal.SIG_DFL)
        print("stopping; once more to kill", file=sys.stderr, flush=True)
        self._due = True
        self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._due and self._depth == 0:
            self._due = False
            raise KeyboardInterrupt

    def _begin(self, *_: Any) -> None:
        self._depth += 1

    def _end(self, *_: Any) -> None:
        self._depth -= 1
        self._raise_if_due()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A KeyboardInterrupt that is due inside is raised at the end."""
        self._begin()
        try:
            yield
        finally:
            self._depth -= 1
        self._raise_if_due()

    def watch(self, optimizer: Any) -> None:
        """Do not interrupt this PyTorch optimiser in the middle of a step."""
        optimizer.register_step_pre_hook(self._begin)
        optimizer.register_step_post_hook(self._end)
