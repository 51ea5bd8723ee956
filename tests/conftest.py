"""One thread, and the same random numbers for every test."""

import random

import numpy as np
import pytest
import torch as th

SEED = 0

# The networks here are small: more threads only contend with pytest's worker processes.
th.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  (ManiSkill and Stable-Baselines3 draw from the global generator)
    th.manual_seed(SEED)
