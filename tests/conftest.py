"""One thread, and the same random numbers for every test."""

import os
import random

# The networks and pictures here are small: more threads, also of the processes that tests start, only contend with
# pytest's worker processes.
os.environ.update(OMP_NUM_THREADS="1", LP_NUM_THREADS="1")

import numpy as np
import pytest
import torch as th

SEED = 0

th.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (ManiSkill and Stable-Baselines3 draw from the global generator)
    th.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Walkthroughs first: they take longest, and the last test of a run should not keep the other worker waiting."""
    items.sort(key=lambda item: item.path.name != "test_examples.py")
