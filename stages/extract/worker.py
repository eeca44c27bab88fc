"""Stage 1's worker: one video in, its features and targets committed to the cache, a small row out.

Knows nothing of Ray. Several threads may call `process` at once: each borrows a decode child, and one thread serves the
frozen networks with passes that hold frames of several videos, so that decoding, networks and writing overlap.
"""

import logging
import os
import queue
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stages.cache.feature_cache import FeatureCache
from stages.cache.files.errors import CacheWriteError, DamagedCacheError
from stages.cache.source import VideoSource, look_at
from stages.cache.storage import refuse_unstorable
from stages.cache.stores.commit import CommitRecord, load_record
from stages.config import ExtractConfig
from stages.decode import Attempts, DecodeChild, DecodedVideo, DecodeError, FrameRequest
from stages.device import usable_cores
from stages.errors import UserError
from stages.extract.frozen_pair import ExtractionJob, FrozenPair
from stages.extract.packing import FramePacker
from stages.urls import is_url, without_secrets
from stages.wording import GIB

_LOG = logging.getLogger(__name__)

# Frames given to a worker ahead of its networks, in passes, and the most videos and frames that it may hold.
_PASSES_AHEAD = 3
MOST_VIDEOS = 64
_MOST_FRAMES = 4096

# Decoded pictures of one video that are held at once: a longer one is decoded and encoded part after part.
_PART_BYTES = 2**28


@dataclass(frozen=True)
class VideoTask:
    """One video's frames to extract.

    Attributes:
        video: id.
        path: local file, or a URL from which a copy is fetched.
        times_s: [T] float64 seconds, strictly increasing.
        named: the file as the manifest names it; None: as `path` does.
        fresh: replace what the cache holds of the video instead of adding to it, because it is damaged or of another
            file.
        again: an earlier worker may have committed these frames just before it died.
    """

    video: str
    path: str
    times_s: np.ndarray
    named: str | None = None
    fresh: bool = False
    again: bool = False


@dataclass(frozen=True)
class VideoOutcome:
    """What became of one task: exactly one of `checksum` (done), `reason` (failed) and `fatal` (stop the run) is set.

    Attributes:
        video: id.
        frames: frames committed.
        decode_s: seconds of fetching, decoding and resizing.
        write_s: seconds of the commit.
        networks_s: seconds in which the worker's networks computed, since its previous outcome.
        idle_s: seconds in which they had nothing to do, since its previous outcome.
        remark: what is known of damage of the file of a video that is done.
    """

    video: str
    frames: int = 0
    decode_s: float = 0.0
    write_s: float = 0.0
    networks_s: float = 0.0
    idle_s: float = 0.0
    checksum: str | None = None
    reason: str | None = None
    fatal: str | None = None
    remark: str | None = None


