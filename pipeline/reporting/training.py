"""The curves of trainings: losses, validation, and every aligned level's cosine and weight."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.reporting import plots
from pipeline.reporting.plots import Curve
from pipeline.reporting.runs import RunData, Series
from stages.data.manifest import Split

_LOSSES: tuple[tuple[Split, str, str], ...] = (
    ("train", "loss", "Total loss (Eq. 9)"),
    ("train", "answer_loss", "Answer loss (Eq. 8)"),
    ("train", "kd_loss", "Distillation loss (Eq. 7)"),
    ("val", "top1", "Validation accuracy"),
    ("val", "answer_loss", "Validation answer loss"),
    ("train", "saturated", "Share of saturated weights (adaptive: above 0.99)"),
    ("train", "target_to_mean", "Cosine of teacher targets to their running mean"),
    ("train", "lr", "Learning rate"),
    ("train", "samples_per_s", "Samples per second"),
)
_SHARES = ("top1", "saturated")
_LEVEL_NUMBERS = (
    ("cosine", "Cosine between projected hidden state and teacher target"),
    ("weight", "Weight of the level (Eq. 6)"),
)


@dataclass(frozen=True)
class LegendEntry:
    """One series' name beside its colour and dash pattern."""

    label: str
    colour: str
    dash: str


@dataclass(frozen=True)
class Plot:
    """A plot, the line below it, and the same in words: where each of its curves begins and ends."""

    svg: str
    caption: str
    in_words: str


@dataclass(frozen=True)
class PlotGroup:
    """Plots that share a legend; `note` may be empty."""

    title: str
    legend: list[LegendEntry]
    plots: list[Plot]
    note: str


def plot_groups(runs: Sequence[RunData]) -> Iterator[PlotGroup]:
    """Losses first, then the levels: of one run all in one plot, of several runs one plot for each level."""
    losses = [_of_runs(runs, split, name, caption) for split, name, caption in _LOSSES]
    shown = [plot for plot in losses if plot is not None]
    if shown:
        yield PlotGroup("Losses and validation", _run_legend(runs), shown, _note(runs))
    levels = sorted({level for run in runs for level in run.log.levels()})
    if levels:
        yield _levels_of_one(runs[0], levels) if len(runs) == 1 else _levels_of_many(runs, levels)


def _levels_of_one(run: RunData, levels: Sequence[int]) -> PlotGroup:
    shown = []
    for kind, caption in _LEVEL_NUMBERS:
        found = [(slot, level, run.log.series("train", f"{kind}/{level}")) for slot, level in enumerate(levels)]
        curves = [(f"level {level}", Curve(slot, one)) for slot, level, one in found if one is not None]
        shown.append(_plot(kind, caption, curves))
    legend = [_entry(f"level {level}", slot) for slot, level in enumerate(levels)]
    return PlotGroup("Aligned levels", legend, shown, _note([run]))


def _levels_of_many(runs: Sequence[RunData], levels: Sequence[int]) -> PlotGroup:
    drawn = [
        _of_runs(runs, "train", f"{kind}/{level}", f"Level {level}: {caption[0].lower()}{caption[1:]}")
        for kind, caption in _LEVEL_NUMBERS
        for level in levels
    ]
    shown = [plot for plot in drawn if plot is not None]
    return PlotGroup("Aligned levels", _run_legend(runs), shown, _note(runs))


def _of_runs(runs: Sequence[RunData], split: Split, name: str, caption: str) -> Plot | None:
    found = [(slot, run, run.log.series(split, name)) for slot, run in enumerate(runs)]
    curves = [(run.name, Curve(slot, series)) for slot, run, series in found if series is not None]
    if not curves:
        return None
    return _plot(f"{split}-{name.replace('/', '-')}", caption, curves, percent=name in _SHARES)


def _plot(name: str, caption: str, named: Sequence[tuple[str, Curve]], *, percent: bool = False) -> Plot:
    svg = plots.curves_plot(name, f"{caption} over training steps", [curve for _, curve in named], percent=percent)
    spans = [_first_to_last(curve.series, percent=percent) for _, curve in named]
    if len(named) == 1:
        return Plot(svg, caption, spans[0])
    return Plot(svg, caption, "; ".join(f"{label} {span}" for (label, _), span in zip(named, spans, strict=True)))


def _first_to_last(series: Series, *, percent: bool) -> str:
    first, last = (f"{value:.1%}" if percent else f"{value:.4g}" for value in (series.values[0], series.values[-1]))
    return first if len(series.values) == 1 else f"{first} to {last}"


def _run_legend(runs: Sequence[RunData]) -> list[LegendEntry]:
    return [_entry(run.name, slot) for slot, run in enumerate(runs)]


def _entry(label: str, slot: int) -> LegendEntry:
    return LegendEntry(label, plots.colour_of(slot), plots.dash_of(slot))


def _note(runs: Sequence[RunData]) -> str:
    """A sentence if long trainings are drawn with fewer points than they have steps."""
    losses = [run.log.series("train", "loss") for run in runs]
    most = max((plots.thin(series)[1] for series in losses if series is not None), default=1)
    return f"Where there are too many steps to draw, a point is the mean of up to {most} of them." if most > 1 else ""
