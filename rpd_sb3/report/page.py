"""A report as one HTML page that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import rpd_sb3
from rpd_sb3.report import tables, words
from rpd_sb3.report.figures import COLOURS, Line, draw
from rpd_sb3.report.groups import Group, mean, mean_curve
from rpd_sb3.report.records import TEACHER_VIDEO, VIDEO

UPDATES = (
    ("train/entropy_loss", "entropy of the student", "nats", "linear"),
    ("train/approx_kl", "KL of an update", "nats", "log"),
    ("train/distill_loss", "distillation loss", "loss", "linear"),
    ("train/distill_kl", "KL to the teacher", "nats", "linear"),
    ("train/reverse_kl", "reverse KL to the teacher", "nats", "linear"),
    ("train/forward_kl", "forward KL to the teacher", "nats", "linear"),
)
"""Columns of ``progress.csv`` that are drawn where there are any: title, unit, scale. SB3 logs the entropy with a minus;
the KL of the first updates can be a thousand times that of the others."""


class Videos(NamedTuple):
    """Teacher and student on the same seeds, as base64; None where there is no video."""

    name: str
    teacher: str | None
    student: str | None
    taught: bool
    """False: the run has no teacher."""


def render(environments: Mapping[str, Sequence[Group]]) -> str:
    """The page.

    :param environments: to their groups
    """
    template = Environment(
        loader=PackageLoader("rpd_sb3.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html")
    records = [record for groups in environments.values() for group in groups for record in group.records]
    return template.render(
        title=words.headline(environments),
        sections=[section(f"e{i}", env, groups) for i, (env, groups) in enumerate(environments.items())],
        n_runs=len(records),
        version=rpd_sb3.__version__,
        colours=COLOURS,
    )


def section(name: str, env: str, groups: Sequence[Group]) -> dict[str, Any]:
    """The variables of the template for one environment.

    :param name: prefix of the ids in it
    """
    records = [record for group in groups for record in group.records]
    agreements = [(group.label, tables.agreement_table(group)) for group in groups]
    return {
        "env": env,
        "groups": groups,
        "remarks": remarks(groups),
        "any_teacher": any(group.teacher_value is not None for group in groups),
        "curves": learning_curves(name, env, groups),
        "success": tables.success_table(groups),
        "costs": tables.cost_table(groups),
        "agreements": [(label, table) for label, table in agreements if table is not None],
        "updates": update_curves(name, env, groups),
        "videos": [videos for group in groups if (videos := find_videos(group)) is not None],
        "differences": tables.difference_table(groups),
        "configs": [(group.label, tables.config_rows(group)) for group in groups],
        "commands": [command for record in records for command in record.run.commands],
        "runs": [
            (group.label, record, words.value(group, record.value)) for group in groups for record in group.records
        ],
    }


def remarks(groups: Sequence[Group]) -> list[str]:
    """What is missing, and in which runs."""
    records = [record for group in groups for record in group.records]
    taught = [record for record in records if record.has_teacher]
    kinds = (
        ([r for r in records if not r.complete], "Not ended, or stopped; the numbers are those so far"),
        ([r for r in taught if not r.result.get("teacher")], "Teacher not evaluated"),
        (
            [r for r in taught if r.complete and "agreement" not in r.result],
            f"No agreement and no costs, as {tables.OLDER}",
        ),
        (
            [r for r in taught if r.complete and r.result.get("agreement", ...) is None],
            "The actions could not be compared",
        ),
        ([r for r in records if r.complete and r.video(VIDEO) is None], "No video of the student"),
    )
    return [f"{text}: {', '.join(str(record.run.folder) for record in found)}." for found, text in kinds if found]


def learning_curves(name: str, env: str, groups: Sequence[Group]) -> list[tuple[str, Markup]]:
    """Title and figure of success at any step and at the last one, or of the return where there is no success."""
    kinds = [("returns", "mean_return", "return of an episode", "linear")]
    if all(group.has_success for group in groups):
        kinds = [
            ("once", "success_once", "success at any step", "share"),
            ("at_end", "success_at_end", "success at the last step", "share"),
        ]
    figures = []
    for field, key, title, scale in kinds:
        lines = []
        for colour, group in enumerate(groups):
            evaluations = [record.evaluations for record in group.records]
            seeds = [
                (found.timesteps, rows.mean(axis=1))
                for found in evaluations
                if (rows := getattr(found, field)) is not None
            ]
            if seeds:
                level = mean(record.teacher(key) for record in group.records)
                lines.append(Line(mean_curve(seeds), colour, seeds, level))
        if lines:
            describe = f"{title} over environment steps on {env}: {', '.join(group.label for group in groups)}"
            svg = draw(f"{name}{field}", describe, lines, title.split()[0], scale)
            figures.append((title.capitalize(), Markup(svg)))
    return figures


def update_curves(name: str, env: str, groups: Sequence[Group]) -> list[tuple[str, Markup]]:
    """Title and figure of :data:`UPDATES`, as far as the runs have logged them."""
    figures = []
    for number, (column, title, unit, scale) in enumerate(UPDATES):
        sign = -1.0 if column == "train/entropy_loss" else 1.0
        lines = []
        for colour, group in enumerate(groups):
            logged = [record.progress[column] for record in group.records if column in record.progress]
            if logged:
                lines.append(Line(mean_curve([(steps, sign * values) for steps, values in logged]), colour))
        if lines:
            svg = draw(f"{name}u{number}", f"{title} over environment steps on {env}", lines, unit, scale)
            figures.append((title[0].upper() + title[1:], Markup(svg)))
    return figures


def find_videos(group: Group) -> Videos | None:
    """The videos of the group's first run that has both, or else one."""
    best = max(group.records, key=lambda r: (r.video(VIDEO) is not None) + (r.video(TEACHER_VIDEO) is not None))
    student, teacher = (
        None if path is None else base64.b64encode(path.read_bytes()).decode("ascii")
        for path in map(best.video, (VIDEO, TEACHER_VIDEO))
    )
    if student is None and teacher is None:
        return None
    return Videos(f"{group.label}, seed {best.seed}", teacher, student, best.has_teacher)
