"""The report as one HTML page about one or more runs; the same runs always give the same page."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipeline import report_plots
from pipeline.report_data import (
    SPLIT_ORDER,
    Confusion,
    PredictionRow,
    RunData,
    ScoreRow,
    confident_mistakes,
    confusions,
    shortfalls,
)
from pipeline.report_plots import Curve
from stages.manifest import Split

_SHOWN_MISTAKES = 10


@dataclass(frozen=True)
class Notice:
    """What a reader must know of a run before any number, and the command that mends it."""

    run: str
    text: str
    command: str | None = None


@dataclass(frozen=True)
class LegendEntry:
    """One series' name beside its colour and dash pattern."""

    label: str
    colour: str
    dash: str


@dataclass(frozen=True)
class Figure:
    """A plot and the line below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class FigureGroup:
    """Plots that share a legend; `note` is empty if nothing more is to be said of them."""

    title: str
    legend: list[LegendEntry]
    figures: list[Figure]
    note: str


@dataclass(frozen=True)
class AccuracySection:
    """All runs' scores on one split; `rows` holds each task's scores in the runs' order, None where there is none."""

    split: Split
    rows: list[tuple[str, list[ScoreRow | None]]]
    legend: list[LegendEntry]
    figure: Figure


@dataclass(frozen=True)
class AnswersSection:
    """What one run answered on one split."""

    split: Split
    confusions: list[Confusion]
    mistakes: list[PredictionRow]
    num_wrong: int


def render(runs: Sequence[RunData]) -> str:
    """Return the whole page: no script, and nothing in it is fetched from anywhere."""
    environment = Environment(
        loader=PackageLoader("pipeline", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, floors=_floors)
    page: str = environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs),
        runs=runs,
        notices=list(_notices(runs)),
        overview=_overview(runs),
        accuracy=list(_accuracy(runs)),
        training=list(_training(runs)),
        answers=[_answers(run) for run in runs],
        stamps=[json.dumps(dict(run.stamp), indent=2, sort_keys=True) for run in runs],
    )
    return page


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _floors(scores: Sequence[ScoreRow | None]) -> str:
    """The majority floor of a task; runs that were scored on different samples have different ones."""
    return " / ".join(dict.fromkeys(_percent(score.floor) for score in scores if score is not None))


def _notices(runs: Sequence[RunData]) -> Iterator[Notice]:
    for run in runs:
        for line in shortfalls(run):
            yield Notice(run.name, line)
        if not run.log.rows:
            yield Notice(run.name, "no training step is logged yet")
        if not run.evaluations:
            command = f"pipeline evaluate --run {shlex.quote(str(run.path))}"
            yield Notice(
                run.name, "not evaluated yet, so this page has no accuracies for it; to add them, run", command
            )


