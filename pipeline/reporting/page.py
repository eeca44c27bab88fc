"""The report as one HTML page about one or more runs; the same runs always give the same page."""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.reporting import frames
from pipeline.reporting.accuracy import accuracy_groups, shown_evaluation, unit_of
from pipeline.reporting.departures import in_ranges
from pipeline.reporting.frames import Strip
from pipeline.reporting.mistakes import Examples, choose_examples
from pipeline.reporting.pages import page_environment
from pipeline.reporting.paired import paired_groups
from pipeline.reporting.paper import PaperSection, printed
from pipeline.reporting.runs import Evaluation, RunData, cautions, shortfalls
from pipeline.reporting.training import plot_groups
from stages.config import DataConfig
from stages.wording import counted


@dataclass(frozen=True)
class Notice:
    """What a reader must know of a run before any number, and the command that mends it."""

    run: str
    text: str
    command: str | None = None


@dataclass(frozen=True)
class Answers:
    """What one run answered; `strips` are the examples' pictures by sample id, `problem` one that all share."""

    evaluation: Evaluation
    examples: Examples
    strips: dict[str, Strip]
    problem: str


def render(runs: Sequence[RunData], paper: PaperSection | None = None) -> str:
    """Return the whole page: no script, and nothing in it is fetched from anywhere.

    Args:
        runs: may be none where there is `paper`.
        paper: the paper's tables with the runs' own numbers in them.
    """
    environment = page_environment()
    environment.filters.update(counted=counted, percent=_percent, span=_span, points=_points)
    environment.filters.update(printed=printed, in_ranges=in_ranges)
    page: str = environment.get_template("report.html").render(
        title=", ".join(run.name for run in runs) or "The paper's tables",
        runs=runs,
        notices=list(_notices(runs)),
        overview=_overview(runs),
        units=[unit_of(run) for run in runs],
        accuracy=list(accuracy_groups(runs)),
        paired=list(paired_groups(runs)),
        training=list(plot_groups(runs)),
        answers=[_answers(run) for run in runs],
        stamps=[json.dumps(dict(run.stamp), indent=2, sort_keys=True) for run in runs],
        paper=paper,
    )
    return page


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _span(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{100 * interval[0]:.1f} to {interval[1]:.1%}"


def _points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.1f}"


def _notices(runs: Sequence[RunData]) -> Iterator[Notice]:
    for run in runs:
        for line in (*shortfalls(run), *cautions(run)):
            yield Notice(run.name, line)
        for one in run.evaluations:
            if one.record.data.dataset != run.config.data.dataset:
                yield Notice(run.name, f"its answers on split {one.split} are to data set {one.record.data.dataset}")
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
    return [(name, [fact[name] for fact in facts]) for name in facts[0]] if facts else []


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
        "encoder": config.encoder.source,
        "teacher": config.teacher.source,
        "distillation": f"lambda {alignment.kd_weight:g}, levels {levels}, weighting {alignment.weighting}"
        if alignment.kd_weight > 0
        else "off",
        "seed": str(config.train.seed),
        "samples": samples or "unknown",
        "trained": "nothing yet"
        if last is None
        else f"{counted(last.step + 1, 'step')}, epoch {run.log.epoch} of {config.train.epochs}",
        "best validation": _best_validation(run),
        "created": str(stamp.get("created", "unknown")),
        "source": str(stamp.get("git") or "unknown"),
        "cache fingerprint": str(stamp.get("fingerprint", "unknown")),
    }


def _best_validation(run: RunData) -> str:
    accuracy = run.log.series("val", "top1")
    if accuracy is None:
        return "none"
    best = int(accuracy.values.argmax())
    return f"{_percent(accuracy.values[best])} at step {int(accuracy.steps[best])}"


def _answers(run: RunData) -> Answers | None:
    """What the run answered on the first split that it was evaluated on."""
    evaluation = shown_evaluation(run)
    if evaluation is None or not evaluation.predictions:
        return None
    examples = choose_examples(evaluation.predictions)
    every = (*examples.confident, *examples.hardest, *examples.right)
    asked = run.config.model_copy(update={"data": DataConfig.model_validate(evaluation.record.settings["data"])})
    shown = frames.strips(asked, [one.row.sample for one in every])
    problems = {strip.problem for strip in shown.values()}
    shared = problems.pop() if len(problems) == 1 else ""
    return Answers(evaluation, examples, shown, shared)