class ExtractionWorker:
    """Decode children, both frozen networks and the cache, on one device.

    Args:
        job: which networks, how to decode, where to write.
        cores: CPU cores that are this worker's own; None means all of the machine.
        part_bytes: decoded pictures of one video that are held at once.

    Raises:
        UserError: a checkpoint or the cache cannot be opened.
    """

    def __init__(self, job: ExtractionJob, *, cores: int | None = None, part_bytes: int = _PART_BYTES) -> None:
        self.job = job
        self.cache = FeatureCache.open(job.cache_root)
        self.networks = FrozenPair(job)
        self.packer = FramePacker(self.networks)
        self._encoded: dict[str, int] = {}
        self._part_frames = max(1, part_bytes // sum(3 * height * width for height, width in self.networks.sizes_px))
        self.children = [
            DecodeChild(memory_gb=job.extract.memory_gb, device=job.extract.decode_device)
            for _ in range(num_decode_children(job.extract, cores))
        ]
        self._idle_children: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        for child in self.children:
            child.start()
            self._idle_children.put(child)

    def process(self, task: VideoTask) -> VideoOutcome:
        """Extract one video; never raises for a fault of the video, of the disk or of the networks."""
        if task.again and (record := self._committed(task)) is not None:
            return VideoOutcome(task.video, len(task.times_s), checksum=record.checksum, remark=record.remark)
        spent = _Spent()
        self._encoded[task.video] = 0
        try:
            ending = self._extract(task, spent)
        finally:
            del self._encoded[task.video]
        networks_s, idle_s = self.packer.take_times()
        return replace(ending, decode_s=spent.decode_s, write_s=spent.write_s, networks_s=networks_s, idle_s=idle_s)

    def encoded(self) -> dict[str, int]:
        """Of each video in process, how many of its frames have been through the networks."""
        return self._encoded.copy()

    def close(self) -> None:
        """End the networks' thread and the decode children."""
        self.packer.close()
        for child in self.children:
            child.close()

    def kill_children(self) -> None:
        """End the running decode children from another thread; what they decode fails."""
        for pid in filter(None, (child.pid for child in self.children)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _extract(self, task: VideoTask, spent: "_Spent") -> VideoOutcome:
        """Fetch, decode, encode and commit: how the task ends."""
        try:
            with self._local_file(task, spent) as path:
                source = self._look_at(task, path)
                taken = self._encode_parts(task, path, spent)
                started = time.perf_counter()
                record = self._commit(task, taken, source, path)
                spent.write_s = time.perf_counter() - started
        except DecodeError as error:
            return VideoOutcome(task.video, reason=f"{error.kind}: {error.reason}")
        except CacheWriteError as error:
            return VideoOutcome(task.video, reason=f"features: {error}")
        except UserError as error:
            # Not the video's fault, for example a decoder that is not installed: every other video would fail too.
            return VideoOutcome(task.video, fatal=str(error))
        return VideoOutcome(task.video, frames=taken.frames, checksum=record.checksum, remark=record.remark)

    @contextmanager
    def _local_file(self, task: VideoTask, spent: "_Spent") -> Iterator[Path]:
        """The task's file, which for a URL is a copy that goes when the block ends."""
        if not is_url(task.path):
            yield Path(task.path)
            return
        extract = self.job.extract
        with ExitStack() as stack:
            with self.packer.announce(), self._borrowed_child() as child, spent.decoding():
                path = stack.enter_context(
                    child.local_copy(
                        task.path,
                        folder=extract.scratch,
                        limit_bytes=int(extract.download_gb * GIB),
                        deadline_s=extract.deadline_s,
                    )
                )
            try:
                yield path
            except DecodeError as error:
                raise DecodeError(error.kind, _shown(error.reason, task, path)) from error

    def _look_at(self, task: VideoTask, path: Path) -> VideoSource:
        copy = path if is_url(task.path) else None
        return look_at(task.path, named=task.named, digest=self.job.extract.digest_videos, copy=copy)

    def _commit(self, task: VideoTask, taken: "_Taken", source: VideoSource, path: Path) -> CommitRecord:
        """Write what was taken; where that is nothing, only what is known of the file of the frames that are cached."""
        remark, damage = taken.remark, taken.damage
        if damage is not None:
            remark = remark or damage.reason
            source = source.model_copy(update={"whole_before_s": damage.whole_before_s})
        if remark is not None:
            source = source.model_copy(update={"remark": _shown(remark, task, path)})
        if taken.features is not None and taken.targets is not None:
            return self.cache.write_video(
                task.video,
                times_s=task.times_s[: taken.frames],
                features=taken.features,
                targets=taken.targets,
                merge=not task.fresh,
                source=source,
            )
        assert damage is not None
        record = None if task.fresh else self.cache.add_source(task.video, source)
        if record is None:
            raise damage
        return record

    def _encode_parts(self, task: VideoTask, path: Path, spent: "_Spent") -> "_Taken":
        """Encode the task's frames, pictures held of one part at a time; of a damaged file those before its damage."""
        extract, total = self.job.extract, len(task.times_s)
        request = FrameRequest(
            path=path,
            times_s=task.times_s,
            sizes_px=self.networks.sizes_px,
            decoder=extract.decoder,
            tolerance_s=extract.tolerance_s,
            device=extract.decode_device,
            damaged=extract.damaged,
            clock_fps=self.job.clock_fps,
        )
        attempts = Attempts(request, extract.deadline_s)

        def count(frames: int) -> None:
            self._encoded[task.video] += frames

        taken = _Taken()
        gathered: _Gathered | None = None
        while taken.frames < total and taken.damage is None:
            times_s = task.times_s[taken.frames : taken.frames + self._part_frames]
            decoded, taken.damage = self._decode(attempts, times_s, spent)
            if decoded is None:
                break
            encoder_view, teacher_view = decoded.views
            features, targets = self.packer.encode(encoder_view, teacher_view, count)
            taken.remark = decoded.remark or taken.remark
            if len(times_s) == total:
                taken.features, taken.targets, taken.frames = features, targets, len(features)
                break
            gathered = gathered or _Gathered(extract, task.video, total, features, targets)
            gathered.add(taken.frames, times_s[: len(features)], features, targets)
            taken.frames += len(features)
            taken.features, taken.targets = gathered.features[: taken.frames], gathered.targets[: taken.frames]
        return taken

    def _decode(
        self, attempts: Attempts, times_s: np.ndarray, spent: "_Spent"
    ) -> tuple[DecodedVideo | None, DecodeError | None]:
        """Decode frames; where the file is damaged, those before the damage, None if there are none, and the damage."""
        with self.packer.announce(), self._borrowed_child() as child, spent.decoding():
            try:
                return attempts.decode(child, times_s), None
            except DecodeError as damage:
                if damage.whole_before_s is None or self.job.extract.damaged == "refuse":
                    raise
                whole_s = times_s[times_s < damage.whole_before_s]
                return (attempts.decode(child, whole_s) if whole_s.size else None), damage

    def _committed(self, task: VideoTask) -> CommitRecord | None:
        """The commit that already holds all of the task's frames; a damaged one is no such commit."""
        try:
            record = None if task.fresh else load_record(self.cache.store, task.video)
        except DamagedCacheError:
            return None
        if record is None or record.fingerprint != self.cache.fingerprint.digest:
            return None
        return None if record.missing(task.times_s).size else record

    @contextmanager
    def _borrowed_child(self) -> Iterator[DecodeChild]:
        child = self._idle_children.get()
        try:
            yield child
        finally:
            self._idle_children.put(child)


def has_room(held: Sequence[int], frames_per_pass: int, children: int) -> bool:
    """Whether a worker with so many decode children can use another video beside those that it holds.

    Args:
        held: frames of each video that it has been given.
        frames_per_pass: of its networks.
        children: how many there are.
    """
    videos, frames = len(held), sum(held)
    if videos >= MOST_VIDEOS or (videos and frames >= _MOST_FRAMES):
        return False
    # One more than the decode children, so that a child never waits for the next; and enough short videos.
    return videos <= children or frames < _PASSES_AHEAD * frames_per_pass


def internal_error(video: str, error: BaseException) -> VideoOutcome:
    """The outcome of a video on which the worker raised, a defect of ours; the trace is logged, the others go on."""
    _LOG.error("worker raised on video %s", video, exc_info=error)
    return VideoOutcome(video, reason=f"internal error: {error!r}")


def num_decode_children(config: ExtractConfig, cores: int | None = None) -> int:
    """Decode children of one worker: as set, else one for each of its CPU cores (None: all that it may use)."""
    return config.decode_workers or cores or usable_cores()


def _shown(text: str, task: VideoTask, path: Path) -> str:
    """The text with a video's address in the place of the path of its copy."""
    return text.replace(str(path), without_secrets(task.path)) if is_url(task.path) else text


class _Spent:
    """Seconds that one video's fetching and decoding took, and its commit."""

    def __init__(self) -> None:
        self.decode_s = self.write_s = 0.0

    @contextmanager
    def decoding(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.decode_s += time.perf_counter() - started


@dataclass
class _Taken:
    """What came of a video: the first `frames` of those asked for, all of them unless there is `damage`.

    `features` [frames, P, C] and `targets` [frames, D] are None for no frames; `remark` is the decoder's.
    """

    frames: int = 0
    features: np.ndarray | None = None
    targets: np.ndarray | None = None
    remark: str | None = None
    damage: DecodeError | None = None


class _Gathered:
    """Features and targets of a video that is encoded part after part; as float16 where that is what is stored.

    Raises `CacheWriteError` where they would take more memory than one video may.
    """

    def __init__(
        self, extract: ExtractConfig, video: str, frames: int, features: np.ndarray, targets: np.ndarray
    ) -> None:
        dtype = np.dtype(np.float16 if extract.storage == "float16" else np.float32)
        needed = frames * (dtype.itemsize * int(np.prod(features.shape[1:])) + targets[0].nbytes)
        if needed > extract.video_gb * GIB:
            raise CacheWriteError(
                f"video {video!r}: its {frames} frames ask for {needed / GIB:.3g} GiB of memory; extract.video_gb "
                f"allows {extract.video_gb:g}"
            )
        self._video = video
        self.features = np.empty((frames, *features.shape[1:]), dtype)
        self.targets = np.empty((frames, *targets.shape[1:]), targets.dtype)

    def add(self, start: int, times_s: np.ndarray, features: np.ndarray, targets: np.ndarray) -> None:
        """Keep the frames from row `start` on; CacheWriteError for numbers beyond the kept type."""
        rows = slice(start, start + len(times_s))
        largest = float(np.finfo(self.features.dtype).max)
        refuse_unstorable(features, largest=largest, name="features", video=self._video, times_s=times_s)
        self.features[rows], self.targets[rows] = features, targets
