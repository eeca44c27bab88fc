"""Stage 1's worker: one video in, its features and targets committed to the cache, a small row out (DESIGN.md 4.3).

Knows nothing of Ray. Several threads may call `process` at once: each borrows a decode child, and one thread serves the
frozen networks with passes that hold frames of several videos, so that decoding, networks and writing overlap.
"""

import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stages.cache.commit import load_record
from stages.cache.errors import CacheWriteError, DamagedCacheError
from stages.cache.feature_cache import FeatureCache
from stages.cache.ledger import covers
from stages.config import ExtractConfig
from stages.decode import DecodeChild, DecodedVideo, DecodeError, FrameRequest, decode_or_retry
from stages.errors import UserError
from stages.packing import ExtractionJob, FramePacker, FrozenPair

_GIB = 2**30


@dataclass(frozen=True)
class VideoTask:
    """One video's frames to extract.

    Attributes:
        video: id.
        path: local file.
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
        decode_s: seconds of decoding and resizing.
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

    Raises:
        UserError: a checkpoint or the cache cannot be opened.
    """

    def __init__(self, job: ExtractionJob, *, cores: int | None = None) -> None:
        self.job = job
        self.cache = FeatureCache.open(Path(job.cache_root))
        self.networks = FrozenPair(job)
        self.packer = FramePacker(self.networks)
        self._children: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        memory_bytes = int(job.extract.memory_gb * _GIB)
        for _ in range(num_decode_children(job.extract, cores)):
            child = DecodeChild(memory_bytes=memory_bytes)
            child.start()
            self._children.put(child)

    def process(self, task: VideoTask) -> VideoOutcome:
        """Extract one video; never raises for a fault of the video, of the disk or of the networks."""
        if task.again and (checksum := self._committed(task)) is not None:
            return VideoOutcome(task.video, len(task.times_s), checksum=checksum)
        started = time.perf_counter()
        with self.packer.announce():
            decoded = self._decode(task)
        decode_s = time.perf_counter() - started
        ending = self._finish(task, decoded) if isinstance(decoded, DecodedVideo) else decoded
        networks_s, idle_s = self.packer.take_times()
        return VideoOutcome(task.video, decode_s=decode_s, networks_s=networks_s, idle_s=idle_s, **ending)

    def encode(self, encoder_view: np.ndarray, teacher_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `FrozenPair.encode`; on the caller's thread, so not while videos are in process."""
        return self.networks.encode(encoder_view, teacher_view)

    def close(self) -> None:
        """End the networks' thread and the decode children."""
        self.packer.close()
        while not self._children.empty():
            self._children.get().close()

    def _decode(self, task: VideoTask) -> "DecodedVideo | dict[str, str]":
        """The frames, or how the task ends without them."""
        extract = self.job.extract
        request = FrameRequest(
            path=Path(task.path),
            times_s=task.times_s,
            sizes_px=self.networks.sizes_px,
            decoder=extract.decoder,
            tolerance_s=extract.tolerance_s,
        )
        try:
            with self._borrowed_child() as child:
                return decode_or_retry(child, request, extract.deadline_s)
        except DecodeError as error:
            return {"reason": f"{error.kind}: {error.reason}"}
        except UserError as error:
            # Not the video's fault, for example a decoder that is not installed: every other video would fail too.
            return {"fatal": str(error)}

    def _finish(self, task: VideoTask, decoded: DecodedVideo) -> "dict[str, str | int]":
        """Networks and cache: how the task ends."""
        try:
            features, targets = self.packer.encode(*decoded.views)
            record = self.cache.write_video(
                task.video, times_s=task.times_s, features=features, targets=targets, merge=not task.fresh
            )
        except CacheWriteError as error:
            return {"reason": f"features: {error}"}
        except UserError as error:
            return {"fatal": str(error)}
        return {"checksum": record.checksum, "frames": len(task.times_s)}

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
