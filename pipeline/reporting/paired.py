"""Runs against each other on the same samples: every pair of a few runs, of many each against the first."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pipeline.reporting.accuracy import Answered
from pipeline.reporting.runs import SPLIT_ORDER, Evaluation, RunData
from stages.errors import UserError
from stages.evaluate.comparison import PairedComparison, compare
from stages.evaluate.scoring import METHODS

# Up to so many runs, every pair is compared.
_ALL_PAIRS = 4


@dataclass(frozen=True)
class Pair:
    """Two runs; `problem` is why they cannot be compared, else there is one comparison for each task."""

    first: str
    second: str
    tasks: dict[str, PairedComparison]
    problem: str = ""

    def verdict(self, task: str) -> str:
        """Which of both is better on a task, if the interval over videos shows it."""
        interval = self.tasks[task].ci95
        if interval is None or interval[0] <= 0 <= interval[1]:
            return "no difference shown"
        return f"{self.second if interval[0] > 0 else self.first} is better"


@dataclass(frozen=True)
class PairedGroup(Answered):
    """All pairs on one split and method."""

    pairs: list[Pair]


def paired_groups(runs: Sequence[RunData]) -> Iterator[PairedGroup]:
    """One group for each split and method that two runs or more have predictions of."""
    for split in SPLIT_ORDER:
        for method in METHODS:
            found = [(run, run.evaluation(split, method)) for run in runs]
            able = [(run, one) for run, one in found if one is not None and one.predictions]
            if len(able) > 1:
                chosen = (
                    list(combinations(able, 2)) if len(able) <= _ALL_PAIRS else [(able[0], one) for one in able[1:]]
                )
                yield PairedGroup(split, method, [_pair(*one, *other) for one, other in chosen])


def _pair(first: RunData, one: Evaluation, second: RunData, other: Evaluation) -> Pair:
    settings = first.config.evaluate
    try:
        tasks = compare(one.predictions, other.predictions, seed=settings.resample_seed, resamples=settings.resamples)
    except UserError as error:
        return Pair(first.name, second.name, {}, str(error))
    return Pair(first.name, second.name, tasks)
