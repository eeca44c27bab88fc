"""From predictions to scores, by exact match: pure functions, no file and no network is touched.

docs/evaluation.md says what each number means and where it comes from.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from stages.data.manifest import Sample, Split
from stages.data.text import answer_type_by_word
from stages.evaluate.metrics import (
    bootstrap_interval,
    constant_accuracy,
    majority_answer,
    majority_floor,
    wilson_interval,
)

Method = Literal["generate", "rank"]
METHODS: tuple[Method, ...] = ("generate", "rank")
Interval = tuple[float, float]

NO_LABEL = "no label"
"""Name of a confusion matrix's last column: every text that is no label of the task."""
_TOP = 5
_OTHER_TYPE = "other"


@dataclass(frozen=True)
class Prediction:
    """The answers to one sample.

    Attributes:
        sample: id of the sample.
        video: id of its video.
        task: its task.
        question: the prompt as the model read it.
        gold: the right answer.
        answers: the beams' texts, or all candidates, best first.
        log_probability: of each beam, summed over tokens and divided by length ** length_penalty; of each candidate,
            its log-likelihood as `evaluate.rank_score` says.
        answer_type: what kind of thing is asked for (what, who, ...); None for a classification.
    """

    sample: str
    video: str
    task: str
    question: str
    gold: str
    answers: tuple[str, ...]
    log_probability: tuple[float, ...]
    answer_type: str | None = None

    @property
    def correct(self) -> bool:
        """Whether the best answer is the right one, letter for letter."""
        return self.answers[0] == self.gold


