"""`pipeline evaluate`: answer a split, write predictions and metrics, print accuracies beside their floors."""

import json
from dataclasses import asdict
from pathlib import Path

from pipeline import locations
from pipeline.config import PipelineConfig, resolve_run
from pipeline.console import emit_json, progress_bar, say, table
from pipeline.run_folder import CONFIG, RunFolder, file_name
from pipeline.stage2 import cached_samples, load_trained, open_cache, say_left_out, visual_width_of
from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.evaluate import Prediction, TaskScore, predict_batches, score
from stages.train import in_order
from stages.windows import WindowDataset, feed


def run(path: Path, *, split: str, overrides: list[str], as_json: bool) -> dict[str, TaskScore]:
    """Evaluate a run's best checkpoint; returns the score of each task."""
    folder = RunFolder.open(path)
    config = resolve_run(path / CONFIG, overrides)
    predictions = _predict(folder, config, split)
    scores = score(predictions)
    _write(folder, split, predictions, scores)
    if as_json:
        emit_json(_metrics(split, scores))
    show_scores(scores, split)
    say(f"predictions and metrics in {path}")
    return scores


def show_scores(scores: dict[str, TaskScore], split: str) -> None:
    """Print one line per task: accuracy with its interval beside the floor."""
    rows = [
        [
            task,
            str(one.n),
            f"{one.top1:.1%}",
            f"{100 * one.ci95[0]:.1f}-{one.ci95[1]:.1%}",
            f"{one.floor:.1%}",
            "yes" if one.ci95[0] > one.floor else "no",
            f"{one.top5:.1%}",
        ]
        for task, one in scores.items()
    ]
    columns = ["task", "n", "accuracy", "95% interval", "floor", "above", "top-5"]
    table(f"accuracy on {split} (above: the whole interval is above the floor)", columns, rows)


def _predict(folder: RunFolder, config: PipelineConfig, split: str) -> list[Prediction]:
    cache = open_cache(config)
    folder.require_same({"fingerprint": cache.fingerprint.digest}, ("fingerprint",))
    samples, absent = cached_samples(cache, locations.manifest_of(config, [split]))
    if not samples:
        raise UserError(f"no sample of split {split} has its video in the cache", where=cache.root)
    say_left_out(absent)
    tolerance = config.cache.tolerance_s
    loaded = load_trained(folder, config, visual_width=visual_width_of(cache, samples[0], tolerance))
    dataset = WindowDataset(cache, samples, tolerance_s=tolerance, with_targets=False)
    batches = feed(
        dataset, in_order(len(dataset), config.evaluate.batch_size), loaded.tokenizers, workers=config.train.workers
    )
    predictions = []
    with progress_bar(f"evaluate {split}", len(samples), "samples") as bar:
        answered = predict_batches(
            loaded.model, batches, loaded.tokenizers, config.language, loaded.compute.device, loaded.compute.dtype
        )
        for prediction in answered:
            predictions.append(prediction)
            bar.advance()
    return predictions


def _write(folder: RunFolder, split: str, predictions: list[Prediction], scores: dict[str, TaskScore]) -> None:
    lines = (json.dumps({**asdict(prediction), "correct": prediction.correct}) for prediction in predictions)
    atomic_write_text(folder.path / file_name("predictions", split, "jsonl"), "".join(f"{line}\n" for line in lines))
    metrics = json.dumps(_metrics(split, scores), indent=2) + "\n"
    atomic_write_text(folder.path / file_name("metrics", split, "json"), metrics)


def _metrics(split: str, scores: dict[str, TaskScore]) -> dict[str, dict[str, object]]:
    return {task: {"split": split, **asdict(one)} for task, one in scores.items()}
