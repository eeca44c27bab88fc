"""What training, evaluation and prediction share: the cache that fits, the samples that are in it, the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pipeline import locations
from pipeline.config import PipelineConfig
from pipeline.console import say
from stages.cache.feature_cache import FeatureCache
from stages.checkpoint import Checkpoints
from stages.device import pick_device, pick_dtype
from stages.errors import UserError
from stages.extraction import feature_fields
from stages.frame_plan import plan_frames
from stages.manifest import Manifest, Sample
from stages.networks import build_diff_lmm, load_language
from stages.tokens import Tokenizers
from stages.train import Compute

if TYPE_CHECKING:
    from model.diff_lmm import DiffLMM
    from pipeline.run_folder import RunFolder


@dataclass(frozen=True)
class LoadedModel:
    """Stage 2's model on its device, and what goes with it."""

    model: "DiffLMM"
    tokenizers: Tokenizers
    compute: Compute

    @property
    def trained_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.model.trained_parameters().values())

    @property
    def frozen_count(self) -> int:
        """Number of frozen values."""
        return sum(parameter.numel() for parameter in self.model.parameters()) - self.trained_count


def open_cache(config: PipelineConfig) -> FeatureCache:
    """Open the run's cache and check that its features fit the model.

    Raises:
        UserError: no cache, or one made with another network or layer; the field is named.
    """
    cache = FeatureCache.open(locations.cache_root(config), extract_command=locations.extract_command(config))
    cache.fingerprint.require_match(feature_fields(config, with_teacher=config.alignment.kd_weight > 0), cache.root)
    return cache


def cached_samples(cache: FeatureCache, manifest: Manifest) -> tuple[list[Sample], set[str]]:
    """The samples whose video is in the cache, and the videos that failed extraction.

    Raises:
        UserError: videos are neither done nor failed; the missing command is named.
    """
    status = cache.ledger.status(plan_frames(manifest).times_s)
    if status.pending:
        pending = f"{len(status.pending)} of {len(manifest.videos)} videos"
        raise UserError(
            f"{pending} are not extracted, the first is {min(status.pending)!r}",
            where=cache.root,
            hint=f"run `{cache.extract_command}`",
        )
    return [sample for sample in manifest.samples if sample.video in status.done], set(status.failed)


def build_for_training(config: PipelineConfig, cache: FeatureCache, sample: Sample) -> LoadedModel:
    """Build the model as training starts it; widths are read off one cached frame.

    Raises:
        UserError: the networks do not fit each other, the cache or the sample.
    """
    require_room(config, len(sample.frame_times_s()))
    frame = cache.read(sample.video, sample.frame_times_s()[:1], tolerance_s=config.cache.tolerance_s)
    assert frame.features is not None
    assert frame.targets is not None
    return _build(config, visual_width=frame.features.shape[2], target_width=frame.targets.shape[1])


def require_room(config: PipelineConfig, num_frames: int) -> None:
    """UserError if a clip has more frames than the Q-Former's temporal table has rows."""
    if num_frames > config.qformer.max_frames:
        raise UserError(
            f"a clip of this data set has {num_frames} frames",
            where="qformer.max_frames",
            received=config.qformer.max_frames,
            allowed=f"{num_frames} or more",
        )


def load_trained(run: "RunFolder", config: PipelineConfig, *, visual_width: int) -> LoadedModel:
    """Build the model of a run and load its best checkpoint, without alignment heads.

    Raises:
        UserError: the run has no checkpoint, or it does not fit the configuration.
    """
    checkpoints = Checkpoints(run.path)
    best = checkpoints.best()
    loaded = _build(config, visual_width=visual_width, target_width=None)
    try:
        loaded.model.load_trained(checkpoints.model(best))
    except ValueError as error:
        raise UserError(str(error), where=checkpoints.folder / best) from error
    return loaded


def _build(config: PipelineConfig, *, visual_width: int, target_width: int | None) -> LoadedModel:
    device = pick_device()
    dtype = pick_dtype(config.train.precision, device)
    tokenizers = Tokenizers.load(config)
    language = load_language(config.language, dtype)
    try:
        model = build_diff_lmm(
            config,
            language=language,
            special=tokenizers.special,
            visual_width=visual_width,
            target_width=target_width,
            seed=config.train.seed,
        )
    except ValueError as error:
        raise UserError(str(error), where="configuration") from error
    return LoadedModel(model.to(device), tokenizers, Compute(device, dtype))


def visual_width_of(cache: FeatureCache, sample: Sample, tolerance_s: float) -> int:
    """C of the cached features."""
    frame = cache.read(sample.video, np.asarray(sample.frame_times_s()[:1]), tolerance_s=tolerance_s, targets=False)
    assert frame.features is not None
    return int(frame.features.shape[2])


def say_left_out(absent: set[str]) -> None:
    """Tell the user that failed videos are missing from what follows."""
    if absent:
        say(f"{len(absent)} videos failed extraction and are left out")