class _Score(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClassScore(_Score):
    """One class of a task: samples `n` that have this label, and how many of them were answered right.

    `recall` is correct / n and `ci95` its Wilson interval; both None for a class without samples.
    """

    label: str
    n: int
    correct: int
    recall: float | None
    ci95: Interval | None


class Confusion(_Score):
    """How often each right label (row) met each given one (column); the last column, `other`, is every other text."""

    labels: tuple[str, ...]
    other: str
    counts: tuple[tuple[int, ...], ...]


class VideoScore(_Score):
    """One answer for each of `n` videos, from all its windows.

    Attributes:
        n: videos.
        correct_majority: videos whose most frequent best answer is right.
        top1_majority: correct_majority / n.
        ci95_majority: Wilson 95 % interval of top1_majority.
        correct_likelihood: videos whose candidate of the highest log-likelihood, averaged over windows, is right; None
            for beam search, which does not score every label in every window.
        top1_likelihood: correct_likelihood / n.
        ci95_likelihood: Wilson 95 % interval of top1_likelihood.
    """

    n: int
    correct_majority: int
    top1_majority: float
    ci95_majority: Interval
    correct_likelihood: int | None
    top1_likelihood: float | None
    ci95_likelihood: Interval | None


class TypeScore(_Score):
    """The samples of one answer type; `ci95` is the Wilson interval of top1."""

    n: int
    correct: int
    top1: float
    ci95: Interval


class TaskScore(_Score):
    """How one task went, counted over samples (windows, questions) unless stated otherwise.

    Attributes:
        split: which split was answered.
        method: how it was answered.
        n: samples.
        num_videos: videos that they are from.
        correct: best answer equal to the right one, letter for letter.
        top1: correct / n.
        top5: share of samples with the right answer among the first five; None where it would say nothing: a sample has
            fewer than five answers, or at most five candidates to rank.
        ci95: Wilson 95 % interval of top1, as if samples were independent.
        ci95_videos: 95 % bootstrap interval of top1 over videos; None for a single video.
        floor: accuracy of always giving this split's most frequent answer.
        train_floor: accuracy of always giving the training split's most frequent answer; None if that is unknown.
        macro: mean recall of the classes that have samples; None for open answers.
        classes: each class of the task, in its order; empty for open answers.
        confusion: right against given labels; None for open answers.
        no_label: share of best answers that are no label of the task; None for open answers.
        videos: one answer a video; None where a video's samples do not share one question and one right answer.
        answer_types: by type, in order of appearance; empty where predictions have none.
    """

    split: Split
    method: Method
    n: int
    num_videos: int
    correct: int
    top1: float
    top5: float | None
    ci95: Interval
    ci95_videos: Interval | None
    floor: float
    train_floor: float | None
    macro: float | None
    classes: tuple[ClassScore, ...]
    confusion: Confusion | None
    no_label: float | None
    videos: VideoScore | None
    answer_types: dict[str, TypeScore]

    @property
    def beats_floor(self) -> bool:
        """Whether both intervals lie above the majority floor as a whole."""
        lows = [interval[0] for interval in (self.ci95, self.ci95_videos) if interval is not None]
        return min(lows) > self.floor


def answer_type_of(sample: Sample) -> str | None:
    """What an open question asks for: what its annotation says, else its first word; None for a classification."""
    if sample.answer_type is not None or sample.candidates is not None:
        return sample.answer_type
    return answer_type_by_word(sample.question) or _OTHER_TYPE


def labels_of(samples: Iterable[Sample]) -> dict[str, tuple[str, ...] | None]:
    """The labels of each task, all its samples' candidates in order of appearance; None if one has open answers."""
    labels: dict[str, dict[str, None] | None] = {}
    for sample in samples:
        known = labels.setdefault(sample.task, {})
        if sample.candidates is None or known is None:
            labels[sample.task] = None
        else:
            known.update(dict.fromkeys(sample.candidates))
    return {task: None if known is None else tuple(known) for task, known in labels.items()}


def majority_answers(samples: Iterable[Sample]) -> dict[str, str]:
    """Each task's most frequent answer, of equally frequent ones the first to occur."""
    answers: dict[str, list[str]] = {}
    for sample in samples:
        answers.setdefault(sample.task, []).append(sample.answer)
    return {task: majority_answer(given) for task, given in answers.items()}


def score(
    predictions: Sequence[Prediction],
    *,
    split: Split,
    method: Method,
    labels: Mapping[str, Sequence[str] | None],
    train_majority: Mapping[str, str],
    resamples: int,
    seed: int,
) -> dict[str, TaskScore]:
    """Score each task on its own, in order of appearance.

    Args:
        predictions: of any tasks; within a task in the samples' order, which breaks ties last.
        split: where the samples are from.
        method: how they were answered.
        labels: of each task in order; None, or no entry, for open answers.
        train_majority: the training split's most frequent answer of each task that has one.
        resamples: how often videos are drawn for `ci95_videos`.
        seed: of those draws.
    """
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, []).append(prediction)
    return {
        task: _score_task(
            rows,
            split=split,
            method=method,
            labels=labels.get(task),
            train_majority=train_majority.get(task),
            resamples=resamples,
            seed=seed,
        )
        for task, rows in tasks.items()
    }


def _score_task(
    rows: Sequence[Prediction],
    *,
    split: Split,
    method: Method,
    labels: Sequence[str] | None,
    train_majority: str | None,
    resamples: int,
    seed: int,
) -> TaskScore:
    golds = [row.gold for row in rows]
    correct = sum(row.correct for row in rows)
    by_video = _grouped_by_video(rows)
    classes = () if labels is None else _classes(rows, labels)
    recalls = [one.recall for one in classes if one.recall is not None]
    return TaskScore(
        split=split,
        method=method,
        n=len(rows),
        num_videos=len(by_video),
        correct=correct,
        top1=correct / len(rows),
        top5=_top5(rows, method),
        ci95=wilson_interval(correct, len(rows)),
        ci95_videos=bootstrap_interval(
            [sum(row.correct for row in of_video) for of_video in by_video],
            [len(of_video) for of_video in by_video],
            resamples=resamples,
            seed=seed,
        ),
        floor=majority_floor(golds),
        train_floor=None if train_majority is None else constant_accuracy(golds, train_majority),
        macro=sum(recalls) / len(recalls) if recalls else None,
        classes=classes,
        confusion=None if labels is None else _confusion(rows, labels),
        no_label=None if labels is None else sum(row.answers[0] not in labels for row in rows) / len(rows),
        videos=_videos(by_video, method, labels or ()),
        answer_types=_answer_types(rows),
    )


