"""The study's pictures: forest plots of differences with their intervals, and the curve over lambda."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.claims.effects import Effect
from pipeline.reporting.figure_style import ON_WHITE
from stages.atomic import atomic_path

Row = tuple[str, Mapping[str, Effect]]

# Okabe and Ito's colours, and a marker of its own for each group.
_LINES = {"fine": ("#0072b2", "o"), "coarse": ("#c75500", "s"), "over time": ("#00795c", "^"), "all": ("#1b1f24", "D")}
_INK, _ZERO = "#0072b2", "#636b78"
_ASIDE = 0.08


def write_forest(path: Path, sections: Mapping[str, Sequence[Row]], panels: Sequence[str], *, title: str) -> None:
    """One row a comparison, below its section's heading; one panel a statistic, in points with 95 % intervals.

    Args:
        path: SVG file.
        sections: rows, each a label and its effects by statistic.
        panels: the statistics shown, left to right; every row has them.
        title: above all panels.
    """
    lines: list[tuple[str, Mapping[str, Effect] | None]] = []
    for heading, rows in sections.items():
        lines += [(heading.upper(), None), *rows]
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(2.6 + 2.2 * len(panels), 1.3 + 0.27 * len(lines)), facecolor="white")
        all_axes = figure.subplots(1, len(panels), sharey=True, sharex=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            axes.axvline(0, color=_ZERO, linewidth=1)
            for place, (_, effects) in enumerate(lines):
                if effects is not None:
                    _mark(axes, place, effects[panel])
            axes.set_title(panel)
        all_axes[0].set_yticks(range(len(lines)), [label for label, _ in lines])
        all_axes[0].set_ylim(len(lines) - 0.5, -0.5)
        figure.supxlabel("difference in points, 95 % interval over videos and seeds")
        figure.suptitle(title)
        _save(figure, path)


def _mark(axes: Axes, place: int, effect: Effect) -> None:
    axes.plot([100 * end for end in effect.ci95], [place, place], color=_INK, linewidth=1.6)
    axes.plot([100 * effect.difference], [place], marker="o", color=_INK, markersize=5)


def write_lambda(path: Path, curve: Sequence[tuple[float, Mapping[str, Effect]]]) -> None:
    """Differences from lambda 0 of each group, in points with 95 % intervals.

    Args:
        path: SVG file.
        curve: lambda and its effects by group, ascending and without 0, whose difference is 0 by definition.
    """
    names = ["0", *(f"{kd_weight:g}" for kd_weight, _ in curve)]
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(7.2, 4.2), facecolor="white")
        axes = figure.subplots()
        axes.axhline(0, color=_ZERO, linewidth=1)
        for number, (group, (colour, marker)) in enumerate(_LINES.items()):
            shift = (number - (len(_LINES) - 1) / 2) * _ASIDE
            places = [place + shift for place in range(len(names))]
            values = [0.0, *(100 * effects[group].difference for _, effects in curve)]
            axes.plot(places, values, color=colour, marker=marker, markersize=5, linewidth=1.2, label=group)
            ends = [[100 * effects[group].ci95[side] for _, effects in curve] for side in (0, 1)]
            axes.vlines(places[1:], *ends, color=colour, linewidth=1.2)
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("lambda of Eq. 9 (steps are not to scale)")
        axes.set_ylabel("difference from lambda 0, points")
        figure.legend(loc="outside upper center", frameon=False, ncols=len(_LINES))
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})
