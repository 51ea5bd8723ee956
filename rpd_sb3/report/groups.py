"""Groups of runs that differ in nothing but their seed, and their mean results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rpd_sb3.contract.statistics import wilson_interval
from rpd_sb3.report.records import Rate, Record


class MeanCurve(NamedTuple):
    """Mean and standard deviation over seeds at n points."""

    steps: np.ndarray
    """(n,)"""
    mean: np.ndarray
    """(n,)"""
    std: np.ndarray
    """(n,) 0 for a single seed."""


class Group(NamedTuple):
    """Runs of one algorithm, environment and configuration."""

    label: str
    records: list[Record]
    """By seed, at least one."""

    @property
    def has_success(self) -> bool:
        return all(record.evaluations.once is not None for record in self.records)

    @property
    def value(self) -> float:
        """Mean of the last evaluations: success at any step, or return where there is no success."""
        return float(np.mean([record.value for record in self.records]))

    @property
    def teacher_name(self) -> str | None:
        """The teacher with its options, e.g. ``scripted (noise 0.3)``; None if there is no teacher."""
        config = self.records[0].config
        if not config.get("teacher"):
            return None
        options = ", ".join(f"{key} {value}" for key, value in _without_seed(config).get("teacher_kwargs", {}).items())
        return f"{config['teacher']} ({options})" if options else str(config["teacher"])

    @property
    def teacher_value(self) -> float | None:
        """As :attr:`value`, of the teacher."""
        key = "success_once" if self.has_success else "mean_return"
        return mean(record.teacher(key) for record in self.records)

    def rate(self, name: str) -> Rate | None:
        """Success of the last evaluations, all episodes of all seeds together.

        :param name: ``once`` or ``at_end``
        """
        outcomes = [getattr(record.evaluations, name) for record in self.records]
        if any(rows is None for rows in outcomes):
            return None
        return Rate.of(np.concatenate([rows[-1] for rows in outcomes]))

    def teacher_rate(self, key: str) -> Rate | None:
        """The teacher's success; its episodes are the same in each run, so its interval counts them once.

        :param key: ``success_once`` or ``success_at_end``
        """
        rate = mean(record.teacher(key) for record in self.records)
        n = self.records[0].teacher("n_episodes")
        if rate is None or not n:
            return None
        return Rate(rate, *wilson_interval(round(rate * n), n), n)

    def number(self, key: str) -> float | None:
        """Mean over the runs of a number in ``result.json``.

        :param key: e.g. ``student_bytes``, or ``latency_ms.median`` of a nested one
        """
        return mean(flatten(record.result).get(key) for record in self.records)


def group_records(records: Iterable[Record]) -> dict[str, list[Group]]:
    """Environment to its groups, both in the order in which they were named."""
    environments: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        key = json.dumps([record.algo, _without_seed(record.config)], sort_keys=True, default=str)
        environments.setdefault(record.run.args["env"], {}).setdefault(key, []).append(record)
    return {env: _labelled(list(groups.values())) for env, groups in environments.items()}


def mean_curve(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> MeanCurve:
    """Mean and sample standard deviation of curves over the steps that all of them have reached.

    Between its points a curve is interpolated; none is continued beyond its ends.

    :param curves: steps (n,) ascending, and values (n,), of at least one run
    """
    first = max(steps[0] for steps, _ in curves)
    last = min(steps[-1] for steps, _ in curves)
    every = np.unique(np.concatenate([steps for steps, _ in curves]))
    grid = every[(every >= first) & (every <= last)]
    values = np.array([np.interp(grid, steps, y) for steps, y in curves]).reshape(len(curves), len(grid))
    std = values.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(len(grid))
    return MeanCurve(grid, values.mean(axis=0), std)


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known; None if none is."""
    known = [value for value in values if isinstance(value, (int, float))]
    return float(np.mean(known)) if known else None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as ``outer.inner`` to value."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Keys in which the groups' configurations differ, to the value of each group; ``Ellipsis`` where the key is missing."""
    flat = [flatten(_without_seed(group.records[0].config)) for group in groups]
    keys = dict.fromkeys(key for config in flat for key in config)
    rows = {key: [config.get(key, ...) for config in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def _labelled(groups: Sequence[list[Record]]) -> list[Group]:
    """Groups with the algorithm as their label and, where several have the same, what differs between them."""
    ordered = [sorted(records, key=lambda record: record.seed) for records in groups]
    labelled = []
    for i, records in enumerate(ordered):
        algo = records[0].algo
        same = [Group(algo, other) for other in ordered if other[0].algo == algo]
        own = next(j for j, group in enumerate(same) if group.records is records)
        words = [f"{key.split('.')[-1]} {row[own]}" for key, row in differences(same).items() if row[own] is not ...]
        suffix = ", ".join(words[:2]) if words and len(words) <= 2 else f"configuration {own + 1}"
        labelled.append(Group(f"{algo} ({suffix})" if len(same) > 1 else algo, ordered[i]))
    return labelled


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the seed of the teacher's noise."""
    teacher = {key: value for key, value in (config.get("teacher_kwargs") or {}).items() if key != "seed"}
    return dict(config) | ({"teacher_kwargs": teacher} if teacher or "teacher_kwargs" in config else {})
