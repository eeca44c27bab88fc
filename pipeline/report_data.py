"""What a run's folder says about the run: settings, stamp, numbers over time, scores and predictions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import PipelineConfig
from pipeline.run_folder import CONFIG, RunFolder
from stages.card_schema import Card
from stages.cards import load_card
from stages.errors import UserError
from stages.manifest import Split
from stages.records import parse_record, read_json_lines, read_text

SPLIT_ORDER: tuple[Split, ...] = ("test", "val", "train")
"""The split that results are reported on stands first."""
# A confusion matrix of open answers shows so many of the most frequent ones.
_SHOWN_ANSWERS = 12
# So many of the videos left out are named at the top; the stamp further down has them all.
_NAMED_VIDEOS = 10


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreRow(_Row):
    """One task of a metrics file, see `stages.evaluate.TaskScore`."""

    split: Split
    n: int
    correct: int
    top1: float
    top5: float
    ci95: tuple[float, float]
    floor: float

    @property
    def beats_floor(self) -> bool:
        """Whether the whole interval lies above the majority floor."""
        return self.ci95[0] > self.floor


class PredictionRow(_Row):
    """One line of a predictions file, see `stages.evaluate.Prediction`."""

    sample: str
    video: str
    task: str
    question: str
    gold: str
    answers: tuple[str, ...] = Field(min_length=1)
    log_probability: tuple[float, ...] = Field(min_length=1)
    correct: bool


class LogRow(BaseModel):
    """One line of the metric log; every key beside these two is a logged number."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, float]

    split: Split
    step: int


@dataclass(frozen=True)
class Series:
    """One logged number over the steps; both arrays `[S]`."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class TrainingLog:
    """The metric log's rows, oldest first."""

    rows: Sequence[LogRow]

    def series(self, split: Split, name: str) -> Series | None:
        """Values of one number; None if it was never logged."""
        found = [(row.step, row.__pydantic_extra__[name]) for row in self._of(split) if name in row.__pydantic_extra__]
        if not found:
            return None
        steps, values = zip(*found, strict=True)
        return Series(np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64))

    def levels(self) -> list[int]:
        """The aligned levels that have a logged cosine, ascending."""
        names = {name for row in self._of("train") for name in row.__pydantic_extra__}
        return sorted(int(name.removeprefix("cosine/")) for name in names if name.startswith("cosine/"))

    @property
    def last(self) -> LogRow | None:
        """The newest training row."""
        return next(reversed(self._of("train")), None)

    def _of(self, split: Split) -> list[LogRow]:
        return [row for row in self.rows if row.split == split]


@dataclass(frozen=True)
class Evaluation:
    """The results on one split; scores by task."""

    split: Split
    scores: dict[str, ScoreRow]
    predictions: list[PredictionRow]


