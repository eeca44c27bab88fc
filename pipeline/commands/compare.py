"""`pipeline compare`: two evaluations of the same samples, task by task."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pipeline.runs.results import answered, read_predictions, result_path
from pipeline.screen.console import beside_json, emit_json, print_answer, table
from pipeline.screen.tables import Columns
from stages.config import EvaluateConfig
from stages.data.manifest import Split
from stages.errors import UserError
from stages.evaluate.comparison import PairedComparison, Pairing, compare_pairs, pair
from stages.evaluate.scoring import Method
from stages.wording import counted

_Way = tuple[Split, Method]


def run(
    first: Path, second: Path, *, split: str | None, method: str | None, common: bool, as_json: bool
) -> dict[str, PairedComparison]:
    """Compare and print the table.

    Args:
        split: which split; None means the first of test, val, train that both answered.
        method: generate or rank; None means the first of these that both used on that split.
        common: compare what both answered; otherwise they must have answered the same samples.

    Raises:
        UserError: predictions are absent, or of different splits, methods, data sets or samples.
    """
    way = _chosen(first, second, split, method)
    rows = [read_predictions(result_path(folder, "predictions", *way, "jsonl")) for folder in (first, second)]
    paired = pair(*rows)
    _require_shared(paired, first, second, common=common)
    settings = EvaluateConfig()
    tasks = compare_pairs(paired.pairs, seed=settings.resample_seed, resamples=settings.resamples)
    if as_json:
        emit_json(_as_json(first, second, way, paired, tasks))
    with beside_json(as_json):
        if paired.only_first or paired.only_second:
            shared = counted(len(paired.pairs), "sample")
            print_answer(
                f"compared on the {shared} that both answered; left out {paired.only_first} of {first} "
                f"and {paired.only_second} of {second}"
            )
        _show(tasks, first, second, way)
    return tasks


def _chosen(first: Path, second: Path, split: str | None, method: str | None) -> _Way:
    """The split and method that are compared."""
    there = [_ways(folder) for folder in (first, second)]
    fitting = [[way for way in ways if split in (None, way[0]) and method in (None, way[1])] for ways in there]
    asked = " ".join(word for word in (split, method) if word)
    for folder, ways, found in zip((first, second), there, fitting, strict=True):
        if not found:
            raise UserError(
                f"no predictions of {asked}", where=folder, allowed=_named(ways), hint=_evaluate_hint(folder)
            )
    both = [way for way in fitting[0] if way in fitting[1]]
    if not both:
        raise UserError(
            f"different splits or methods were answered: {_named(fitting[0])} in {first}, {_named(fitting[1])} in "
            f"{second}",
            hint="evaluate both on one split, in one way",
        )
    return both[0]


def _ways(folder: Path) -> list[_Way]:
    ways = answered(folder)
    if not ways:
        raise UserError("no predictions are here", where=folder, hint=_evaluate_hint(folder))
    return ways


def _named(ways: Sequence[_Way]) -> str:
    return ", ".join(f"{split} {method}" for split, method in ways)


def _evaluate_hint(folder: Path) -> str:
    return f"run `pipeline evaluate --run {shlex.quote(str(folder))}` first"


def _require_shared(paired: Pairing, first: Path, second: Path, *, common: bool) -> None:
    """UserError unless there is something to compare, and nothing is left out without --common."""
    if not paired.pairs:
        raise UserError(f"no sample was answered both in {first} and in {second}", hint="compare runs of one data set")
    if not common and (paired.only_first or paired.only_second):
        raise UserError(
            f"different samples were answered: {paired.only_first} only in {first}, {paired.only_second} only in "
            f"{second}, {len(paired.pairs)} in both",
            hint="compare those in both with --common",
        )


def _as_json(
    first: Path, second: Path, way: _Way, paired: Pairing, tasks: dict[str, PairedComparison]
) -> dict[str, object]:
    return {
        "first": str(first),
        "second": str(second),
        "split": way[0],
        "method": way[1],
        "samples": len(paired.pairs),
        "left_out": {"first": paired.only_first, "second": paired.only_second},
        "tasks": {task: one.model_dump(mode="json") for task, one in tasks.items()},
    }


def _show(tasks: dict[str, PairedComparison], first: Path, second: Path, way: _Way) -> None:
    # On a narrow terminal the last ones go below the others.
    columns: Columns = ["task", "n", "first", "second", ("difference", "95% over videos"), "McNemar p", "videos"]
    columns = [*columns, ("only first right", "only second right")]
    rows = [
        [
            task,
            str(one.n),
            f"{100 * one.top1_first:.1f}",
            f"{100 * one.top1_second:.1f}",
            f"{100 * one.difference:+.1f}",
            "-" if one.ci95 is None else f"{100 * one.ci95[0]:+.1f} to {100 * one.ci95[1]:+.1f}",
            f"{one.mcnemar_p:.2g}",
            str(one.num_videos),
            str(one.only_first),
            str(one.only_second),
        ]
        for task, one in tasks.items()
    ]
    print_answer(f"first:  {first}")
    print_answer(f"second: {second}")
    table(f"top-1 on {way[0]}, {way[1]}, percent (difference: second - first)", columns, rows)
