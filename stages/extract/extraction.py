"""Stage 1 from plan to summary: what is done already, what the workers do, what goes into the ledger."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stages.cache.feature_cache import FeatureCache
from stages.cache.ledger import LedgerStatus
from stages.cache.source import find_changes
from stages.data.frame_plan import FramePlan
from stages.data.manifest import Manifest
from stages.data.video_paths import join_video_path
from stages.errors import UserError
from stages.extract.estimate import failed_to_try
from stages.extract.worker import ExtractionJob, VideoOutcome, VideoTask
from stages.pace import Pace
from stages.shard import Shard


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
        seconds: how long this run took, with the start of its workers.
        decode_s: seconds of this run's decode children, all together.
        networks_s: seconds in which the frozen networks of all workers computed.
        wait_share: part of their time in which they had nothing to do; None before any work.
        remarks: of done videos whose files are damaged, what is known of that, by id.
        frames_lost: planned frames of done videos that such files cannot give.
        changed: committed videos whose files were other ones when the run began, and what differed, by id.
        unsure: those whose files may have been.
    """

    planned: int
    done: int
    failed: dict[str, str]
    pending: int
    extracted_now: int
    frames_now: int
    seconds: float = 0.0
    decode_s: float = 0.0
    networks_s: float = 0.0
    wait_share: float | None = None
    remarks: dict[str, str] = field(default_factory=dict)
    frames_lost: int = 0
    changed: dict[str, str] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExtractionProgress:
    """How far a running extraction is; done + failed + left == planned.

    Attributes:
        planned: videos of the plan.
        done: videos done, those of earlier runs included.
        failed: videos failed, likewise.
        left: videos that this run still has to do.
        frames_planned: frames that this run has to do.
        frames: frames committed by this run.
        frames_encoded: frames of videos in work that have been through the networks and are not committed yet.
        frames_left: frames that this run has neither committed nor encoded yet.
        frames_per_s: rate over the last minute; None before the first frame.
        left_s: seconds left at this rate; None without a rate.
        seconds: since this run began.
        decode_s: as in `ExtractionSummary`, like the next two.
    """

    planned: int
    done: int
    failed: int
    left: int
    frames_planned: int
    frames: int
    frames_encoded: int
    frames_left: int
    frames_per_s: float | None
    left_s: float | None
    seconds: float
    decode_s: float
    networks_s: float
    wait_share: float | None


OnProgress = Callable[[ExtractionProgress], None]


class _Meter:
    """Adds up what the workers report."""

    def __init__(self, status: LedgerStatus, tasks: list[VideoTask]) -> None:
        self.planned = len(status.done) + len(status.failed) + len(status.pending)
        self.frames_of = {task.video: len(task.times_s) for task in tasks}
        # A video that is extracted again is not done until that has ended.
        self.done = len(status.done.difference(self.frames_of))
        self.left, self.frames_planned = len(tasks), sum(self.frames_of.values())
        self.frames_left = self.frames_planned
        self.extracted, self.frames = 0, 0
        self.decode_s, self.networks_s, self.idle_s = 0.0, 0.0, 0.0
        self.began_s = time.monotonic()
        self._encoded: dict[str, int] = {}
        self._pace = Pace()

    def add(self, outcome: VideoOutcome) -> ExtractionProgress:
        """Count one video that has ended."""
        self._encoded.pop(outcome.video, None)
        self.left -= 1
        self.frames_left -= self.frames_of[outcome.video]
        if outcome.checksum is not None:
            self.done, self.extracted, self.frames = self.done + 1, self.extracted + 1, self.frames + outcome.frames
        self.decode_s += outcome.decode_s
        self.networks_s += outcome.networks_s
        self.idle_s += outcome.idle_s
        return self._progress()

    def encode(self, encoded: dict[str, int]) -> ExtractionProgress:
        """Replace what is known of the videos in work: how many frames of each have been through the networks."""
        self._encoded = encoded
        return self._progress()

    def _progress(self) -> ExtractionProgress:
        encoded = sum(self._encoded.values())
        frames_left = self.frames_left - encoded
        # Workers that start compute nothing, so the rate begins with the first word of one.
        self._pace.look(self.frames + encoded)
        rate = self._pace.per_s
        return ExtractionProgress(
            planned=self.planned,
            done=self.done,
            failed=self.planned - self.done - self.left,
            left=self.left,
            frames_planned=self.frames_planned,
            frames=self.frames,
            frames_encoded=encoded,
            frames_left=frames_left,
            frames_per_s=rate,
            left_s=frames_left / rate if rate else None,
            seconds=time.monotonic() - self.began_s,
            decode_s=self.decode_s,
            networks_s=self.networks_s,
            wait_share=self.wait_share(),
        )

    def wait_share(self) -> float | None:
        """Part of the networks' time in which they had nothing to do."""
        known_s = self.networks_s + self.idle_s
        return self.idle_s / known_s if known_s else None