@dataclass(frozen=True)
class RunData:
    """Everything the report shows of one run.

    Attributes:
        name: how the page calls it.
        path: its folder as given.
        config: its settings.
        config_text: the same, as the file has them.
        stamp: cache fingerprint, counts, versions.
        log: numbers over time.
        evaluations: by split, the reported one first; empty before the first evaluation.
        card: its data set's card; None if it is not on this machine.
    """

    name: str
    path: Path
    config: PipelineConfig
    config_text: str
    stamp: Mapping[str, Any]
    log: TrainingLog
    evaluations: dict[Split, Evaluation]
    card: Card | None


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read the runs in the order given, each folder once.

    Raises:
        UserError: a folder is no run, or one of its files is broken.
    """
    distinct: dict[Path, Path] = {}
    for path in paths:
        distinct.setdefault(path.resolve(), path)
    names = [resolved.name for resolved in distinct]
    return [
        _read_run(path, name if names.count(name) == 1 else str(path))
        for path, name in zip(distinct.values(), names, strict=True)
    ]


def _read_run(path: Path, name: str) -> RunData:
    folder = RunFolder.open(path)
    config = folder.config()
    return RunData(
        name=name,
        path=path,
        config=config,
        config_text=read_text(path / CONFIG),
        stamp=folder.stamp(),
        log=_read_log(path),
        evaluations=_read_evaluations(folder),
        card=_card_of(config),
    )


def _read_log(run: Path) -> TrainingLog:
    # torch is loaded by these two modules; nothing before this line needs it.
    from stages.metric_log import FILE

    path = run / FILE
    if not path.is_file():
        return TrainingLog(())
    # A training that runs or was killed leaves half a line, and only at the end.
    whole = read_text(path).rpartition("\n")[0]
    return TrainingLog([_log_row(line, f"{path}:{number}") for number, line in enumerate(whole.splitlines(), start=1)])


def _log_row(line: str, where: str) -> LogRow:
    try:
        return LogRow.model_validate_json(line)
    except ValueError as error:
        raise UserError("not a row of the metric log", where=where, received=line[:80]) from error


def _read_evaluations(folder: RunFolder) -> dict[Split, Evaluation]:
    from pipeline.commands.evaluate import file_name

    found: dict[Split, Evaluation] = {}
    for split in SPLIT_ORDER:
        metrics, predictions = (
            folder.path / file_name(*parts) for parts in (("metrics", split, "json"), ("predictions", split, "jsonl"))
        )
        if not metrics.is_file():
            continue
        scores = {
            task: parse_record(ScoreRow, entry, f"{metrics}, task {task!r}")
            for task, entry in folder.read_json(metrics.name).items()
        }
        lines = read_json_lines(predictions) if predictions.is_file() else ()
        rows = [parse_record(PredictionRow, entry, where) for where, entry in lines]
        found[split] = Evaluation(split, scores, rows)
    return found


def _card_of(config: PipelineConfig) -> Card | None:
    try:
        return load_card(config.data.dataset)
    except UserError:
        # A card of the user's own may have moved since; the report then goes by the answers that occur.
        return None


@dataclass(frozen=True)
class Confusion:
    """How often each right answer (row) met each given answer (column); the last column is every other text."""

    task: str
    labels: tuple[str, ...]
    other: str
    counts: tuple[tuple[int, ...], ...]
    num_hidden: int


def confusions(run: RunData, evaluation: Evaluation) -> list[Confusion]:
    """One matrix for each task of an evaluation that has predictions."""
    by_task: dict[str, list[PredictionRow]] = {}
    for row in evaluation.predictions:
        by_task.setdefault(row.task, []).append(row)
    return [_confusion(run.card, task, rows) for task, rows in by_task.items()]


def _confusion(card: Card | None, task: str, rows: Sequence[PredictionRow]) -> Confusion:
    known = card.tasks[task].labels if card is not None and task in card.tasks else None
    golds = [gold for gold, _ in Counter(row.gold for row in rows).most_common()]
    labels = tuple(dict.fromkeys([*known, *golds])) if known is not None else tuple(golds[:_SHOWN_ANSWERS])
    column = {label: index for index, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels) + 1), dtype=int)
    for row in rows:
        if row.gold in column:
            counts[column[row.gold], column.get(row.answers[0], len(labels))] += 1
    other = "another answer" if known is None else "no label"
    return Confusion(
        task, labels, other, tuple(map(tuple, counts.tolist())), len(golds) - len(set(golds) & set(labels))
    )


def confident_mistakes(predictions: Sequence[PredictionRow], most: int) -> list[PredictionRow]:
    """The wrong predictions whose best beam the model was surest of, surest first."""
    wrong = [row for row in predictions if not row.correct]
    return sorted(wrong, key=lambda row: row.log_probability[0], reverse=True)[:most]


def shortfalls(run: RunData) -> list[str]:
    """One sentence for each way in which a run saw less data than its data set publishes."""
    lines = []
    missing = run.stamp.get("videos_missing") or []
    if missing:
        named = ", ".join(missing[:_NAMED_VIDEOS]) + (", ..." if len(missing) > _NAMED_VIDEOS else "")
        lines.append(f"trained on a partial set: {len(missing)} videos failed extraction and are left out ({named})")
    tasks = [run.config.data.task] if run.config.data.task != "all" else list(run.card.tasks if run.card else ())
    fewer = []
    for split, used in (run.stamp.get("samples") or {}).items():
        counts = [_published(run.card, task, split) for task in tasks]
        if all(counts) and 0 < used < sum(counts):
            fewer.append(f"{used} of {sum(counts)} {split} samples")
    if fewer:
        lines.append(f"trained with fewer samples than are published: {', '.join(fewer)}")
    for split, evaluation in run.evaluations.items():
        counted = [(task, score.n, _published(run.card, task, split)) for task, score in evaluation.scores.items()]
        fewer = [f"{task} {scored} of {published}" for task, scored, published in counted if scored < published]
        if fewer:
            lines.append(f"scored on fewer {split} samples than are published: {', '.join(fewer)}")
    return lines


def _published(card: Card | None, task: str, split: str) -> int:
    """Samples that the card promises; 0 if it promises none."""
    counts = {} if card is None else {str(name): entry for name, entry in card.expected.get(task, {}).items()}
    return counts[split].samples if split in counts else 0
