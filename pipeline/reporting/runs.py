"""What a run's folder holds: settings, stamp, numbers over time, scores and predictions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipeline.runs.results import EvaluationRecord, read_predictions, result_path
from pipeline.runs.run_folder import CONFIG, RunFolder
from pipeline.settings.config import PipelineConfig
from stages.data.card_schema import Card
from stages.data.cards import load_card
from stages.data.leakage import leakage_sentence
from stages.data.manifest import Split
from stages.errors import UserError
from stages.evaluate.scoring import METHODS, Method, Prediction, TaskScore
from stages.records import parse_record, read_text
from stages.wording import counted

SPLIT_ORDER: tuple[Split, ...] = ("test", "val", "train")
"""The split that results are reported on stands first."""
# So many of the videos left out are named at the top; the stamp further down has them all.
_NAMED_VIDEOS = 10


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
        return next(reversed(self._of("train")), None)

    @property
    def epoch(self) -> int | None:
        """The epoch, counted from 1, that the training has come to; None before its first step."""
        return None if self.last is None else int(self.last.__pydantic_extra__["epoch"]) + 1

    def _of(self, split: Split) -> list[LogRow]:
        return [row for row in self.rows if row.split == split]


@dataclass(frozen=True)
class Evaluation:
    """The results of one way of answering one split; scores by task, and the record of how they were made."""

    split: Split
    method: Method
    scores: dict[str, TaskScore]
    predictions: list[Prediction]
    record: EvaluationRecord


@dataclass(frozen=True)
class RunData:
    """Everything the report shows of one run.

    Attributes:
        name: how the page calls it.
        path: its folder as given.
        config_text: the same, as the file has them.
        stamp: cache fingerprint, counts, versions.
        evaluations: the reported split first, of a split beam search first; empty before the first evaluation.
        card: its data set's card; None if it is not on this machine.
        best: name of its best checkpoint; None if it has none.
    """

    name: str
    path: Path
    config: PipelineConfig
    config_text: str
    stamp: Mapping[str, Any]
    log: TrainingLog
    evaluations: tuple[Evaluation, ...]
    card: Card | None
    best: str | None

    def evaluation(self, split: Split, method: Method) -> Evaluation | None:
        return next((one for one in self.evaluations if (one.split, one.method) == (split, method)), None)


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
        best=_best_checkpoint(path),
    )


def _read_log(run: Path) -> TrainingLog:
    # torch is loaded by this module; nothing else here needs it.
    from stages.train.metric_log import FILE

    path = run / FILE
    if not path.is_file():
        return TrainingLog(())
    # A training that runs or was killed leaves half a line, and only at the end.
    whole = read_text(path).rpartition("\n")[0]
    return TrainingLog([_log_row(line, f"{path}:{number}") for number, line in enumerate(whole.splitlines(), start=1)])


def _best_checkpoint(run: Path) -> str | None:
    # torch is loaded by this module, too.
    from stages.networks.checkpoint import Checkpoints

    checkpoints = Checkpoints(run)
    return None if checkpoints.last() is None else checkpoints.best()


def _log_row(line: str, where: str) -> LogRow:
    try:
        return LogRow.model_validate_json(line)
    except ValueError as error:
        raise UserError("not a row of the metric log", where=where, received=line[:80]) from error


def _read_evaluations(folder: RunFolder) -> tuple[Evaluation, ...]:
    """Those that have metrics, which are written last."""
    found = []
    for split, method in product(SPLIT_ORDER, METHODS):
        metrics, predictions, record = (
            result_path(folder.path, stem, split, method, suffix)
            for stem, suffix in (("metrics", "json"), ("predictions", "jsonl"), ("evaluation", "json"))
        )
        if metrics.is_file():
            scores = {
                task: parse_record(TaskScore, entry, f"{metrics}, task {task!r}")
                for task, entry in folder.read_json(metrics.name).items()
            }
            how = parse_record(EvaluationRecord, folder.read_json(record.name), str(record))
            found.append(Evaluation(split, method, scores, read_predictions(predictions), how))
    return tuple(found)


def _card_of(config: PipelineConfig) -> Card | None:
    try:
        return load_card(config.data.dataset)
    except UserError:
        # A card of the user's own may have moved since; the report then goes without what only the card has.
        return None


def shortfalls(run: RunData) -> list[str]:
    """One sentence for each way in which a run saw less data than its data set publishes."""
    lines = []
    missing = run.stamp.get("videos_missing") or []
    if missing:
        named = ", ".join(missing[:_NAMED_VIDEOS]) + (", ..." if len(missing) > _NAMED_VIDEOS else "")
        failed = counted(
            len(missing), "video failed extraction and is left out", "videos failed extraction and are left out"
        )
        lines.append(f"trained on a partial set: {failed} ({named})")
    lines += _of_damaged_files("trained", run.stamp.get("videos_damaged"), run.stamp.get("samples_missing"))
    if left_out := run.stamp.get("videos_left_out"):
        unknown = counted(len(left_out), "annotated video has", "annotated videos have")
        lines.append(f"trained on a partial set: {unknown} no known length and no samples")
    if leaks := run.stamp.get("leaks"):
        lines.append(leakage_sentence(leaks))
    tasks = [run.config.data.task] if run.config.data.task != "all" else list(run.card.tasks if run.card else ())
    fewer = []
    for split, used in (run.stamp.get("samples") or {}).items():
        counts = [published_samples(run.card, task, split) for task in tasks]
        if all(counts) and 0 < used < sum(counts):
            fewer.append(f"{used} of {counted(sum(counts), f'{split} sample')}")
    if fewer:
        lines.append(f"trained with fewer samples than are published: {', '.join(fewer)}")
    for one in run.evaluations:
        scores = [(task, score.n, published_samples(run.card, task, one.split)) for task, score in one.scores.items()]
        fewer = [f"{task} {scored} of {published}" for task, scored, published in scores if scored < published]
        if fewer:
            lines.append(f"scored on fewer {one.split} samples than are published: {', '.join(fewer)}")
        data = one.record.data
        if gone := data.videos_left_out:
            samples = counted(data.samples_left_out - len(data.samples_beyond_damage), f"{one.split} sample")
            left = f"{samples} of {counted(len(gone), 'video')}"
            lines.append(f"scored without {left}, which failed extraction")
        lines += _of_damaged_files(f"scored on {one.split}", data.videos_damaged, data.samples_beyond_damage)
    return list(dict.fromkeys(lines))


def _of_damaged_files(doing: str, videos: Sequence[str] | None, beyond: Sequence[str] | None) -> list[str]:
    """A sentence on videos whose files are damaged, and on samples that were left out because of that."""
    if not videos:
        return []
    named = ", ".join(videos[:_NAMED_VIDEOS]) + (", ..." if len(videos) > _NAMED_VIDEOS else "")
    line = f"{doing} with damaged video files, used as far as they are whole: {len(videos)} ({named})"
    if beyond:
        named = ", ".join(beyond[:_NAMED_VIDEOS]) + (", ..." if len(beyond) > _NAMED_VIDEOS else "")
        line += f"; samples left out that ask for frames behind the damage: {len(beyond)} ({named})"
    return [line]


def cautions(run: RunData) -> list[str]:
    """One sentence for each way in which a run's answers are not those of the training that its settings describe."""
    lines = []
    epochs, come_to = run.config.train.epochs, run.log.epoch
    if run.config.train.patience is None and come_to is not None and come_to < epochs:
        lines.append(f"its training has come to epoch {come_to} of {epochs}")
    for more in run.stamp.get("more_epochs") or []:
        before, now = more["before"], more["now"]
        lines.append(f"its learning rate was that of {before} epochs until step {more['step']}, then that of {now}")
    for one in run.evaluations:
        answered = one.record.model.checkpoint
        if run.best is not None and answered != run.best:
            lines.append(
                f"its answers on split {one.split} ({one.method}) are those of checkpoint {answered}, but the best one "
                f"is {run.best}; evaluate it again"
            )
    return lines


def published_samples(card: Card | None, task: str, split: str) -> int:
    """Samples that the card promises; 0 if it promises none."""
    counts = {} if card is None else {str(name): entry for name, entry in card.expected.get(task, {}).items()}
    return counts[split].samples if split in counts else 0
