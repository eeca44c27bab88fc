"""How runs scored: one group for each way of answering each split, and the classes and matrices of one run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.reporting.runs import SPLIT_ORDER, Evaluation, RunData
from stages.data.manifest import Split
from stages.evaluate.scoring import METHODS, Method, TaskScore

METHOD_TITLES: dict[Method, str] = {"generate": "beam search", "rank": "candidates ranked by likelihood"}


@dataclass(frozen=True)
class ScoreLine:
    """One run's score of one task; `slot` is the run's place on the page."""

    run: str
    slot: int
    score: TaskScore

    @property
    def verdict(self) -> str:
        """In words, whether it is above the floors; no constant answer is better than the split's own floor."""
        which = "the floor" if self.score.train_floor is None else "both floors"
        if self.score.beats_floor:
            return f"clearly above {which}"
        if self.score.top1 > self.score.floor:
            return f"above {which}, but within the noise"
        return "not above the floor"


@dataclass(frozen=True)
class Answered:
    """One split and method."""

    split: Split
    method: Method

    @property
    def title(self) -> str:
        """What was answered, and how."""
        return f"Split {self.split}, {METHOD_TITLES[self.method]}"


@dataclass(frozen=True)
class AccuracyGroup(Answered):
    """All runs' scores of one split and method; `tasks` holds each task's lines in the runs' order."""

    tasks: list[tuple[str, list[ScoreLine]]]

    @property
    def lines(self) -> list[tuple[str, ScoreLine]]:
        return [(task, line) for task, lines in self.tasks for line in lines]


def accuracy_groups(runs: Sequence[RunData]) -> Iterator[AccuracyGroup]:
    """The split that results are reported on comes first, of a split the paper's way of answering."""
    for split in SPLIT_ORDER:
        for method in METHODS:
            lines = [
                (task, ScoreLine(run.name, slot, score))
                for slot, run in enumerate(runs)
                if (evaluation := run.evaluation(split, method)) is not None
                for task, score in evaluation.scores.items()
            ]
            tasks = list(dict.fromkeys(task for task, _ in lines))
            if tasks:
                by_task = [(task, [line for of, line in lines if of == task]) for task in tasks]
                yield AccuracyGroup(split, method, by_task)


def shown_evaluation(run: RunData) -> Evaluation | None:
    """The one whose classes and answers are shown: of the reported split, by beam search, where there is one."""
    return next(iter(run.evaluations), None)


def unit_of(run: RunData) -> str:
    """What a sample of the run's data set is called."""
    if run.card is None:
        return "sample"
    return "window" if run.card.frame_rule.kind == "windows" else "question"
