"""Curves as SVG that takes its colours from the page, so that it is legible in light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rpd_sb3.report.groups import MeanCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = 7
"""Of the page: ``--c0`` to ``--c6``; more curves repeat them in other dashes."""
TEXT = "#010101"
GRID = "#020202"
DASHES = ("-", "-.", ":")
SIZE = (5.0, 3.1)
"""Inches, 360 x 223 points: about as wide as a phone, so that the letters are 10 pixels high there and more on a desk."""


class Line(NamedTuple):
    """One curve of a figure."""

    curve: MeanCurve
    colour: int
    seeds: Sequence[tuple[np.ndarray, np.ndarray]] = ()
    """Each seed's own steps and values, drawn thin."""
    level: float | None = None
    """Of the teacher, dashed."""


def draw(name: str, describe: str, lines: Sequence[Line], y_label: str, scale: str = "linear") -> str:
    """An ``<svg>`` element.

    :param name: prefix of the ids in it, different for each figure of a page
    :param describe: what is seen, for screen readers
    :param lines: what to draw
    :param y_label: of the axis
    :param scale: of the y axis: ``linear``, ``log``, or ``share`` for values from 0 to 1
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    settings: Any = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "rpd_sb3", "text.color": TEXT}
    settings |= {f"{axis}tick.color": TEXT for axis in "xy"} | {"axes.labelcolor": TEXT, "axes.edgecolor": GRID}
    with rc_context(settings):
        figure = Figure(figsize=SIZE, layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor="none")
        for line in lines:
            _add(axes, line)
        axes.set(xlabel="environment steps", ylabel=y_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlim(left=0)
        if scale == "log":
            axes.set_yscale("log")
        if scale == "share":
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _for_page(file.getvalue(), name, describe)


def _add(axes: Axes, line: Line) -> None:
    colour = f"#0303{line.colour % COLOURS:02x}"  # var(--c<number>) when the page is made
    style = DASHES[line.colour // COLOURS % len(DASHES)]
    steps, mean, std = line.curve
    marker = "o" if len(steps) == 1 else None
    for seed in line.seeds if len(line.seeds) > 1 else ():
        axes.plot(*seed, color=colour, linewidth=0.7, alpha=0.45, linestyle=style)
    axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    axes.plot(steps, mean, color=colour, linewidth=2, linestyle=style, marker=marker, markersize=4)
    if line.level is not None:
        axes.axhline(line.level, color=colour, linewidth=1.3, linestyle=(0, (5, 3)))


def _for_page(svg: str, name: str, describe: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'xlink:href="', 'href="', svg)
    svg = re.sub(r' (xmlns|xmlns:xlink|width|height|version)="[^"]*"', "", svg, count=5)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(describe)}"', 1)
    svg = svg.replace(TEXT, "var(--text)").replace(GRID, "var(--line)")
    return re.sub(r"#0303(0\d)", lambda match: f"var(--c{int(match[1])})", svg)
