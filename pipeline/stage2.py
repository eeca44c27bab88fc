"""What training, evaluation and prediction share: the cache that fits, the samples that are in it, the model."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from model.config import LanguageConfig
from pipeline import locations
from pipeline.config import PipelineConfig, resolve, resolve_run
from pipeline.console import say
from pipeline.run_folder import CONFIG, RunFolder
from stages.atomic import atomic_write_text
from stages.cache.feature_cache import FeatureCache
from stages.data.card_schema import Card
from stages.data.frame_plan import plan_frames
from stages.data.leakage import refuse_leakage
from stages.data.manifest import Manifest, Sample
from stages.errors import UserError
from stages.frozen.identity import feature_fields
from stages.frozen.same_weights import require_same_weights
from stages.networks.checkpoint import Checkpoints
from stages.networks.exported import About, is_export, open_export
from stages.networks.pretrained import LoadedModel
from stages.networks.tokens import Tokenizers
from stages.weights.repository import LoadingReport, open_tensors
from stages.wording import counted, first_names

LOADING = "loading.json"
# As many answers as fit on the line that warns of them.
_MOST_NAMED = 3


def open_cache(config: PipelineConfig) -> FeatureCache:
    """Open the run's cache and check that its features fit the model.

    Raises:
        UserError: no cache, or one made with another network or layer, or with other weights than those that lie at
            the networks' sources now; the field is named.
    """
    cache = FeatureCache.open(
        locations.cache_root(config),
        extract_command=locations.extract_command(config),
        local_copy=config.cache.local_copy,
    )
    distils = config.alignment.kd_weight > 0
    cache.fingerprint.require_match(feature_fields(config, with_teacher=distils), cache.root)
    require_same_weights(config, cache.fingerprint, cache.root, with_teacher=distils)
    return cache


@dataclass(frozen=True)
class CachedSamples:
    """What the cache has of some samples.

    Attributes:
        samples: those with all their frames in it.
        failed: videos that failed extraction.
        damaged: videos whose files are damaged.
        beyond: ids of samples, of `damaged` videos, that ask for frames behind the damage.
    """

    samples: list[Sample]
    failed: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    beyond: tuple[str, ...] = ()

    def __add__(self, other: "CachedSamples") -> "CachedSamples":
        named = ("failed", "damaged", "beyond")
        both = {name: tuple(sorted({*getattr(self, name), *getattr(other, name)})) for name in named}
        return CachedSamples(self.samples + other.samples, **both)

    def left_out(self) -> str | None:
        """What is missing from what follows, in a line for people."""
        parts = []
        if self.failed:
            parts.append(f"{len(self.failed)} videos failed extraction and are left out")
        if self.beyond:
            named = first_names(self.beyond)
            parts.append(f"samples left out that ask for frames behind a file's damage: {len(self.beyond)} ({named})")
        return "; ".join(parts) or None


def cached_samples(cache: FeatureCache, manifest: Manifest) -> CachedSamples:
    """The samples that can be served from the cache, and what cannot.

    Raises:
        UserError: videos are neither done nor failed; the missing command is named.
    """
    status = cache.ledger.status(plan_frames(manifest).times_s)
    if status.pending:
        pending = f"{len(status.pending)} of {counted(len(manifest.videos), 'video')}"
        raise UserError(
            f"{pending} are not extracted, the first is {min(status.pending)!r}",
            where=cache.root,
            hint=f"run `{cache.extract_command}`",
        )
    beyond = {one.id for one in manifest.samples if status.is_beyond_damage(one.video, one.planned_times_s())}
    samples = [sample for sample in manifest.samples if sample.video in status.done and sample.id not in beyond]
    return CachedSamples(samples, tuple(sorted(status.failed)), tuple(status.remarks), tuple(sorted(beyond)))


@dataclass(frozen=True)
class TrainingData:
    """What a training learns from.

    Attributes:
        manifest: all samples of the annotations.
        cache: the features.
        train: samples whose frames are in the cache.
        val: the same of the validation split; empty if there is none.
        found: both together, and what is left out of them.
        leaks: as `stages.data.leakage.refuse_leakage` returns them.
    """

    manifest: Manifest
    cache: FeatureCache
    train: list[Sample]
    val: list[Sample]
    found: CachedSamples
    leaks: dict[str, int]


def find_training_data(config: PipelineConfig) -> TrainingData:
    """Find a training's samples in its cache.

    Raises:
        UserError: as `stages.data.leakage.refuse_leakage`, `open_cache` and `cached_samples` raise it, or there is no
            sample to learn from.
    """
    manifest = locations.manifest_of(config)
    leaks = refuse_leakage(manifest, manifest.tasks, allow=config.data.allow_leakage)
    cache = open_cache(config)
    train = cached_samples(cache, manifest.select(splits=["train"]))
    if not train.samples:
        raise UserError("no training sample has its video in the cache", where=cache.root)
    val = CachedSamples([])
    if "val" in manifest.splits:
        val = cached_samples(cache, manifest.select(splits=["val"]))
    return TrainingData(manifest, cache, train.samples, val.samples, train + val, leaks)


def build_for_training(config: PipelineConfig, cache: FeatureCache, sample: Sample) -> LoadedModel:
    """Build the model as training starts it; widths are read off one cached frame.

    What was taken from which checkpoint is told.

    Raises:
        UserError: the networks do not fit each other, the cache or the sample.
    """
    require_room(config, len(sample.frame_times_s()))
    frame = cache.read(sample.video, sample.frame_times_s()[:1], tolerance_s=config.cache.tolerance_s)
    assert frame.features is not None
    assert frame.targets is not None
    card = locations.card_of(config)
    loaded = LoadedModel.start(
        about_of(config, card),
        visual_width=frame.features.shape[2],
        target_width=frame.targets.shape[1],
        seed=config.train.seed,
        shard_language=config.train.shard_language == "fsdp",
    )
    for report in loaded.loading:
        say(report.summary())
    tasks = card.tasks.values() if config.data.task == "all" else [card.tasks[config.data.task]]
    warn_of_long_answers(loaded.tokenizers, [label for task in tasks for label in task.labels or ()], config.language)
    return loaded


def about_of(config: PipelineConfig, card: Card) -> About:
    """What a model needs beside its parameters, from a run's configuration."""
    return About.of(config, card, config.data.task, config.train.precision)


