"""The cached samples of a run: found, checked for leakage, and what is left out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.screen.console import say
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig
from stages.cache.feature_cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.data.leakage import refuse_leakage
from stages.data.manifest import Manifest, Sample
from stages.errors import UserError
from stages.frozen.identity import feature_fields
from stages.frozen.same_weights import require_same_weights
from stages.wording import counted, first_names


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
        pending = f"{len(status.pending)} of {counted(len(manifest.videos), 'video is', 'videos are')} not extracted"
        raise UserError(
            f"{pending}, the first is {min(status.pending)!r}",
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


def visual_width_of(cache: FeatureCache, sample: Sample, tolerance_s: float) -> int:
    """C of the cached features."""
    frame = cache.read(sample.video, np.asarray(sample.frame_times_s()[:1]), tolerance_s=tolerance_s, targets=False)
    assert frame.features is not None
    return int(frame.features.shape[2])
