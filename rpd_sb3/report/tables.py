"""The tables of a report, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import yaml

from rpd_sb3.report import words
from rpd_sb3.report.groups import Group, differences, flatten, mean
from rpd_sb3.report.records import Rate, Record
from rpd_sb3.report.words import DASH

OLDER = "the run was made by an older version, or has not ended"


class Cell(NamedTuple):
    """Text of a table, and a detail in small print."""

    text: str
    detail: str = ""
    note: int | None = None
    """Number of a footnote."""
    bar: float | None = None
    """Share of the cell's width to be filled."""


class Row(NamedTuple):
    name: str
    cells: list[Cell]
    colour: int | None = None
    """Of the group's curve."""


class Table(NamedTuple):
    columns: list[str]
    rows: list[Row]
    notes: list[str]
    """Footnotes, the first is 1."""


def success_table(groups: Sequence[Group]) -> Table:
    """Success of teacher and students at their last evaluations."""
    success = all(group.has_success for group in groups)
    columns = (["success once", "at the end"] if success else ["return"]) + ["episodes", "seeds", "steps", "training"]
    rows: list[Row] = []
    for colour, group in enumerate(groups):
        name = f"teacher {group.teacher_name}"
        if group.teacher_value is not None and name not in (row.name for row in rows):
            rates = [_rate(group.teacher_rate(key)) for key in ("success_once", "success_at_end")]
            outcome = rates if success else [Cell(words.value(group, group.teacher_value))]
            n = group.records[0].teacher("n_episodes")
            rows.append(Row(name, [*outcome, Cell(f"{n}"), *[Cell("")] * 3]))
        episodes = sum(record.evaluations.returns.shape[1] for record in group.records)
        steps = sorted({int(record.evaluations.timesteps[-1]) for record in group.records})
        seconds = [_training(record) for record in group.records]
        outcome = [_rate(group.rate("once")), _rate(group.rate("at_end"))] if success else [_returns(group)]
        cells = [
            Cell(f"{episodes}"),
            Cell(f"{len(group.records)}", ", ".join(str(record.seed) for record in group.records)),
            Cell(" to ".join(f"{n:,}" for n in dict.fromkeys((steps[0], steps[-1])))),
            Cell(words.duration(mean(seconds)), note=None if mean(seconds) is not None else 1),
        ]
        rows.append(Row(group.label, outcome + cells, colour))
    unknown = any(cell.note for row in rows for cell in row.cells)
    return Table(columns, rows, ["not known of runs that have not ended, or were resumed"] * unknown)


def cost_table(groups: Sequence[Group]) -> Table:
    """Each student below its teacher: success and cost of an action."""
    notes: list[str] = []

    def cell(text: str, why: str, detail: str = "") -> Cell:
        if text != DASH:
            return Cell(text, detail)
        if why not in notes:
            notes.append(why)
        return Cell(text, note=notes.index(why) + 1)

    rows: list[Row] = []
    for colour, group in enumerate(groups):
        slow = group.number("teacher_latency_ms.median")
        fast = group.number("latency_ms.median")
        name = f"teacher {group.teacher_name}"
        if group.teacher_name is not None and name not in (row.name for row in rows):
            rows.append(Row(name, _teacher_cells(group, slow, cell)))
        device = (group.records[0].result.get("latency_ms") or {}).get("device", "")
        speed_up = words.times(slow / fast) if slow and fast else DASH
        unknown = (
            "no teacher to compare with" if group.teacher_name is None else "one of the two latencies is not known"
        )
        cells = [
            cell(words.value(group, group.value), ""),
            cell(words.count(group.number("student_parameters")), OLDER),
            cell(words.size(group.number("student_bytes")), OLDER),
            cell(words.milliseconds(fast), OLDER, device),
            cell(speed_up, unknown),
        ]
        rows.append(Row(group.label, cells, colour))
    columns = ["success" if groups[0].has_success else "return", "parameters", "weights", "latency", "speed-up"]
    return Table(columns, rows, notes)


def _teacher_cells(group: Group, slow: float | None, cell: Any) -> list[Cell]:
    older = all("teacher_parameters" not in record.result for record in group.records)
    unknown = OLDER if older else "the teacher does not say; a scripted one has no weights, a remote one may not know"
    batch = group.number("teacher_latency_ms.batch")
    return [
        cell(words.value(group, group.teacher_value), "the run has not evaluated its teacher"),
        cell(words.count(group.number("teacher_parameters")), unknown),
        cell(words.size(group.number("teacher_bytes")), unknown),
        cell(words.milliseconds(slow), OLDER, "" if batch is None else f"of {batch:.0f}"),
        Cell(""),
    ]


def agreement_table(group: Group) -> Table | None:
    """Per action dimension, mean over the seeds; None if no run has compared student and teacher."""
    found = [record.result["agreement"] for record in group.records if record.result.get("agreement")]
    if not found:
        return None
    names = words.dimension_names(found[0].get("control_mode"), len(found[0]["bias"]))
    rows = []
    for i, name in enumerate(names):
        error, bias, spread = (
            float(np.mean([one[key][i] for one in found])) for key in ("mean_abs_difference", "bias", "teacher_std")
        )
        correlation = mean(one["correlation"][i] for one in found)
        cells = [
            Cell(f"{error:.3f}", bar=min(error / 2, 1.0)),  # actions lie in [-1, 1]
            Cell(words.signed(bias)),
            Cell(f"{spread:.3f}"),
            Cell(DASH if correlation is None else f"{correlation:.2f}".replace("-", "−")),
        ]
        rows.append(Row(name, cells))
    columns = ["mean |difference|", "bias", "teacher's std", "correlation"]
    n = sum(one["n_observations"] for one in found)
    return Table(columns, rows, [f"{n:,} observations of the student's own episodes"])


def difference_table(groups: Sequence[Group]) -> Table:
    """Keys of the configuration in which the groups differ."""
    rows = [
        Row(key, [Cell(DASH if value is ... else _plain(value)) for value in row])
        for key, row in differences(groups).items()
    ]
    return Table([group.label for group in groups], rows, [])


def config_rows(group: Group) -> list[tuple[str, str]]:
    """The whole configuration of a group's first run."""
    return [(key, _plain(value)) for key, value in flatten(group.records[0].config).items()]


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True).removesuffix("...\n").strip()


def _rate(rate: Rate | None) -> Cell:
    return (
        Cell(DASH) if rate is None else Cell(words.percent(rate.mean), f"{100 * rate.low:.0f} to {100 * rate.high:.0f}")
    )


def _returns(group: Group) -> Cell:
    last = np.concatenate([record.evaluations.returns[-1] for record in group.records])
    return Cell(f"{last.mean():.1f}", f"± {last.std():.1f}")


def _training(record: Record) -> float | None:
    """Seconds without evaluation; of a resumed run only the last part is known."""
    result = record.result
    if not isinstance(result.get("wall_s"), (int, float)) or result.get("resumed_at"):
        return None
    return float(result["wall_s"] - result.get("evaluation_s", 0.0))
