"""`pipeline evaluate`: answer a split, write predictions and metrics, print accuracies beside their floors."""

import json
from dataclasses import asdict
from pathlib import Path

from pipeline import locations
from pipeline.config import PipelineConfig, resolve_run
from pipeline.console import emit_json, progress_bar, say, table
from pipeline.run_folder import CONFIG, RunFolder, file_name
from pipeline.stage2 import (
    cached_samples,
    load_trained,
    open_cache,
    say_left_out,
    visual_width_of,
    warn_of_long_answers,
)
from stages.atomic import atomic_write_text
from stages.config import EvaluateConfig
from stages.errors import UserError
from stages.evaluate import Method, Prediction, TaskScore, answer_batches, methods_of, require_candidates, score
from stages.manifest import Sample
from stages.train import in_order
from stages.windows import WindowDataset, feed

_TITLES: dict[Method, str] = {"generate": "accuracy", "rank": "accuracy of ranked candidates"}


def run(
    path: Path, *, split: str, overrides: list[str], as_json: bool, method: str | None = None
) -> dict[str, TaskScore]:
    """Evaluate a run's best checkpoint; returns the score of each task, of the first method if there are two."""
    folder = RunFolder.open(path)
    config = resolve_run(path / CONFIG, [*overrides, *([] if method is None else [f"evaluate.method={method}"])])
    predictions = _predict(folder, config, split)
    scores = {name: score(rows) for name, rows in predictions.items()}
    rankings = {name: config.evaluate if name == "rank" else None for name in predictions}
    for name, rows in predictions.items():
        _write(folder, split, rows, scores[name], rankings[name])
    if as_json:
        metrics = {name: _metrics(split, found, rankings[name]) for name, found in scores.items()}
        emit_json(metrics if len(metrics) > 1 else next(iter(metrics.values())))
    for name, found in scores.items():
        show_scores(found, split, name)
    say(f"predictions and metrics in {path}")
    return next(iter(scores.values()))


def show_scores(scores: dict[str, TaskScore], split: str, method: Method = "generate") -> None:
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
    table(f"{_TITLES[method]} on {split} (above: the whole interval is above the floor)", columns, rows)


def _predict(folder: RunFolder, config: PipelineConfig, split: str) -> dict[Method, list[Prediction]]:
    methods = methods_of(config.evaluate)
    cache = open_cache(config)
    folder.require_same({"fingerprint": cache.fingerprint.digest}, ("fingerprint",))
    samples, absent = cached_samples(cache, locations.manifest_of(config, [split]))
    if not samples:
        raise UserError(f"no sample of split {split} has its video in the cache", where=cache.root)
    if "rank" in methods:
        require_candidates(samples)
    say_left_out(absent)
    tolerance = config.cache.tolerance_s
    loaded = load_trained(folder, config, visual_width=visual_width_of(cache, samples[0], tolerance))
    if "generate" in methods:
        warn_of_long_answers(loaded.tokenizers, _answers_of(samples), config.language)
    dataset = WindowDataset(cache, samples, tolerance_s=tolerance, with_targets=False)
    batches = feed(
        dataset, in_order(len(dataset), config.evaluate.batch_size), loaded.tokenizers, workers=config.train.workers
    )
    predictions: dict[Method, list[Prediction]] = {method: [] for method in methods}
    compute = loaded.compute
    with progress_bar(f"evaluate {split}", len(samples), "samples") as bar:
        for found in answer_batches(
            loaded.model, batches, loaded.tokenizers, config.language, config.evaluate, compute.device, compute.dtype
        ):
            for method, prediction in found.items():
                predictions[method].append(prediction)
            bar.advance()
    return predictions


def _answers_of(samples: list[Sample]) -> list[str]:
    """Every answer that would be right for some sample, and every candidate."""
    return list(dict.fromkeys(answer for one in samples for answer in (*(one.candidates or ()), one.answer)))


def _write(
    folder: RunFolder,
    split: str,
    predictions: list[Prediction],
    scores: dict[str, TaskScore],
    ranking: EvaluateConfig | None = None,
) -> None:
    """Write both files of one method; those of the beam search (no `ranking`) have the plain names."""
    suffix = "" if ranking is None else "-rank"
    lines = (json.dumps({**asdict(prediction), "correct": prediction.correct}) for prediction in predictions)
    name = file_name(f"predictions{suffix}", split, "jsonl")
    atomic_write_text(folder.path / name, "".join(f"{line}\n" for line in lines))
    metrics = json.dumps(_metrics(split, scores, ranking), indent=2) + "\n"
    atomic_write_text(folder.path / file_name(f"metrics{suffix}", split, "json"), metrics)


def _metrics(
    split: str, scores: dict[str, TaskScore], ranking: EvaluateConfig | None = None
) -> dict[str, dict[str, object]]:
    how = {} if ranking is None else {"method": "rank", "rank_score": ranking.rank_score}
    return {task: {"split": split, **how, **asdict(one)} for task, one in scores.items()}
