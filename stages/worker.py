"""Stage 1's worker: one video in, its features and targets committed to the cache, a small row out (DESIGN.md 4.3).

Knows nothing of Ray. Several threads may call `process` at once: each borrows a decode child, and one thread serves the
frozen networks with passes that hold frames of several videos, so that decoding, networks and writing overlap.
"""

import os
import queue
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from stages.cache.commit import load_record
from stages.cache.errors import CacheWriteError, DamagedCacheError
from stages.cache.feature_cache import FeatureCache
from stages.cache.ledger import covers
from stages.cache.storage import refuse_unstorable
from stages.config import ExtractConfig
from stages.decode import Attempts, DecodeChild, DecodeError, FrameRequest, local_copy
from stages.decode.fetch import without_secrets
from stages.errors import UserError
from stages.packing import ExtractionJob, FramePacker, FrozenPair
from stages.video_paths import is_url

_GIB = 2**30

# Decoded pictures of one video that are held at once: a longer one is decoded and encoded part after part.
_PART_BYTES = 2**28


@dataclass(frozen=True)
class VideoTask:
    """One video's frames to extract.

    Attributes:
        video: id.
        path: local file, or a URL from which a copy is fetched.
        times_s: [T] float64 seconds, strictly increasing.
        fresh: replace what the cache holds of the video, because it is damaged, instead of adding to it.
        again: an earlier worker may have committed these frames just before it died.
    """

    video: str
    path: str
    times_s: np.ndarray
    fresh: bool = False
    again: bool = False


@dataclass(frozen=True)
class VideoOutcome:
    """What became of one task: exactly one of `checksum` (done), `reason` (failed) and `fatal` (stop the run) is set.

    Attributes:
        video: id.
        frames: frames committed.
        decode_s: seconds of fetching, decoding and resizing.
        networks_s: seconds in which the worker's networks computed, since its previous outcome.
        idle_s: seconds in which they had nothing to do, since its previous outcome.
    """

    video: str
    frames: int = 0
    decode_s: float = 0.0
    networks_s: float = 0.0
    idle_s: float = 0.0
    checksum: str | None = None
    reason: str | None = None
    fatal: str | None = None


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
        self._part_frames = max(1, part_bytes // sum(3 * height * width for height, width in self.networks.sizes_px))
        self._children: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        memory_bytes = int(job.extract.memory_gb * _GIB)
        for _ in range(num_decode_children(job.extract, cores)):
            child = DecodeChild(memory_bytes=memory_bytes, device=job.extract.decode_device)
            child.start()
            self._children.put(child)

    def process(self, task: VideoTask) -> VideoOutcome:
        """Extract one video; never raises for a fault of the video, of the disk or of the networks."""
        if task.again and (checksum := self._committed(task)) is not None:
            return VideoOutcome(task.video, len(task.times_s), checksum=checksum)
        spent = _Spent()
        ending = self._extract(task, spent)
        networks_s, idle_s = self.packer.take_times()
        return replace(ending, decode_s=spent.decode_s, networks_s=networks_s, idle_s=idle_s)

    def encode(self, encoder_view: np.ndarray, teacher_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `FrozenPair.encode`; on the caller's thread, so not while videos are in process."""
        return self.networks.encode(encoder_view, teacher_view)

    def close(self) -> None:
        """End the networks' thread and the decode children."""
        self.packer.close()
        while not self._children.empty():
            self._children.get().close()

    def _extract(self, task: VideoTask, spent: "_Spent") -> VideoOutcome:
        """Fetch, decode, encode and commit: how the task ends."""
        try:
            with self._local_file(task, spent) as path:
                features, targets = self._encode_parts(task, path, spent)
            record = self.cache.write_video(
                task.video, times_s=task.times_s, features=features, targets=targets, merge=not task.fresh
            )
        except DecodeError as error:
            return VideoOutcome(task.video, reason=f"{error.kind}: {error.reason}")
        except CacheWriteError as error:
            return VideoOutcome(task.video, reason=f"features: {error}")
        except UserError as error:
            # Not the video's fault, for example a decoder that is not installed: every other video would fail too.
            return VideoOutcome(task.video, fatal=str(error))
        return VideoOutcome(task.video, frames=len(task.times_s), checksum=record.checksum)

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
                    local_copy(
                        child,
                        task.path,
                        folder=extract.scratch,
                        limit_bytes=int(extract.download_gb * _GIB),
                        deadline_s=extract.deadline_s,
                    )
                )
            try:
                yield path
            except DecodeError as error:
                raise DecodeError(error.kind, error.reason.replace(str(path), without_secrets(task.path))) from error

    def _encode_parts(self, task: VideoTask, path: Path, spent: "_Spent") -> tuple[np.ndarray, np.ndarray]:
        """Features [T, P, C] and targets [T, D] of the task's frames; pictures are held of one part at a time."""
        extract, total = self.job.extract, len(task.times_s)
        request = FrameRequest(
            path=path,
            times_s=task.times_s,
            sizes_px=self.networks.sizes_px,
            decoder=extract.decoder,
            tolerance_s=extract.tolerance_s,
            device=extract.decode_device,
            clock_fps=self.job.clock_fps,
        )
        attempts = Attempts(request, extract.deadline_s)
        gathered: _Gathered | None = None
        for start in range(0, total, self._part_frames):
            times_s = task.times_s[start : start + self._part_frames]
            with self.packer.announce(), self._borrowed_child() as child, spent.decoding():
                decoded = attempts.decode(child, times_s)
            features, targets = self.packer.encode(*decoded.views)
            if len(times_s) == total:
                return features, targets
            gathered = gathered or _Gathered(self.job.extract, task.video, total, features, targets)
            gathered.add(start, times_s, features, targets)
        assert gathered is not None
        return gathered.features, gathered.targets

    def _committed(self, task: VideoTask) -> str | None:
        """Checksum of the commit that already holds all of the task's frames; a damaged one is no such commit."""
        try:
            record = None if task.fresh else load_record(self.cache.store, task.video)
        except DamagedCacheError:
            return None
        if record is None or record.fingerprint != self.cache.fingerprint.digest:
            return None
        return record.checksum if covers(record.times_array, task.times_s) else None

    @contextmanager
    def _borrowed_child(self) -> Iterator[DecodeChild]:
        child = self._children.get()
        try:
            yield child
        finally:
            self._children.put(child)


def num_decode_children(config: ExtractConfig, cores: int | None = None) -> int:
    """Decode children of one worker: as set, else one for each of its CPU cores (None: all of this machine)."""
    return config.decode_workers or cores or os.cpu_count() or 1


class _Spent:
    """Seconds that one video's fetching and decoding took."""

    def __init__(self) -> None:
        self.decode_s = 0.0

    @contextmanager
    def decoding(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.decode_s += time.perf_counter() - started


class _Gathered:
    """Features and targets of a video that is encoded part after part; as float16 where that is what is stored.

    Raises `CacheWriteError` where they would take more memory than one video may.
    """

    def __init__(
        self, extract: ExtractConfig, video: str, frames: int, features: np.ndarray, targets: np.ndarray
    ) -> None:
        dtype = np.dtype(np.float16 if extract.storage == "float16" else np.float32)
        needed = frames * (dtype.itemsize * int(np.prod(features.shape[1:])) + targets[0].nbytes)
        if needed > extract.video_gb * _GIB:
            raise CacheWriteError(
                f"video {video!r}: its {frames} frames ask for {needed / _GIB:.3g} GiB of memory; extract.video_gb "
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
