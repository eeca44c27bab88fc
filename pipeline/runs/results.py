"""The files of one evaluation: predictions, how they were made, and their scores.

    predictions.jsonl   one line a sample
    evaluation.json     model, data, settings and what was left out (`EvaluationRecord`)
    metrics.json        one score a task (`stages.evaluate.scoring.TaskScore`)

So the files of a beam search on the test split are called; those of a ranking have `-rank` behind the first word, those
of another split its name before the dot.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from pipeline.runs.run_folder import file_name
from stages.atomic import atomic_write_text
from stages.data.manifest import SPLITS, Split
from stages.errors import UserError
from stages.evaluate.scoring import METHODS, Method, Prediction, TaskScore
from stages.records import read_json_lines

_PREDICTION = TypeAdapter(Prediction)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRecord(_Record):
    """Which parameters answered.

    Attributes:
        source: the run's folder, or the exported model's folder or hub id, as given.
        kind: which of the two.
        checkpoint: name of the run's checkpoint; None for an exported model.
        epoch: epochs that it was trained for; None for an exported model.
        step: optimizer steps that it was trained for; None for an exported model.
        sha256: of its `model.safetensors`.
    """

    source: str
    kind: Literal["run", "export"]
    checkpoint: str | None = None
    epoch: int | None = None
    step: int | None = None
    sha256: str


class DataRecord(_Record):
    """What was asked, and of which cache.

    Attributes:
        dataset: card.
        task: one task, or all.
        cache: where the features are.
        fingerprint: digest of what the features were made with.
        samples: answered samples.
        samples_left_out: samples of the split whose video failed extraction, or that ask for frames behind its damage.
        videos_left_out: the videos that failed.
        videos_damaged: videos of the split whose files are damaged.
        samples_beyond_damage: ids of the samples that ask for frames behind such damage.
    """

    dataset: str
    task: str
    cache: str
    fingerprint: str
    samples: int
    samples_left_out: int
    videos_left_out: tuple[str, ...]
    videos_damaged: tuple[str, ...] = ()
    samples_beyond_damage: tuple[str, ...] = ()


class EvaluationRecord(_Record):
    """The content of `evaluation.json`.

    Attributes:
        format: of this file.
        made: when and by what (`pipeline.runs.run_folder.versions`).
        split: which split was answered.
        method: how.
        model: which parameters.
        data: which samples.
        overrides: the command's own settings: what `--set` and the options of the data changed.
        settings: the branches of the configuration that answers and scores depend on, as they were.
    """

    format: Literal["diff-lmm-evaluation-1"] = "diff-lmm-evaluation-1"
    made: dict[str, Any]
    split: Split
    method: Method
    model: ModelRecord
    data: DataRecord
    overrides: tuple[str, ...]
    settings: dict[str, dict[str, Any]]


def result_path(folder: Path, stem: str, split: str, method: Method, suffix: str) -> Path:
    """Path of one of the three files; `stem` is its first word."""
    return folder / file_name(stem if method == "generate" else f"{stem}-{method}", split, suffix)


def write_results(
    folder: Path, record: EvaluationRecord, predictions: Sequence[Prediction], scores: Mapping[str, TaskScore]
) -> None:
    """Write the three files of one method, each in one step.

    The old metrics go first and the new ones come last, so that where metrics are, all three are of one evaluation.
    """
    of_method = (record.split, record.method)
    metrics = result_path(folder, "metrics", *of_method, "json")
    metrics.unlink(missing_ok=True)
    lines = (json.dumps({**asdict(prediction), "correct": prediction.correct}) for prediction in predictions)
    atomic_write_text(result_path(folder, "predictions", *of_method, "jsonl"), "".join(f"{line}\n" for line in lines))
    atomic_write_text(result_path(folder, "evaluation", *of_method, "json"), record.model_dump_json(indent=2) + "\n")
    atomic_write_text(metrics, json.dumps(metrics_of(scores), indent=2) + "\n")


def metrics_of(scores: Mapping[str, TaskScore]) -> dict[str, dict[str, Any]]:
    """The content of `metrics.json`."""
    return {task: one.model_dump(mode="json") for task, one in scores.items()}


def answered(folder: Path) -> list[tuple[Split, Method]]:
    """The splits and methods whose predictions are in a folder, the test split and the beam search first."""
    return [
        (split, method)
        for split in reversed(SPLITS)
        for method in METHODS
        if result_path(folder, "predictions", split, method, "jsonl").is_file()
    ]


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions back.

    Raises:
        UserError: the file is missing or broken, or names a sample twice; file and line are named.
    """
    rows: dict[str, Prediction] = {}
    for where, entry in read_json_lines(path):
        try:
            row = _PREDICTION.validate_python(entry)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"not a prediction: {key}: {first['msg']}", where=where) from error
        if not row.answers or len(row.answers) != len(row.log_probability):
            raise UserError(
                "not a prediction: it needs answers, and as many log-probabilities", where=where, received=row.answers
            )
        if row.sample in rows:
            raise UserError(f"sample {row.sample!r} is answered twice", where=where)
        rows[row.sample] = row
    return list(rows.values())
