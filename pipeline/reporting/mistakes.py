"""Which answers are shown: the surest wrong and the surest right ones, and those farthest from the right answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stages.evaluate.scoring import Prediction
from stages.wording import counted

_SHOWN = 6


@dataclass(frozen=True)
class Example:
    """An answer and, in words, where the right one stood."""

    row: Prediction
    right_stood: str


@dataclass(frozen=True)
class Examples:
    """The answers shown; `num_wrong` counts all wrong ones, in `num_videos` videos."""

    confident: list[Example]
    hardest: list[Example]
    right: list[Example]
    num_wrong: int
    num_videos: int


def choose_examples(predictions: Sequence[Prediction], most: int = _SHOWN) -> Examples:
    """Choose at most `most` of each kind, one for each task of a video, none twice.

    The confident mistakes and the right answers have the highest log-probability of their best answer. The hardest
    have the right answer not among those returned, or else farthest behind the best one in log-probability.
    """
    right = _first_of_each_video([row for row in predictions if row.correct], _certainty, most)
    wrong = [row for row in predictions if not row.correct]
    confident = _first_of_each_video(wrong, _certainty, most)
    shown = {(row.task, row.video) for row in confident}
    others = [row for row in wrong if (row.task, row.video) not in shown]
    hardest = _first_of_each_video(others, _distance, most)
    return Examples(
        [Example(row, _right_stood(row)) for row in confident],
        [Example(row, _right_stood(row)) for row in hardest],
        [Example(row, _right_stood(row)) for row in right],
        len(wrong),
        len({row.video for row in wrong}),
    )


def _first_of_each_video(
    rows: Sequence[Prediction], key: Callable[[Prediction], object], most: int
) -> list[Prediction]:
    found: dict[tuple[str, str], Prediction] = {}
    for row in sorted(rows, key=key, reverse=True):  # type: ignore[arg-type]  # both keys are ordered
        found.setdefault((row.task, row.video), row)
    return list(found.values())[:most]


def _certainty(row: Prediction) -> float:
    return row.log_probability[0]


def _distance(row: Prediction) -> tuple[bool, float]:
    """Whether the right answer was not returned, and how far behind the best one it was at least."""
    place = row.answers.index(row.gold) if row.gold in row.answers else None
    behind = row.log_probability[0] - row.log_probability[-1 if place is None else place]
    return place is None, behind


def _right_stood(row: Prediction) -> str:
    if row.gold not in row.answers:
        return f"not among the {counted(len(row.answers), 'answer')} returned"
    place = row.answers.index(row.gold)
    if not place:
        others = row.log_probability[1:]
        return f"first, {row.log_probability[0] - others[0]:.2f} ahead in log-probability" if others else "the only one"
    return f"number {place + 1}, {row.log_probability[0] - row.log_probability[place]:.2f} behind in log-probability"