def write_loading(run: Path, reports: Sequence[LoadingReport]) -> None:
    """Write down what a new run starts from."""
    atomic_write_text(run / LOADING, json.dumps([asdict(report) for report in reports], indent=1) + "\n")


def warn_of_long_answers(tokenizers: Tokenizers, answers: Sequence[str], config: LanguageConfig) -> None:
    """Name the right answers that beam search can never give whole."""
    long = tokenizers.longer_than(answers, config.max_new_tokens)
    if long:
        named = ", ".join(f"{answer!r} ({tokens})" for answer, tokens in list(long.items())[:_MOST_NAMED])
        more = f" and {len(long) - _MOST_NAMED} more" if len(long) > _MOST_NAMED else ""
        say(
            f"warning: these answers have more tokens than language.max_new_tokens={config.max_new_tokens} "
            f"and cannot be generated whole: {named}{more}"
        )


def warn_of_long_questions(tokenizers: Tokenizers, asked: Sequence[tuple[str, str]]) -> None:
    """Say how many of these questions, each with its template, lose their beginning.

    Raises:
        UserError: a template is too long by itself.
    """
    for template in {template for _, template in asked}:
        tokenizers.fitted("", template)
    cut = tokenizers.num_too_long([template.replace("{}", question) for question, template in asked])
    if cut:
        say(
            f"warning: {cut} of {len(asked)} questions are too long for qformer.max_text_tokens="
            f"{tokenizers.max_question} or language.max_prompt_tokens={tokenizers.max_prompt} and lose their beginning"
        )