def _overview(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Facts about the runs: a name, and one value for each run."""
    facts = [_facts(run) for run in runs]
    return [(name, [fact[name] for fact in facts]) for name in facts[0]]


def _facts(run: RunData) -> dict[str, str]:
    config, stamp, last = run.config, run.stamp, run.log.last
    alignment = config.alignment
    levels = ", ".join(map(str, alignment.levels))
    samples = ", ".join(f"{count} {split}" for split, count in sorted((stamp.get("samples") or {}).items()))
    return {
        "folder": str(run.path),
        "data set": config.data.dataset,
        "task": config.data.task,
        "preset": config.preset,
        "distillation": f"lambda {alignment.kd_weight:g}, levels {levels}, weighting {alignment.weighting}"
        if alignment.kd_weight > 0
        else "off",
        "samples": samples or "unknown",
        "trained": "nothing yet"
        if last is None
        else f"{last.step + 1} steps, epoch {int(last.__pydantic_extra__['epoch']) + 1} of {config.train.epochs}",
        "best validation": _best_validation(run),
        "created": str(stamp.get("created", "unknown")),
        "source": str(stamp.get("git") or "unknown"),
        "cache fingerprint": str(stamp.get("fingerprint", "unknown"))[:16],
    }


def _best_validation(run: RunData) -> str:
    accuracy = run.log.series("val", "top1")
    if accuracy is None:
        return "none"
    best = int(accuracy.values.argmax())
    return f"{_percent(accuracy.values[best])} at step {int(accuracy.steps[best])}"


def _run_legend(runs: Sequence[RunData]) -> list[LegendEntry]:
    return [_entry(run.name, slot) for slot, run in enumerate(runs)]


def _entry(label: str, slot: int) -> LegendEntry:
    return LegendEntry(label, report_plots.colour_of(slot), report_plots.dash_of(slot))


def _accuracy(runs: Sequence[RunData]) -> Iterator[AccuracySection]:
    for split in [split for split in SPLIT_ORDER if any(split in run.evaluations for run in runs)]:
        scores = [run.evaluations[split].scores if split in run.evaluations else {} for run in runs]
        tasks = list(dict.fromkeys(task for by_task in scores for task in by_task))
        shown = [(slot, by_task) for slot, by_task in enumerate(scores) if by_task]
        svg = report_plots.accuracy_plot(f"accuracy-{split}", f"Accuracy by task on {split}", tasks, shown)
        caption = "Bars: accuracy. Whiskers: 95% interval. Dashed marks: majority floor."
        rows = [(task, [by_task.get(task) for by_task in scores]) for task in tasks]
        legend = [_entry(runs[slot].name, slot) for slot, _ in shown]
        yield AccuracySection(split, rows, legend, Figure(svg, caption))


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


def _training(runs: Sequence[RunData]) -> Iterator[FigureGroup]:
    losses = [_run_curves(runs, split, name, caption) for split, name, caption in _LOSSES]
    shown = [figure for figure in losses if figure is not None]
    if shown:
        yield FigureGroup("Losses and validation", _run_legend(runs), shown, _note(runs))
    levels = sorted({level for run in runs for level in run.log.levels()})
    if levels:
        yield _levels_of_one(runs[0], levels) if len(runs) == 1 else _levels_of_many(runs, levels)


_LEVEL_NUMBERS = (
    ("cosine", "Cosine between projected hidden state and teacher target"),
    ("weight", "Weight of the level (Eq. 6)"),
)


def _levels_of_one(run: RunData, levels: Sequence[int]) -> FigureGroup:
    """All levels of the only run in one plot."""
    figures = []
    for kind, caption in _LEVEL_NUMBERS:
        found = [(slot, run.log.series("train", f"{kind}/{level}")) for slot, level in enumerate(levels)]
        figures.append(_figure(kind, caption, [Curve(slot, series) for slot, series in found if series is not None]))
    legend = [_entry(f"level {level}", slot) for slot, level in enumerate(levels)]
    return FigureGroup("Aligned levels", legend, figures, _note([run]))


def _levels_of_many(runs: Sequence[RunData], levels: Sequence[int]) -> FigureGroup:
    """One plot for each level, the runs laid over each other."""
    figures = [
        _run_curves(runs, "train", f"{kind}/{level}", f"Level {level}: {caption[0].lower()}{caption[1:]}")
        for kind, caption in _LEVEL_NUMBERS
        for level in levels
    ]
    shown = [figure for figure in figures if figure is not None]
    return FigureGroup("Aligned levels", _run_legend(runs), shown, _note(runs))


def _run_curves(runs: Sequence[RunData], split: Split, name: str, caption: str) -> Figure | None:
    found = [(slot, run.log.series(split, name)) for slot, run in enumerate(runs)]
    curves = [Curve(slot, series) for slot, series in found if series is not None]
    if not curves:
        return None
    return _figure(f"{split}-{name.replace('/', '-')}", caption, curves, percent=name in _SHARES)


def _figure(name: str, caption: str, curves: Sequence[Curve], *, percent: bool = False) -> Figure:
    description = f"{caption} over training steps"
    return Figure(report_plots.curves_plot(name, description, curves, percent=percent), caption)


def _note(runs: Sequence[RunData]) -> str:
    """Say so if long trainings are drawn with fewer points than they have steps."""
    losses = [run.log.series("train", "loss") for run in runs]
    most = max((report_plots.thin(series)[1] for series in losses if series is not None), default=1)
    return f"Where there are too many steps to draw, a point is the mean of up to {most} of them." if most > 1 else ""


def _answers(run: RunData) -> AnswersSection | None:
    """What the run answered on the first split that it was evaluated on."""
    evaluation: Any = next(iter(run.evaluations.values()), None)
    if evaluation is None or not evaluation.predictions:
        return None
    wrong = sum(not row.correct for row in evaluation.predictions)
    mistakes = confident_mistakes(evaluation.predictions, _SHOWN_MISTAKES)
    return AnswersSection(evaluation.split, confusions(run, evaluation), mistakes, wrong)
