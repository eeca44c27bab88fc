"""`pipeline evaluate`: answer a split, write predictions and metrics, print accuracies beside their floors."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pipeline.runs.cached_data import CachedSamples, cached_samples, open_cache, visual_width_of
from pipeline.runs.evaluated import Evaluated, open_evaluated
from pipeline.runs.models import require_room, warn_of_long_answers, warn_of_long_questions
from pipeline.runs.results import DataRecord, EvaluationRecord, ModelRecord, metrics_of, write_results
from pipeline.runs.run_folder import versions
from pipeline.runs.small_world import warn_of_unknown_data
from pipeline.screen.console import beside_json, emit_json, print_answer, progress_bar, say, table
from pipeline.screen.tables import Columns, without_empty
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.batches.feed import feed
from stages.batches.windows import WindowDataset
from stages.cache.feature_cache import FeatureCache
from stages.data.manifest import Manifest, Sample, Split
from stages.errors import UserError
from stages.evaluate.answering import answer_batches, methods_of, require_candidates
from stages.evaluate.at_once import AtOnce, clip_shape
from stages.evaluate.scoring import Method, Prediction, TaskScore, labels_of, majority_answers, score
from stages.train.trainer import in_order

_TITLES: dict[Method, str] = {"generate": "accuracy", "rank": "accuracy of ranked candidates"}
_NONE = "-"
# Batches that each reading process reads ahead.
_PREFETCH = 2
# The branches of the configuration that answers and scores depend on, beside the parameters.
_RECORDED = ("data", "evaluate", "language")


def run(
    source: str | Path,
    *,
    split: str,
    overrides: list[str],
    as_json: bool,
    method: str | None = None,
    options: Mapping[str, str | None] | None = None,
    output: Path | None = None,
) -> dict[str, TaskScore]:
    """Evaluate a run's best checkpoint or an exported model.

    Args:
        source: folder of the run; folder or hub id of the exported model.
        split: train, val or test.
        overrides: settings that differ from the model's own.
        as_json: whether the metrics go to stdout too.
        method: generate, rank or both; None means the model's own.
        options: data set, task and folders that differ from the model's own, as dotted keys.
        output: folder of the results; None means the model's.

    Returns:
        The score of each task, of the first method if there are two.
    """
    methods = [] if method is None else [f"evaluate.method={method}"]
    model = open_evaluated(str(source), options or {}, [*overrides, *methods])
    folder = model.results_folder(output)
    asked = _asked(model, split)
    warn_of_unknown_data(model.config)
    answering = model.identify()
    predictions = _predict(model, asked)
    labels, settings = labels_of(asked.samples), model.config.evaluate
    scores = {
        name: score(
            rows,
            split=asked.split,
            method=name,
            labels=labels,
            train_majority=asked.train_majority,
            resamples=settings.resamples,
            seed=settings.resample_seed,
        )
        for name, rows in predictions.items()
    }
    for name, rows in predictions.items():
        write_results(folder, _record(model, asked, answering, name, len(rows)), rows, scores[name])
    if as_json:
        metrics = {name: metrics_of(found) for name, found in scores.items()}
        emit_json(metrics if settings.method == "both" else next(iter(metrics.values())))
    with beside_json(as_json):
        for name, found in scores.items():
            show_scores(found, split, name)
        print_answer(f"predictions and metrics in {folder}")
    return next(iter(scores.values()))


@dataclass(frozen=True)
class _Asked:
    """The samples that are answered, and what is known of the split that they are from."""

    split: Split
    cache: FeatureCache
    samples: list[Sample]
    samples_left_out: int
    found: CachedSamples
    train_majority: dict[str, str]


def _asked(model: Evaluated, split: str) -> _Asked:
    cache = open_cache(_without_teacher(model.config))
    found = cache.fingerprint.digest
    if model.fingerprint is not None and found != model.fingerprint:
        raise UserError(
            f"fingerprint changed since the run began: it was {model.fingerprint!r}",
            where=model.source,
            received=found,
            hint="give the cache that the run began with, or one that was extracted with the same settings",
        )
    manifest = locations.manifest_of(model.config)
    of_split = manifest.select(splits=[split])
    found_samples = cached_samples(cache, of_split)
    samples = found_samples.samples
    if not samples:
        raise UserError(f"no sample of split {split} has its video in the cache", where=cache.root)
    if model.config.evaluate.method == "rank":
        require_candidates(samples)
    if line := found_samples.left_out():
        say(line)
    left_out = len(of_split.samples) - len(samples)
    return _Asked(cast("Split", split), cache, samples, left_out, found_samples, _train_majority(manifest))


def _without_teacher(config: PipelineConfig) -> PipelineConfig:
    """The same settings for a model that distils nothing: answering needs no teacher, nor what the cache has of it."""
    return config.model_copy(update={"alignment": config.alignment.model_copy(update={"kd_weight": 0.0})})


def _train_majority(manifest: Manifest) -> dict[str, str]:
    return majority_answers(sample for sample in manifest.samples if sample.split == "train")


def _predict(model: Evaluated, asked: _Asked) -> dict[Method, list[Prediction]]:
    config, samples, cache = model.config, asked.samples, asked.cache
    unranked = sum(sample.candidates is None for sample in samples)
    methods = methods_of(config.evaluate, candidates=unranked < len(samples))
    if unranked and config.evaluate.method == "both":
        say(f"{unranked} of {len(samples)} samples have open answers, with nothing to rank: these are only generated")
    tolerance = config.cache.tolerance_s
    require_room(config, len(samples[0].frame_times_s()))
    loaded = model.finished.load(visual_width_of(cache, samples[0], tolerance))
    warn_of_long_questions(loaded.tokenizers, [(sample.question, sample.prompt) for sample in samples])
    if "generate" in methods:
        warn_of_long_answers(loaded.tokenizers, _answers_of(samples), config.language)
    dataset = WindowDataset(cache, samples, tolerance_s=tolerance, with_targets=False)
    compute, ahead = loaded.compute, config.train.loader_workers * _PREFETCH
    shape = clip_shape(dataset, samples, loaded.tokenizers, loaded.model.qformer.num_queries)
    at_once = AtOnce.that_fits(loaded.model, shape, config.language, config.evaluate, compute.device, read_ahead=ahead)
    batches = feed(
        dataset,
        in_order(len(dataset), at_once.samples),
        loaded.tokenizers,
        workers=config.train.loader_workers,
        prefetch=_PREFETCH,
    )
    predictions: dict[Method, list[Prediction]] = {method: [] for method in methods}
    with progress_bar(f"evaluate {asked.split}", len(samples), "sample") as bar:
        for found in answer_batches(
            loaded.model,
            batches,
            loaded.tokenizers,
            config.language,
            config.evaluate,
            compute.device,
            compute.dtype,
            at_once,
        ):
            for method, prediction in found.items():
                predictions[method].append(prediction)
            bar.advance()
    return predictions


def _answers_of(samples: list[Sample]) -> list[str]:
    """Every answer that would be right for some sample, and every candidate."""
    return list(dict.fromkeys(answer for one in samples for answer in (*(one.candidates or ()), one.answer)))


def _record(model: Evaluated, asked: _Asked, answering: ModelRecord, method: Method, answered: int) -> EvaluationRecord:
    config = model.config
    return EvaluationRecord(
        made=versions(),
        split=asked.split,
        method=method,
        model=answering,
        data=DataRecord(
            dataset=config.data.dataset,
            task=config.data.task,
            cache=str(asked.cache.root),
            fingerprint=asked.cache.fingerprint.digest,
            samples=answered,
            samples_left_out=asked.samples_left_out,
            videos_left_out=asked.found.failed,
            videos_damaged=asked.found.damaged,
            samples_beyond_damage=asked.found.beyond,
        ),
        overrides=model.overrides,
        settings={branch: getattr(config, branch).model_dump(mode="json") for branch in _RECORDED},
    )


def show_scores(scores: dict[str, TaskScore], split: str, method: Method = "generate") -> None:
    """Print accuracies in percent: beside their intervals and floors, then in every other way of counting."""
    columns: Columns = ["task", "n", ("top-1", "95%", "95% over videos"), ("floor", "train floor", "above")]
    rows = [
        [
            task,
            str(one.n),
            _percent(one.top1),
            _range(one.ci95),
            _range(one.ci95_videos),
            _percent(one.floor),
            _percent(one.train_floor),
            "yes" if one.beats_floor else "no",
        ]
        for task, one in scores.items()
    ]
    table(f"{_TITLES[method]} on {split}, percent (above: both intervals are above the floor)", columns, rows)
    columns = ["task", "top-5", "macro", "no label", "videos", ("vote", "95%"), ("likelihood", "95%")]
    # Some have no meaning for this method or data set.
    columns, rows = without_empty(columns, [_more(*item) for item in scores.items()], _NONE)
    table("top-5, mean over classes; one answer a video, by majority vote and by mean likelihood", columns, rows)
    types = [
        [task, kind, str(one.n), _percent(one.top1), _range(one.ci95)]
        for task, found in scores.items()
        for kind, one in found.answer_types.items()
    ]
    if types:
        table("by type of answer", ["task", "type", "n", ("top-1", "95%")], types)


def _more(task: str, one: TaskScore) -> list[str]:
    voted = [_NONE] * 4
    if one.videos is not None:
        shares = (one.videos.top1_majority, one.videos.top1_likelihood)
        intervals = (one.videos.ci95_majority, one.videos.ci95_likelihood)
        voted = [cell for pair in zip(map(_percent, shares), map(_range, intervals), strict=True) for cell in pair]
    return [task, _percent(one.top5), _percent(one.macro), _percent(one.no_label), str(one.num_videos), *voted]


def _percent(share: float | None) -> str:
    return _NONE if share is None else f"{100 * share:.1f}"


def _range(interval: tuple[float, float] | None) -> str:
    return _NONE if interval is None else f"{100 * interval[0]:.1f}-{100 * interval[1]:.1f}"
