"""The report's plots as SVG text that takes its colours from the page, so that light and dark both read well.

Plots are drawn in placeholder colours; `_inline` replaces them by CSS variables that the page's style sheet sets.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report_data import ScoreRow, Series

NUM_COLOURS = 6
"""How many series colours the style sheet defines; further series repeat them with another dash."""
DASHES = ("", "6 3", "2 2")
"""Dash patterns, one for each round through the colours."""

_INK, _GRID = "#020000", "#020001"
_SERIES = [f"#0100{index:02x}" for index in range(NUM_COLOURS)]
_MOST_POINTS = 400
_SETTINGS = {
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's font
    "svg.hashsalt": "diff-lmm",  # the same run gives the same page
    "text.parse_math": False,  # names come from data; a $ in one is a dollar sign
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "figure.facecolor": "none",  # the page shows through
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Curve:
    """One line of a plot; `slot` counts from 0 and decides colour and dash."""

    slot: int
    series: Series


def colour_of(slot: int) -> str:
    """The CSS colour of a series."""
    return f"var(--series-{slot % NUM_COLOURS})"


def dash_of(slot: int) -> str:
    """The dash pattern of a series, as SVG writes it; empty for a solid line."""
    return DASHES[slot // NUM_COLOURS % len(DASHES)]


def accuracy_plot(
    name: str, description: str, tasks: Sequence[str], runs: Sequence[tuple[int, Mapping[str, ScoreRow]]]
) -> str:
    """Horizontal bars of accuracy with interval whiskers and a mark at each floor.

    Args:
        name: unique on the page; a prefix of every id in the SVG.
        description: what the plot shows, for people who cannot see it.
        tasks: from top to bottom.
        runs: slot and scores by task of each run.
    """
    row_in = 0.17 * len(runs) + 0.17
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.6, 0.55 + row_in * len(tasks)))
        axes = figure.add_subplot()
        height = 0.78 / len(runs)
        for place, (slot, scores) in enumerate(runs):
            for row, task in enumerate(tasks):
                if task in scores:
                    _bar(axes, row - 0.39 + (place + 0.5) * height, height, _SERIES[slot % NUM_COLOURS], scores[task])
        axes.set(xlim=(0, 1), ylim=(len(tasks) - 0.45, -0.55))
        axes.set_yticks(range(len(tasks)), tasks)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        return _inline(figure, name, description)


def _bar(axes: Axes, y: float, height: float, colour: str, score: ScoreRow) -> None:
    axes.barh(y, score.top1, height * 0.92, color=colour, alpha=0.6)
    low, high = score.ci95
    whisker = [[score.top1 - low], [high - score.top1]]
    axes.errorbar(score.top1, y, xerr=whisker, fmt="none", ecolor=_INK, elinewidth=1.2, capsize=2.5, capthick=1.2)
    axes.vlines(score.floor, y - height / 2, y + height / 2, color=_INK, linewidth=2.2, linestyle=(0, (1.2, 0.7)))


def curves_plot(name: str, description: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """Lines over training steps; see `accuracy_plot` for `name` and `description`."""
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=(4.2, 2.5))
        axes = figure.add_subplot()
        for curve in curves:
            thinned, _ = thin(curve.series)
            dash = [float(length) for length in dash_of(curve.slot).split()]
            axes.plot(
                thinned.steps,
                thinned.values,
                color=_SERIES[curve.slot % NUM_COLOURS],
                linewidth=1.5,
                linestyle=(0, dash) if dash else "-",
                marker="o" if len(thinned.steps) <= 30 else None,
                markersize=2.5,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        return _inline(figure, name, description)


def thin(series: Series) -> tuple[Series, int]:
    """Average runs of neighbouring points until few enough are left to draw; returns how many make one."""
    per_point = -(-len(series.steps) // _MOST_POINTS)
    if per_point <= 1:
        return series, 1
    starts = np.arange(0, len(series.steps), per_point)
    sizes = np.diff([*starts, len(series.steps)])
    return Series(*(np.add.reduceat(values, starts) / sizes for values in (series.steps, series.values))), per_point


def _inline(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an `<svg>` element that may stand in a page among others."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata={**nothing, "Title": description})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    figure.clear()
    # The page's style decides the size, up to the drawn one.
    drawn = re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="max-width: \2pt" role="img"', drawn
    )
    drawn = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", drawn)
    drawn = re.sub(r"#0100(\d\d)", lambda match: colour_of(int(match[1], 16)), drawn)
    return drawn.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
