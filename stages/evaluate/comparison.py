"""Two models on the same samples: which is better, and how sure that is; pure functions of their predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from stages.errors import UserError
from stages.evaluate.metrics import bootstrap_interval, mcnemar_p


class Answered(Protocol):
    """What is compared of a prediction (`stages.evaluate.scoring.Prediction`)."""

    @property
    def sample(self) -> str:
        """Id of the sample."""

    @property
    def video(self) -> str:
        """Id of its video."""

    @property
    def task(self) -> str:
        """Its task."""

    @property
    def gold(self) -> str:
        """The right answer."""

    @property
    def correct(self) -> bool:
        """Whether the best answer is the right one."""


Pair = tuple[Answered, Answered]


@dataclass(frozen=True)
class Pairing:
    """The samples that both models answered, in the first one's order, and how many only one of them did."""

    pairs: tuple[Pair, ...]
    only_first: int
    only_second: int


class PairedComparison(BaseModel):
    """One task, answered by two models.

    Attributes:
        n: samples.
        num_videos: videos that they are from.
        top1_first: the first model's accuracy.
        top1_second: the second one's.
        difference: top1_second - top1_first.
        ci95: 95 % interval of the difference by paired bootstrap over videos; None for a single video.
        only_first: samples that only the first model answers right.
        only_second: samples that only the second one answers right.
        mcnemar_p: exact two-sided McNemar test of these two counts, which takes samples to be independent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    n: int
    num_videos: int
    top1_first: float
    top1_second: float
    difference: float
    ci95: tuple[float, float] | None
    only_first: int
    only_second: int
    mcnemar_p: float


def pair(first: Sequence[Answered], second: Sequence[Answered]) -> Pairing:
    """Put the two answers to each sample together.

    Raises:
        UserError: under one id the two answered different questions.
    """
    theirs = {row.sample: row for row in second}
    pairs = tuple((row, theirs[row.sample]) for row in first if row.sample in theirs)
    differing = [mine for mine, other in pairs if _asked(mine) != _asked(other)]
    if differing:
        raise UserError(
            f"{len(differing)} of {len(pairs)} samples have the same id in both, but another video, task or right "
            f"answer; the first is {differing[0].sample!r}",
            hint="compare runs that were evaluated on the same data set",
        )
    return Pairing(pairs, len(first) - len(pairs), len(second) - len(pairs))


def _asked(row: Answered) -> tuple[str, str, str]:
    # Not the wording of the question: comparing two of them is a fair comparison.
    return row.video, row.task, row.gold


def compare(
    first: Sequence[Answered], second: Sequence[Answered], *, seed: int, resamples: int
) -> dict[str, PairedComparison]:
    """Compare two models task by task, in the first one's order of tasks.

    Args:
        first: one model's predictions.
        second: the other one's, of the same samples.
        seed: of the bootstrap.
        resamples: how often videos are drawn.

    Raises:
        UserError: they answered different samples.
    """
    paired = pair(first, second)
    if paired.only_first or paired.only_second:
        raise UserError(
            f"different samples were answered: {paired.only_first} only by the first, {paired.only_second} only by the "
            f"second, {len(paired.pairs)} by both"
        )
    return compare_pairs(paired.pairs, seed=seed, resamples=resamples)


def compare_pairs(pairs: Sequence[Pair], *, seed: int, resamples: int) -> dict[str, PairedComparison]:
    """Compare answers that are put together already, see `compare`."""
    tasks: dict[str, list[Pair]] = {}
    for one in pairs:
        tasks.setdefault(one[0].task, []).append(one)
    return {task: _compare_task(rows, seed=seed, resamples=resamples) for task, rows in tasks.items()}


def _compare_task(rows: Sequence[Pair], *, seed: int, resamples: int) -> PairedComparison:
    gains: dict[str, list[int]] = {}
    for mine, theirs in rows:
        gains.setdefault(mine.video, []).append(int(theirs.correct) - int(mine.correct))
    only_first = sum(mine.correct and not theirs.correct for mine, theirs in rows)
    only_second = sum(theirs.correct and not mine.correct for mine, theirs in rows)
    return PairedComparison(
        n=len(rows),
        num_videos=len(gains),
        top1_first=sum(mine.correct for mine, _ in rows) / len(rows),
        top1_second=sum(theirs.correct for _, theirs in rows) / len(rows),
        difference=(only_second - only_first) / len(rows),
        ci95=bootstrap_interval(
            [sum(of_video) for of_video in gains.values()],
            [len(of_video) for of_video in gains.values()],
            resamples=resamples,
            seed=seed,
        ),
        only_first=only_first,
        only_second=only_second,
        mcnemar_p=mcnemar_p(only_first, only_second),
    )
