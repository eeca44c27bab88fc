"""A study as one picture: a panel for each task, a point for each member, error bars over seeds, the floor beside."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.reporting.figure_style import ON_WHITE
from pipeline.studies.record import StudyRecord
from stages.atomic import atomic_path

_COLUMNS = 3
_PANEL_INCHES = (4.2, 3.1)
_DPI = 150
_ASIDE = 0.15
# Points that an axis spans at least, so that a sample or two more do not look like much.
_LEAST_SPAN = 10.0
# Okabe and Ito's colour-blind-safe blue, vermilion and grey, and one shape for each meaning.
_OURS, _PAPER, _FLOOR, _SEED = "#0072b2", "#c75500", "#636b78", "#56a8e4"


def write_plots(record: StudyRecord, folder: Path) -> list[Path]:
    """Draw `plot.svg` and `plot.png` into a folder; nothing while no member is done."""
    if not record.tasks:
        return []
    with mpl.rc_context(ON_WHITE):
        figure = _draw(record)
        paths = [folder / "plot.svg", folder / "plot.png"]
        with atomic_path(paths[0]) as temporary:
            FigureCanvasSVG(figure).print_svg(temporary, metadata={"Date": None})
        with atomic_path(paths[1]) as temporary, temporary.open("wb") as file:
            FigureCanvasAgg(figure)
            figure.savefig(file, format="png", dpi=_DPI)
    return paths


def _draw(record: StudyRecord) -> Figure:
    tasks = record.tasks
    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(columns * _PANEL_INCHES[0], rows * _PANEL_INCHES[1] + 0.9), facecolor="white")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, task in zip(panels, tasks, strict=False):
        _panel(axes, record, task)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    figure.suptitle(f"{record.title}: top-1 on {record.split} of {record.dataset}, preset {record.preset}")
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    wide = min(len(handles), 2 * columns)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=wide, frameon=False)
    return figure


def _panel(axes: Axes, record: StudyRecord, task: str) -> None:
    names = [member.label for member in record.members]
    shown = [(place, member.tasks[task]) for place, member in enumerate(record.members) if task in member.tasks]
    # Beside the mean, so that neither hides the other.
    seeds = [(place + _ASIDE, 100 * top1) for place, line in shown for top1 in line.by_seed.values()]
    if len(record.seeds) > 1:
        places, values = zip(*seeds, strict=True)
        axes.scatter(places, values, s=12, color=_SEED, label="one seed", zorder=2)
    axes.errorbar(
        [place for place, _ in shown],
        [100 * line.mean for _, line in shown],
        yerr=[100 * (line.std or 0.0) for _, line in shown],
        fmt="o",
        color=_OURS,
        capsize=4,
        label="mean and standard deviation over seeds" if len(record.seeds) > 1 else "one seed",
        zorder=3,
    )
    if record.paper_task == (record.dataset, task):
        printed = [(place, one.paper) for place, one in enumerate(record.members) if one.paper is not None]
        places, values = zip(*printed, strict=True)
        axes.scatter(places, values, marker="D", s=34, facecolors="none", edgecolors=_PAPER, label="the paper's")
    axes.axhline(100 * record.floors[task], color=_FLOOR, linestyle="--", linewidth=1.2, label="majority floor")
    low, high = axes.get_ylim()
    more = max(0.0, _LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - more, high + more)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylabel("top-1, percent")
    axes.set_title(task)
