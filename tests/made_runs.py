"""Run folders for tests of what reads them: written in the real formats by the code that writes them, trained never."""

from pathlib import Path

import yaml

from pipeline.runs.results import DataRecord, EvaluationRecord, ModelRecord, write_results
from pipeline.runs.run_folder import RunFolder, versions
from pipeline.settings.config import resolve
from stages.evaluate.scoring import Prediction, score
from stages.train.metric_log import MetricLog

EVIL = "<script>alert(1)</script>"
LABELS = ("friend", "husband wife", EVIL)
FINGERPRINT = "5eed" * 16


def write_card(folder: Path) -> Path:
    """A card of three labels, one of them hostile; its samples stand in `samples.jsonl`."""
    card = {
        "name": "tiny-set",
        "title": "Three labels, one of them hostile",
        "annotations": {"format": "jsonl", "file": "samples.jsonl"},
        "tasks": {"relation": {"labels": list(LABELS)}},
        "frame_rule": {"kind": "uniform", "num_frames": 4, "index_fps": 10},
        "expected": {"relation": {"train": {"videos": 9, "samples": 9}, "test": {"videos": 6, "samples": 6}}},
    }
    path = folder / "tiny-set.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    return path


def make_run(
    folder: Path,
    name: str,
    *,
    kd_weight: float = 1.0,
    missing: tuple[str, ...] = (),
    more_stamp: dict | None = None,
    **options,
) -> RunFolder:
    """A run of the tiny preset on the card's data set that has trained six steps; `options` are dotted keys."""
    given = {
        "data.dataset": str(write_card(folder)),
        "train.epochs": 2,
        **{key.replace("__", "."): on for key, on in options.items()},
    }
    config = resolve(preset="tiny", options=given, overrides=[f"alignment.kd_weight={kd_weight}"]).config
    stamp = {"fingerprint": FINGERPRINT, "samples": {"train": 9 - len(missing)}, "videos_missing": list(missing)}
    stamp |= more_stamp or {}
    run = RunFolder.create(folder / name, config, stamp)
    log = MetricLog(run.path)
    for step in range(6):
        row = {"step": step, "epoch": step // 3, "lr": 1e-4, "loss": 2.0 - step / 10, "answer_loss": 1.5}
        if kd_weight:
            row |= {"kd_loss": 0.5, "saturated": 0.0, "cosine/8": step / 10, "weight/8": 0.5, "cosine/13": 0.1}
        log.write(step, "train", {**row, "data_wait_s": 0.01, "samples_per_s": 40.0})
    log.write(6, "val", {"step": 6, "top1": 0.5, "answer_loss": 1.4})
    log.close()
    return run


def six_answers(*, question: str = "who & what?") -> list[Prediction]:
    """Six answers, four of them right; the surest mistake gives the hostile label, the other one no label at all."""
    answered = [
        ("friend", "friend", -0.1),
        ("friend", EVIL, -0.2),
        ("friend", "friend", -0.3),
        ("husband wife", "husband wife", -0.4),
        ("husband wife", "two people", -0.5),
        (EVIL, EVIL, -0.6),
    ]
    return [
        Prediction(f"s{index}", f"v{index}", "relation", question, gold, (given, "friend"), (surety, surety - 1))
        for index, (gold, given, surety) in enumerate(answered)
    ]


def add_evaluation(
    run: RunFolder,
    split: str = "test",
    *,
    method: str = "generate",
    predictions: list[Prediction] | None = None,
    labels: dict | None = None,
    left_out: tuple[str, ...] = (),
) -> None:
    """Score answers and write all three files of the evaluation."""
    config, rows = run.config(), six_answers() if predictions is None else predictions
    scores = score(
        rows,
        split=split,
        method=method,
        labels={"relation": LABELS} if labels is None else labels,
        train_majority={"relation": "husband wife"} if labels is None else {},
        resamples=200,
        seed=0,
    )
    record = EvaluationRecord(
        made=versions(),
        split=split,
        method=method,
        model=ModelRecord(
            source=str(run.path), kind="run", checkpoint="step-00000006", epoch=2, step=6, sha256="0" * 64
        ),
        data=DataRecord(
            dataset=config.data.dataset,
            task=config.data.task,
            cache="cache",
            fingerprint=FINGERPRINT,
            samples=len(rows),
            samples_left_out=2 * len(left_out),
            videos_left_out=left_out,
        ),
        overrides=(),
        settings={name: getattr(config, name).model_dump(mode="json") for name in ("data", "evaluate", "language")},
    )
    write_results(run.path, record, rows, scores)