class Extraction:
    """One extraction into one cache.

    Args:
        manifest: whose videos and samples.
        plan: the frames wanted of each video.
        cache: where they go.
        job: networks, settings and cache of the workers.
        videos: folder or URL of the video files.
        retry_failed: whether videos that failed before are tried again; those whose files were not there are, anyway,
            when they are there now.
        refresh_changed: whether videos whose files have changed, or may have, are extracted again.
        shard: which one the plan is, where others write into the cache at the same time.

    `changes` are the committed videos whose files have changed since, or may have.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: FramePlan,
        cache: FeatureCache,
        job: ExtractionJob,
        *,
        videos: Path | str,
        retry_failed: bool,
        refresh_changed: bool = False,
        shard: Shard | None = None,
    ) -> None:
        self.manifest, self.plan, self.cache, self.job, self.videos = manifest, plan, cache, job, videos
        self.retry_failed, self.shard = retry_failed, shard
        status = cache.ledger.status(plan.times_s)
        self.changes = find_changes(status.sources, self.place_of)
        outdated = self.changes.outdated if refresh_changed else ()
        self._outdated = {video: status.records[video].group for video in outdated}
        self._look(status)

    def run(
        self,
        process_all: Callable[[list[VideoTask]], Iterator[tuple[VideoOutcome, int]]],
        on_outcome: Callable[[VideoOutcome, ExtractionProgress], None],
        on_progress: OnProgress = lambda _progress: None,
    ) -> ExtractionSummary:
        """Extract what is to do and write the ledger.

        Args:
            process_all: gives tasks to workers and yields outcomes with attempts, see `stages.extract.hand_out`.
            on_outcome: called with each outcome and the progress.
            on_progress: called with the progress whenever `encoded` is called.

        Raises:
            UserError: a video's path leads outside the videos folder; or the cache cannot be written any more: what
                is committed stays.
        """
        self._meter, self._on_progress = _Meter(self.before, []), on_progress
        if not self.todo and not self.before.unlisted:
            return self._summary(self.before)
        with self.cache.ledger.writer(shard=self.shard) as ledger:
            # Another extraction may have ended between the first look and the lock: what it has done is done.
            self._look(self.cache.ledger.status(self.plan.times_s, adopt=ledger))
            if self.todo:
                self.cache.sweep()
                tasks = [self._task(video) for video in self.todo]
                self._meter = _Meter(self.before, tasks)
                for outcome, attempts in process_all(tasks):
                    if outcome.fatal is not None:
                        raise UserError(outcome.fatal, exit_code=1)
                    if outcome.checksum is not None:
                        ledger.done(outcome.video, checksum=outcome.checksum, attempts=attempts)
                    else:
                        if outcome.video in self.refreshed:
                            # What is cached is of another file, and counts no more.
                            self.cache.remove_video(outcome.video)
                            ledger.requeued(outcome.video, reason="its file has changed")
                        ledger.failed(outcome.video, reason=outcome.reason or "", attempts=attempts)
                    on_outcome(outcome, self._meter.add(outcome))
        return self._summary(self.cache.ledger.status(self.plan.times_s))

    def encoded(self, frames: dict[str, int]) -> None:
        """Hear, while it runs, how many frames of each video in work have been through the networks."""
        self._on_progress(self._meter.encode(frames))

    def _look(self, status: LedgerStatus) -> None:
        """Take from the ledger what is left to do."""
        self.before = status
        # What another extraction has extracted again meanwhile has another group.
        groups = {video: record.group for video, record in status.records.items()}
        self.refreshed = {video for video, group in self._outdated.items() if groups.get(video) == group}
        again = failed_to_try(status, self.place_of, retry_failed=self.retry_failed)
        self.todo = sorted(status.pending | again | self.refreshed)

    def _summary(self, status: LedgerStatus) -> ExtractionSummary:
        """The ledger as it stands, and what this run did."""
        meter = self._meter
        return ExtractionSummary(
            planned=self.plan.num_videos,
            done=len(status.done),
            failed={video: failure.reason for video, failure in sorted(status.failed.items())},
            pending=len(status.pending),
            extracted_now=meter.extracted,
            frames_now=meter.frames,
            seconds=time.monotonic() - meter.began_s,
            decode_s=meter.decode_s,
            networks_s=meter.networks_s,
            wait_share=meter.wait_share(),
            remarks=status.remarks,
            frames_lost=sum(status.records[video].absent(self.plan.times_s[video]).size for video in status.remarks),
            changed=self.changes.changed,
            unsure=self.changes.unsure,
        )

    def place_of(self, video: str) -> str:
        """Path or URL of a video's file; UserError when it may not be read."""
        protocols = self.job.extract.protocols
        return join_video_path(self.videos, self.manifest.videos[video].path, protocols, video=video)

    def _task(self, video: str) -> VideoTask:
        """Only the frames that are not cached yet: a task planned later adds to what is there."""
        planned, named = self.plan.times_s[video], self.manifest.videos[video].path
        times_s, fresh = self.before.frames_to_do(video, planned)
        if video in self.refreshed:
            times_s, fresh = planned, True
        return VideoTask(video, self.place_of(video), times_s, named, fresh=fresh)
