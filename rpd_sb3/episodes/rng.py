"""Random generators that evaluations leave alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch as th


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restores Python's, NumPy's and PyTorch's global generators at the end."""
    python = random.getstate()
    numpy = np.random.get_state()  # noqa: NPY002
    try:
        with th.random.fork_rng(devices=range(th.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
