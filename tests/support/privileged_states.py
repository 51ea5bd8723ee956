"""States of the simulator for scripted teachers."""

from __future__ import annotations

import numpy as np

from rpd_sb3.contract.privileged import SIZE, field_slices

SLICES = field_slices()


def random_states(n: int, seed: int = 0) -> np.ndarray:
    """Anything that fits on the table, hand and things turned any way."""
    rng = np.random.default_rng(seed)
    states = rng.normal(0.0, 0.2, (n, SIZE))
    for name, where in SLICES.items():
        if name.endswith("pose"):
            quat = states[:, where][:, 3:]
            quat /= np.linalg.norm(quat, axis=-1, keepdims=True)
    states[:, SLICES["gripper"]] = rng.uniform(0.0, 0.04, (n, 1))
    return states.astype(np.float32)
