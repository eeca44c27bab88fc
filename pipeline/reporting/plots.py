"""Curves as SVG text that takes its colours from the page, so that light and dark both read well.

Plots are drawn in placeholder colours; `_inline` replaces them by CSS variables that the page's style sheet sets.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.reporting.figure_style import STYLE
from pipeline.reporting.runs import Series

NUM_COLOURS = 6
"""How many series colours the style sheet defines."""
DASHES = ("", "7 3", "2 2", "9 3 2 3", "4 2", "1 2.5")
"""Dash patterns; neighbouring series differ in both colour and dash, so that neither has to be seen."""

_INK, _GRID = "#020000", "#020001"
_SERIES = [f"#0100{index:02x}" for index in range(NUM_COLOURS)]
_MOST_POINTS = 400
# Up to so many points are marked one by one.
_MARKED_POINTS = 30
_SETTINGS = {
    **STYLE,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _GRID,
    "figure.facecolor": "none",  # the page shows through
    "axes.facecolor": "none",
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
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
    return DASHES[(slot + slot // NUM_COLOURS) % len(DASHES)]


def curves_plot(name: str, description: str, curves: Sequence[Curve], *, percent: bool = False) -> str:
    """Lines over training steps.

    Args:
        name: unique on the page; a prefix of every id in the SVG.
        description: what the plot shows, for people who cannot see it.
        percent: whether the values are shares.
    """
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
                linewidth=1.6,
                linestyle=(0, [length / 1.6 for length in dash]) if dash else "-",
                marker="o" if len(thinned.steps) <= _MARKED_POINTS else None,
                markersize=2.5,
            )
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
            axes.set_ylim(bottom=0)
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
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    figure.clear()
    # The page's style decides the size, up to the drawn one.
    label = escape(description, quote=True).replace("\\", r"\\")
    drawn = re.sub(
        r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"',
        rf'\1 style="max-width: \2pt" role="img" aria-label="{label}"',
        drawn,
    )
    drawn = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", drawn)
    drawn = re.sub(r"(font(?:-family)?: [^;\"]*?)'DejaVu Sans'[^;\"]*", r"\1inherit", drawn)
    drawn = re.sub(r"#0100(\d\d)", lambda match: colour_of(int(match[1], 16)), drawn)
    return drawn.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
