"""All evaluations as one tidy table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rpd_sb3.report.groups import Group
from rpd_sb3.report.records import Rate, Record


def to_csv(environments: Mapping[str, Sequence[Group]]) -> str:
    """One row for each run and evaluation; empty where a number is not known."""
    rows = [
        _row(group, record, i)
        for groups in environments.values()
        for group in groups
        for record in group.records
        for i in range(len(record.evaluations.timesteps))
    ]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _row(group: Group, record: Record, i: int) -> dict[str, Any]:
    evaluations = record.evaluations
    returns = evaluations.returns[i]
    rate = None if evaluations.once is None else Rate.of(evaluations.once[i])
    return {
        "run": str(record.run.folder),
        "algo": record.algo,
        "env": record.run.args["env"],
        "group": group.label,
        "seed": record.seed,
        "complete": record.complete,
        "timesteps": int(evaluations.timesteps[i]),
        "n_episodes": len(returns),
        "success_once": None if rate is None else rate.mean,
        "ci95_low": None if rate is None else rate.low,
        "ci95_high": None if rate is None else rate.high,
        "success_at_end": None if evaluations.at_end is None else float(np.mean(evaluations.at_end[i])),
        "mean_return": float(returns.mean()),
        "std_return": float(returns.std()),
        "mean_length": float(np.mean(evaluations.lengths[i])),
        "teacher": group.teacher_name,
        "teacher_success_once": record.teacher("success_once"),
        "teacher_success_at_end": record.teacher("success_at_end"),
        "teacher_mean_return": record.teacher("mean_return"),
        "student_parameters": record.result.get("student_parameters"),
    }
