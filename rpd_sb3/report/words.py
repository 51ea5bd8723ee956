"""Numbers as text, and the headline of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rpd_sb3.report.groups import Group

DASH = "–"
DIMENSIONS = {
    "pd_ee_delta_pose": ["x", "y", "z", "rotation x", "rotation y", "rotation z", "gripper"],
    "pd_ee_delta_pos": ["x", "y", "z", "gripper"],
}
"""ManiSkill's controllers to the names of their action dimensions."""
OTHERS = 2
"""Algorithms that the headline compares with the best one; tasks that it names besides the first."""


def percent(share: float | None) -> str:
    return DASH if share is None else f"{100 * share:.0f} %"


def count(number: float | None) -> str:
    """E.g. ``155,663`` or ``7.54 G``."""
    if number is None:
        return DASH
    for unit, name in ((1e9, "G"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:,.0f}"


def size(n_bytes: float | None) -> str:
    if n_bytes is None:
        return DASH
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.1f} {name}"
    return f"{n_bytes:.0f} B"


def milliseconds(value: float | None) -> str:
    """With two significant digits: ``0.10 ms``, ``12 ms``."""
    return DASH if value is None else f"{_two_digits(value)} ms"


def times(ratio: float) -> str:
    """``0.03×``, ``1.5×``, ``36,000×``"""
    return f"{_two_digits(ratio)}×"


def _two_digits(value: float) -> str:
    return f"{value:,.{0 if value >= 9.95 else 1 if value >= 0.995 else 2}f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def dimension_names(control_mode: Any, n: int) -> list[str]:
    """Names of n action dimensions, numbers where the controller is not known."""
    names = DIMENSIONS.get(str(control_mode), [])
    return names if len(names) == n else [str(i) for i in range(n)]


def value(group: Group, number: float | None) -> str:
    """A success rate, or a return if the group's environment reports no success."""
    return DASH if number is None else percent(number) if group.has_success else f"{number:.1f}"


def headline(environments: Mapping[str, Sequence[Group]]) -> str:
    """The report in one sentence, e.g. ``rpd_ppo reaches 97 % on PushCube-v1; its teacher 36 %, ppo 4 %``."""
    if len(environments) == 1:
        ((env, groups),) = environments.items()
        best, *others = ranked(groups)
        compared = [] if best.teacher_value is None else [f"its teacher {value(best, best.teacher_value)}"]
        compared += [f"{group.label} {value(group, group.value)}" for group in others[:OTHERS]]
        return f"{reaches(env, best)}{'; ' * bool(compared)}{', '.join(compared)}"
    parts = []
    for env, groups in list(environments.items())[: OTHERS + 1]:
        best = ranked(groups)[0]
        teacher = best.teacher_value
        parts.append(reaches(env, best) + (f" (teacher {value(best, teacher)})" if teacher is not None else ""))
    more = len(environments) - len(parts)
    return ", ".join(parts) + (f", and {more} more task{'s' * (more > 1)}" if more else "")


def ranked(groups: Sequence[Group]) -> list[Group]:
    """Best first; at a tie those with a teacher."""
    return sorted(groups, key=lambda group: (-group.value, group.teacher_name is None))


def reaches(env: str, group: Group) -> str:
    return f"{group.label} {'reaches' if group.has_success else 'returns'} {value(group, group.value)} on {env}"
