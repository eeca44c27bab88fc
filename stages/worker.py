"""Stage 1's worker: one video in, its features and targets committed to the cache, a small row out (DESIGN.md 4.3).

Knows nothing of Ray. Several threads may call `process` at once: each borrows a decode child, the frozen networks
serve one video at a time, so that decoding overlaps with them.
"""

import os
import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.config import EncoderConfig, TeacherConfig
from stages.cache.errors import CacheWriteError
from stages.cache.feature_cache import FeatureCache
from stages.config import ExtractConfig
from stages.decode.child import DecodeChild
from stages.decode.frames import DecodedVideo, DecodeError, FrameRequest
from stages.device import pick_device, pick_dtype
from stages.errors import UserError
from stages.frozen_networks import load_encoder, load_teacher

_GIB = 2**30


@dataclass(frozen=True)
class ExtractionJob:
    """What every worker of one extraction is told."""

    encoder: EncoderConfig
    teacher: TeacherConfig
    extract: ExtractConfig
    cache_root: str


@dataclass(frozen=True)
class VideoTask:
    """One video's frames to extract.

    Attributes:
        video: id.
        path: local file.
        times_s: [T] float64 seconds, strictly increasing.
        fresh: replace what the cache holds of the video, because it is damaged, instead of adding to it.
    """

    video: str
    path: str
    times_s: np.ndarray
    fresh: bool = False


@dataclass(frozen=True)
class VideoOutcome:
    """What became of one task: exactly one of `checksum` (done), `reason` (failed) and `fatal` (stop the run) is set.

    Attributes:
        video: id.
        frames: frames committed.
        decode_s: seconds of decoding and resizing.
        networks_s: seconds of both frozen networks.
    """

    video: str
    frames: int = 0
    decode_s: float = 0.0
    networks_s: float = 0.0
    checksum: str | None = None
    reason: str | None = None
    fatal: str | None = None


class ExtractionWorker:
    """Decode children, both frozen networks and the cache, on one device.

    Args:
        job: which networks, how to decode, where to write.

    Raises:
        UserError: a checkpoint or the cache cannot be opened.
    """

    def __init__(self, job: ExtractionJob) -> None:
        self.job = job
        self.device = pick_device()
        self.dtype = pick_dtype(job.extract.precision, self.device)
        self.cache = FeatureCache.open(Path(job.cache_root))
        self.encoder = load_encoder(job.encoder).to(self.device, self.dtype)
        self.teacher = load_teacher(job.teacher).to(self.device)
        self.teacher.lower_precision(self.dtype)
        self._networks_free = threading.Lock()
        self._children: queue.SimpleQueue[DecodeChild] = queue.SimpleQueue()
        memory_bytes = int(job.extract.memory_gb * _GIB)
        for _ in range(num_decode_children(job.extract)):
            child = DecodeChild(memory_bytes=memory_bytes)
            child.start()
            self._children.put(child)

    def process(self, task: VideoTask) -> VideoOutcome:
        """Extract one video; never raises for a fault of the video or of the disk."""
        started = time.perf_counter()
        try:
            decoded = self._decode(task)
        except DecodeError as error:
            return VideoOutcome(
                task.video, decode_s=time.perf_counter() - started, reason=f"{error.kind}: {error.reason}"
            )
        except UserError as error:
            # Not the video's fault, for example a decoder that is not installed: every other video would fail too.
            return VideoOutcome(task.video, fatal=str(error))
        decode_s = time.perf_counter() - started
        with self._networks_free:
            started = time.perf_counter()
            features, targets = self.encode(*decoded.views)
            networks_s = time.perf_counter() - started
        try:
            record = self.cache.write_video(
                task.video, times_s=task.times_s, features=features, targets=targets, merge=not task.fresh
            )
        except CacheWriteError as error:
            return VideoOutcome(task.video, decode_s=decode_s, networks_s=networks_s, reason=f"features: {error}")
        except UserError as error:
            return VideoOutcome(task.video, decode_s=decode_s, networks_s=networks_s, fatal=str(error))
        return VideoOutcome(task.video, len(task.times_s), decode_s, networks_s, checksum=record.checksum)

    def encode(self, encoder_view: np.ndarray, teacher_view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both networks on the same frames, each in its own size.

        Views [T, S, S, 3] uint8 -> features [T, P, C] float32 and y* [T, D] float32.
        """
        size = self.job.extract.batch_size
        features, targets = [], []
        for start in range(0, len(encoder_view), size):
            features.append(self.encoder(self._to_device(encoder_view[start : start + size])).float().cpu())
            targets.append(self.teacher(self._to_device(teacher_view[start : start + size])).cpu())
        return torch.cat(features).numpy(), torch.cat(targets).numpy()

    def close(self) -> None:
        """End the decode children."""
        while not self._children.empty():
            self._children.get().close()

    def _decode(self, task: VideoTask) -> DecodedVideo:
        extract = self.job.extract
        request = FrameRequest(
            path=Path(task.path),
            times_s=task.times_s,
            sizes_px=tuple((size, size) for size in (self.encoder.size_px, self.teacher.size_px)),
            decoder=extract.decoder,
            tolerance_s=extract.tolerance_s,
        )
        with self._borrowed_child() as child:
            return child.decode(request, extract.deadline_s)

    @contextmanager
    def _borrowed_child(self) -> Iterator[DecodeChild]:
        child = self._children.get()
        try:
            yield child
        finally:
            self._children.put(child)

    def _to_device(self, frames: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(frames).to(self.device, non_blocking=True)


def num_decode_children(config: ExtractConfig) -> int:
    """Decode children of one worker: as set, else one per CPU core."""
    return config.decode_workers or os.cpu_count() or 1