def warn_of_absent_labels(train: Sequence[Sample], samples: Sequence[Sample]) -> None:
    """Tell the user which labels no training sample has, so that the model cannot learn them, and who needs them."""
    taught = {(sample.task, sample.answer) for sample in train}
    asked = Counter((s.task, s.answer) for s in samples if s.split != "train" and s.candidates is not None)
    labels = dict.fromkeys((s.task, label) for s in samples for label in s.candidates or ())
    for task, label in labels:
        if (task, label) not in taught:
            others = asked[task, label]
            asking = counted(others, "of its other samples asks for", "of its other samples ask for")
            which = f", which {asking}" if others else ""
            say(f"warning: no training sample of task {task!r} has the answer {label!r}{which}")


def require_room(config: PipelineConfig, num_frames: int) -> None:
    """UserError if a clip has more frames than the Q-Former's temporal table has rows."""
    if num_frames > config.qformer.max_frames:
        raise UserError(
            f"a clip of this data set has {counted(num_frames, 'frame')}",
            where="qformer.max_frames",
            received=config.qformer.max_frames,
            allowed=f"{num_frames} or more",
        )


@dataclass(frozen=True)
class Finished:
    """A trained model that is not loaded yet.

    Attributes:
        config: all settings.
        about: its networks and data set.
        load: from C of the features to the model.
    """

    config: PipelineConfig
    about: About
    load: Callable[[int], LoadedModel]


def is_exported(source: str) -> bool:
    """Whether the model is an exported folder, or one of the hub: then no folder of that name's owner is here."""
    path = Path(source)
    if path.is_dir():
        return is_export(path) and not (path / CONFIG).is_file()
    return not path.exists() and not path.is_absolute() and source.count("/") == 1 and not path.parent.exists()


def open_run(path: Path, overrides: Sequence[str]) -> Finished:
    """Open a run, whose best checkpoint is the model; UserError if the folder is no run."""
    folder = RunFolder.open(path)
    config = resolve_run(path / CONFIG, overrides)
    about = about_of(config, locations.card_of(config))
    return Finished(config, about, lambda width: load_trained(folder, config, visual_width=width))


def open_exported(source: str, overrides: Sequence[str]) -> Finished:
    """Open an exported model by folder or hub id; what it does not say has its default.

    Raises:
        UserError: there is none, or its frozen networks are not where it says, or are not those.
    """
    export = open_export(source)
    about = export.record.description
    options = {f"{branch}.{name}": value for branch, part in about.networks for name, value in part}
    given = {**options, "data.task": about.task, "train.precision": about.precision}
    config = resolve(options=given, overrides=overrides).config
    about = About.of(config, about.card, about.task, config.train.precision)

    def load(width: int) -> LoadedModel:
        export.require_encoder(config.encoder)
        export.require_language(config.language)
        return LoadedModel.finished(about, open_tensors(export.weights), visual_width=width, where=source)

    return Finished(config, about, load)


def load_trained(run: RunFolder, config: PipelineConfig, *, visual_width: int) -> LoadedModel:
    """Build the model of a run and load its best checkpoint, without alignment heads.

    Raises:
        UserError: the run has no checkpoint, or it does not fit the configuration.
    """
    checkpoints = Checkpoints(run.path)
    best = checkpoints.best()
    about = about_of(config, locations.card_of(config))
    where = checkpoints.folder / best
    return LoadedModel.finished(about, checkpoints.model(best), visual_width=visual_width, where=where)


def visual_width_of(cache: FeatureCache, sample: Sample, tolerance_s: float) -> int:
    """C of the cached features."""
    frame = cache.read(sample.video, np.asarray(sample.frame_times_s()[:1]), tolerance_s=tolerance_s, targets=False)
    assert frame.features is not None
    return int(frame.features.shape[2])
