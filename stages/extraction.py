"""Stage 1 from plan to summary: what is done already, what is asked of the workers, what the ledger is told."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.config import ModelConfig, Settings
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint, Scalar
from stages.cache.ledger import LedgerStatus
from stages.cache.storage import STORAGE_FIELD
from stages.config import ExtractConfig
from stages.device import pick_device, pick_dtype
from stages.errors import UserError
from stages.frame_plan import FramePlan
from stages.frozen_networks import describe_encoder, describe_teacher
from stages.manifest import Manifest
from stages.weights import OnLoaded, log_loading
from stages.worker import ExtractionJob, VideoOutcome, VideoTask


@dataclass(frozen=True)
class ExtractionSummary:
    """The ledger after an extraction; done + failed + pending == planned.

    Attributes:
        planned: videos of the plan.
        done: videos whose planned frames are all in the cache.
        failed: reason by video id.
        pending: videos not tried yet, after an interruption.
        extracted_now: videos done by this run.
        frames_now: frames committed by this run.
    """

    planned: int
    done: int
    failed: dict[str, str]
    pending: int
    extracted_now: int
    frames_now: int


def feature_fields(config: ModelConfig, *, with_teacher: bool = True) -> dict[str, Scalar]:
    """The part of a fingerprint that follows from the configuration alone; Stage 2 compares these.

    Every setting of encoder and teacher is in it: those that the chosen network does not read cannot be changed.
    """
    fields: dict[str, Scalar] = {
        **_named("encoder", config.encoder),
        "frame.rule": "the frame shown at t",
        "frame.resize": "native to square, bicubic, antialiased, uint8",
    }
    return {**fields, **_named("teacher", config.teacher)} if with_teacher else fields


def _named(part: str, settings: Settings) -> dict[str, Scalar]:
    return {f"{part}.{name}": value for name, value in settings.model_dump().items()}


def settle_precision(extract: ExtractConfig) -> ExtractConfig:
    """Decide an `auto` precision here, once, so that all workers compute alike and the fingerprint tells the truth."""
    dtype = str(pick_dtype(extract.precision, pick_device())).removeprefix("torch.")
    return extract.model_copy(update={"precision": dtype})


def fingerprint(config: ModelConfig, extract: ExtractConfig, on_loaded: OnLoaded = log_loading) -> Fingerprint:
    """Everything that changes a cached feature, weights included: reads and hashes the weights that are used.

    `on_loaded` is told which tensors those are, checkpoint by checkpoint. The precision must be settled
    (`settle_precision`).
    """
    assert extract.precision != "auto"
    computed: dict[str, Scalar] = {"precision": extract.precision, STORAGE_FIELD: extract.storage}
    for part, source in (("encoder", describe_encoder(config.encoder)), ("teacher", describe_teacher(config.teacher))):
        facts = {**source.facts, "weights": source.digest, "size_px": source.size_px}
        computed |= {f"{part}.{name}": value for name, value in facts.items()}
        for report in source.loading:
            on_loaded(report)
    return Fingerprint(fields={**feature_fields(config), **computed})


class Extraction:
    """One extraction into one cache.

    Args:
        manifest: whose videos and samples.
        plan: the frames wanted of each video.
        cache: where they go.
        job: what the workers are told.
        videos: folder of the video files.
        retry_failed: whether videos that failed before are tried again.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: FramePlan,
        cache: FeatureCache,
        job: ExtractionJob,
        *,
        videos: Path,
        retry_failed: bool,
    ) -> None:
        self.manifest, self.plan, self.cache, self.job, self.videos = manifest, plan, cache, job, videos
        self.before = cache.ledger.status(plan.times_s)
        again = set(self.before.failed) if retry_failed else set()
        self.todo = sorted(self.before.pending | again)

    def run(
        self,
        process_all: Callable[[list[VideoTask]], Iterator[tuple[VideoOutcome, int]]],
        on_outcome: Callable[[VideoOutcome], None],
    ) -> ExtractionSummary:
        """Extract what is to do and write the ledger.

        Args:
            process_all: gives tasks to workers and yields outcomes with attempts, see `stages.ray_flow`.
            on_outcome: told of each outcome, for progress.

        Raises:
            UserError: the cache cannot be written any more; what is committed stays.
        """
        extracted, frames = 0, 0
        with self.cache.ledger.writer() as ledger:
            self.cache.ledger.status(self.plan.times_s, adopt=ledger)
            if self.todo:
                self.cache.sweep()
                for outcome, attempts in process_all([self._task(video) for video in self.todo]):
                    on_outcome(outcome)
                    if outcome.fatal is not None:
                        raise UserError(outcome.fatal, exit_code=1)
                    if outcome.checksum is not None:
                        ledger.done(outcome.video, checksum=outcome.checksum, attempts=attempts)
                        extracted, frames = extracted + 1, frames + outcome.frames
                    else:
                        ledger.failed(outcome.video, reason=outcome.reason or "", attempts=attempts)
        return self.summary(extracted, frames)

    def summary(self, extracted_now: int = 0, frames_now: int = 0) -> ExtractionSummary:
        """Read the ledger as it stands."""
        status: LedgerStatus = self.cache.ledger.status(self.plan.times_s)
        return ExtractionSummary(
            planned=self.plan.num_videos,
            done=len(status.done),
            failed={video: failure.reason for video, failure in sorted(status.failed.items())},
            pending=len(status.pending),
            extracted_now=extracted_now,
            frames_now=frames_now,
        )

    def _task(self, video: str) -> VideoTask:
        """Only the frames that are not cached yet: a task planned later adds to what is there."""
        planned, path = self.plan.times_s[video], str(self.videos / self.manifest.videos[video].path)
        if video in self.before.damaged:
            return VideoTask(video, path, planned, fresh=True)
        missing = np.setdiff1d(planned, self.cache.cached_times_s(video))
        # All cached and yet not done: the record is not the one that the ledger vouches for.
        return VideoTask(video, path, missing) if missing.size else VideoTask(video, path, planned, fresh=True)