def _grouped_by_video(rows: Sequence[Prediction]) -> list[list[Prediction]]:
    videos: dict[str, list[Prediction]] = {}
    for row in rows:
        videos.setdefault(row.video, []).append(row)
    return list(videos.values())


def _top5(rows: Sequence[Prediction], method: Method) -> float | None:
    # Ranking returns every candidate, so with five of them the right one is always there.
    least = _TOP + 1 if method == "rank" else _TOP
    if any(len(row.answers) < least for row in rows):
        return None
    return sum(row.gold in row.answers[:_TOP] for row in rows) / len(rows)


def _classes(rows: Sequence[Prediction], labels: Sequence[str]) -> tuple[ClassScore, ...]:
    asked = Counter(row.gold for row in rows)
    right = Counter(row.gold for row in rows if row.correct)
    return tuple(
        ClassScore(
            label=label,
            n=asked[label],
            correct=right[label],
            recall=right[label] / asked[label] if asked[label] else None,
            ci95=wilson_interval(right[label], asked[label]) if asked[label] else None,
        )
        for label in labels
    )


def _confusion(rows: Sequence[Prediction], labels: Sequence[str]) -> Confusion:
    met = Counter((row.gold, row.answers[0]) for row in rows)
    counts = []
    for gold in labels:
        known = [met[gold, given] for given in labels]
        others = sum(count for (right, given), count in met.items() if right == gold and given not in labels)
        counts.append((*known, others))
    return Confusion(labels=tuple(labels), other=NO_LABEL, counts=tuple(counts))


def _videos(by_video: Sequence[Sequence[Prediction]], method: Method, labels: Sequence[str]) -> VideoScore | None:
    if any(len({(row.question, row.gold) for row in rows}) > 1 for rows in by_video):
        return None
    total = len(by_video)
    majority = sum(majority_vote(rows) == rows[0].gold for rows in by_video)
    likely = None
    if method == "rank" and labels:
        likely = sum(most_likely(rows, labels) == rows[0].gold for rows in by_video)
    return VideoScore(
        n=total,
        correct_majority=majority,
        top1_majority=majority / total,
        ci95_majority=wilson_interval(majority, total),
        correct_likelihood=likely,
        top1_likelihood=None if likely is None else likely / total,
        ci95_likelihood=None if likely is None else wilson_interval(likely, total),
    )


def majority_vote(rows: Sequence[Prediction]) -> str:
    """The best answer of most of a video's samples.

    Of answers with as many samples, the one with the highest log-probability, summed over the samples that gave it; of
    those the one given first.
    """
    votes: dict[str, list[float]] = {}
    for row in rows:
        votes.setdefault(row.answers[0], []).append(row.log_probability[0])
    return max(votes, key=lambda answer: (len(votes[answer]), math.fsum(votes[answer])))


def most_likely(rows: Sequence[Prediction], labels: Sequence[str]) -> str:
    """The candidate with the highest log-likelihood, averaged over a video's samples; of equal ones the first label.

    Candidates that not all of the samples have are left out.
    """
    scored = [dict(zip(row.answers, row.log_probability, strict=True)) for row in rows]
    shared = [label for label in labels if all(label in one for one in scored)]
    return max(shared, key=lambda label: math.fsum(one[label] for one in scored))


def _answer_types(rows: Sequence[Prediction]) -> dict[str, TypeScore]:
    asked = Counter(row.answer_type for row in rows if row.answer_type is not None)
    right = Counter(row.answer_type for row in rows if row.answer_type is not None and row.correct)
    return {
        kind: TypeScore(n=n, correct=right[kind], top1=right[kind] / n, ci95=wilson_interval(right[kind], n))
        for kind, n in asked.items()
    }
