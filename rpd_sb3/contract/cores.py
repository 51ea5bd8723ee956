"""What this process may use of the machine."""

from __future__ import annotations

import os


def n_cores() -> int:
    """CPU cores that this process may use: fewer than the machine's under ``taskset`` or Slurm."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
