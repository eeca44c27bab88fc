"""How fast this machine decodes, encodes and writes: a few seconds of the real thing, for `pipeline plan`.

The stages are measured one after the other, each as extraction runs it: decoding with all decode children at once, then
both networks on frames that came out of it, then commits of what came out of these, into a cache that is thrown away.
"""

import hashlib
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from model.config import ModelConfig
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.cache.storage import STORAGE_FIELD
from stages.config import ExtractConfig
from stages.decode.child import DecodeChild
from stages.decode.frames import DecodeError, FrameRequest
from stages.device import pick_device
from stages.errors import UserError
from stages.extract.frozen_pair import ExtractionJob, FrozenPair
from stages.extract.packing import FramePacker
from stages.extract.worker import VideoTask, num_decode_children
from stages.wording import counted

# Of the time given: for decoding, then for decoding and networks together; writing gets the rest.
_DECODE_SHARE, _NETWORKS_SHARE = 0.45, 0.9
# Frames kept for the networks, and frames of the video that is written: enough for a full batch and many chunks.
_KEPT_FRAMES = 256
_WRITTEN_FRAMES = 100
_WRITERS = 4
# A video that takes longer than this is not measured, and after so many bad ones it is given up.
_DEADLINE_S = 60.0
_MOST_FAILURES = 20
_GIB = 2**30

# Told of the seconds measured so far and of what is going on.
OnStep = Callable[[float, str], None]


@dataclass(frozen=True)
class Rate:
    """Seconds that one frame takes, and how many frames this rests on."""

    seconds_per_frame: float
    frames: int


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of each stage on this machine with all its devices and decode children, and of all of them together."""

    decode: float
    networks: float
    write: float
    total: float


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        device: its name.
        devices: how many of them the machine has; the CPU counts as one.
        is_gpu: whether the networks run on GPUs.
        decode_children: decode children that an extraction on this machine runs at once.
        decode: one child's seconds for a frame while all of them decode.
        networks: one device's seconds for a frame through both networks.
        batch_frames: frames that went through the networks at once.
        write: seconds for a frame while several videos are committed at once.
        videos: videos that were decoded.
        failed: reason by id of those that could not be.
    """

    device: str
    devices: int
    is_gpu: bool
    decode_children: int
    decode: Rate
    networks: Rate
    batch_frames: int
    write: Rate
    videos: int
    failed: dict[str, str]

    def seconds(self, frames: int) -> StageSeconds:
        """Extrapolate to so many frames.

        The stages run beside each other and the slowest decides, but without a GPU decoding and networks share the
        cores and add up.
        """
        decode = frames * self.decode.seconds_per_frame / self.decode_children
        networks = frames * self.networks.seconds_per_frame / self.devices
        write = frames * self.write.seconds_per_frame
        computed = max(decode, networks) if self.is_gpu else decode + networks
        return StageSeconds(decode, networks, write, total=max(computed, write))


def spread(tasks: Sequence[VideoTask]) -> list[VideoTask]:
    """The same videos in an order without a pattern that is the same every time."""
    return sorted(tasks, key=lambda task: hashlib.sha256(task.video.encode()).digest())


def calibrate(
    config: ModelConfig,
    extract: ExtractConfig,
    tasks: Sequence[VideoTask],
    *,
    seconds: float,
    beside: Path,
    on_step: OnStep,
) -> Calibration:
    """Measure the three stages on the first of `spread(tasks)`.

    Args:
        config: which networks.
        extract: how to decode and encode; the precision must be settled.
        tasks: planned videos that exist; at least one.
        seconds: time to spend; loading the networks is not counted, and what has begun is finished.
        beside: folder of the disk to measure; a temporary cache is made in it and removed.
        on_step: told of the progress.

    Raises:
        UserError: a network or the disk cannot be used, or no video could be decoded.
    """
    device = pick_device()
    is_gpu = device.type == "cuda"
    devices = min(torch.cuda.device_count(), extract.model_actors or torch.cuda.device_count()) if is_gpu else 1
    children = extract.decode_workers * devices if extract.decode_workers else num_decode_children(extract)
    job = ExtractionJob(config.encoder, config.teacher, extract, "")
    with ExitStack() as stack:
        memory_bytes = int(extract.memory_gb * _GIB)
        fleet = [
            stack.enter_context(DecodeChild(memory_bytes=memory_bytes, device=extract.decode_device))
            for _ in range(min(children, len(tasks)))
        ]
        for child in fleet:
            child.start()
        cache = stack.enter_context(_temporary_cache(beside, extract))
        on_step(0.0, "loading the networks")
        pair = FrozenPair(job)
        packer = FramePacker(pair)
        stack.callback(packer.close)
        decoding = _Decoding(extract, pair.sizes_px, spread(tasks))
        decoding.warm_up(fleet)
        clock = _Clock(seconds, on_step)
        decoding.run(fleet, clock)
        decode, views = decoding.rate(), decoding.views()
        networks, features, targets = _time_networks(pair, packer, views, clock)
        length = statistics.median_low(len(task.times_s) for task in tasks)
        write = _time_writing(cache, features, targets, min(length, _WRITTEN_FRAMES), clock)
    return Calibration(
        device=torch.cuda.get_device_name(device) if is_gpu else "CPU",
        devices=devices,
        is_gpu=is_gpu,
        decode_children=children,
        decode=decode,
        networks=networks,
        batch_frames=pair.batch_frames,
        write=write,
        videos=decoding.videos,
        failed=decoding.failed,
    )


class _Clock:
    """Seconds measured since it was made, against the seconds given."""

    def __init__(self, seconds: float, on_step: OnStep) -> None:
        self._started, self._seconds, self._on_step = time.monotonic(), seconds, on_step

    def left(self, share: float) -> float:
        """Seconds left of the first `share` of the time."""
        return self._started + share * self._seconds - time.monotonic()

    def tell(self, note: str) -> None:
        """Report the progress."""
        self._on_step(min(time.monotonic() - self._started, self._seconds), note)


@contextmanager
def _temporary_cache(beside: Path, extract: ExtractConfig) -> Iterator[FeatureCache]:
    try:
        folder = tempfile.TemporaryDirectory(prefix=".plan-", dir=beside)
    except OSError as error:
        raise UserError(f"nothing can be written here ({error.strerror})", where=beside) from error
    with folder as name:
        fields = {STORAGE_FIELD: extract.storage, "purpose": "calibration"}
        yield FeatureCache.create_or_open(Path(name) / "cache", Fingerprint(fields=fields))


class _Decoding:
    """Decodes whole planned videos with several children at once, until its share of the time is over."""

    def __init__(
        self, extract: ExtractConfig, sizes_px: tuple[tuple[int, int], ...], tasks: Sequence[VideoTask]
    ) -> None:
        self.failed: dict[str, str] = {}
        self.frames = self.videos = 0
        self._extract, self._sizes_px, self._tasks = extract, sizes_px, tasks
        self._deadline_s = min(extract.deadline_s, _DEADLINE_S)
        self._waiting = iter(tasks)
        self._busy_s = 0.0
        self._kept: list[tuple[np.ndarray, ...]] = []
        self._lock = threading.Lock()

    def warm_up(self, fleet: Sequence[DecodeChild]) -> None:
        """Wait until all children have started, by one frame each."""
        first = replace(self._tasks[0], times_s=self._tasks[0].times_s[:1])

        def one(child: DecodeChild) -> None:
            try:
                child.decode(self._request(first), self._deadline_s)
            except DecodeError:
                return  # a bad video is counted when its turn comes

        self._at_once(one, fleet)

    def run(self, fleet: Sequence[DecodeChild], clock: _Clock) -> None:
        """Decode with every child, each video once; at least one, unless too many fail."""

        def many(child: DecodeChild) -> None:
            while (task := self._next()) is not None:
                self._decode(child, task)
                clock.tell(f"{counted(self.frames, 'frame')} decoded")
                if clock.left(_DECODE_SHARE) <= 0 and (self.frames or len(self.failed) >= _MOST_FAILURES):
                    break

        self._at_once(many, fleet)

    def rate(self) -> Rate:
        """Of one child; UserError where nothing could be decoded."""
        if not self.frames:
            raise UserError(f"no video could be decoded; the first: {next(iter(self.failed.values()))}")
        return Rate(self._busy_s / self.frames, self.frames)

    def views(self) -> tuple[np.ndarray, ...]:
        """The frames that were kept, per view [T, S, S, 3] uint8."""
        return tuple(np.concatenate(views)[:_KEPT_FRAMES] for views in zip(*self._kept, strict=True))

    def _at_once(self, work: Callable[[DecodeChild], None], fleet: Sequence[DecodeChild]) -> None:
        with ThreadPoolExecutor(len(fleet)) as pool:
            try:
                list(pool.map(work, fleet))
            except KeyboardInterrupt:
                # Nobody waits for what they decode, and the threads end with them.
                self._waiting = iter(())
                for pid in filter(None, (child.pid for child in fleet)):
                    os.kill(pid, signal.SIGKILL)
                raise

    def _next(self) -> VideoTask | None:
        with self._lock:
            return next(self._waiting, None)

    def _decode(self, child: DecodeChild, task: VideoTask) -> None:
        started = time.perf_counter()
        try:
            decoded = child.decode(self._request(task), self._deadline_s)
        except DecodeError as error:
            with self._lock:
                self.failed[task.video] = f"{error.kind}: {error.reason}"
            return
        with self._lock:
            self._busy_s += time.perf_counter() - started
            self.frames, self.videos = self.frames + len(task.times_s), self.videos + 1
            if sum(len(views[0]) for views in self._kept) < _KEPT_FRAMES:
                self._kept.append(decoded.views)

    def _request(self, task: VideoTask) -> FrameRequest:
        return FrameRequest(
            path=Path(task.path),
            times_s=task.times_s,
            sizes_px=self._sizes_px,
            decoder=self._extract.decoder,
            tolerance_s=self._extract.tolerance_s,
            device=self._extract.decode_device,
            damaged=self._extract.damaged,
        )


def _time_networks(
    pair: FrozenPair, packer: FramePacker, views: tuple[np.ndarray, ...], clock: _Clock
) -> tuple[Rate, np.ndarray, np.ndarray]:
    """Time passes of both networks, of one frame at first and of twice as many as long as that fits into the time.

    They run on the packer's thread, as in an extraction.

    A full pass of large networks on a CPU may take longer than there is; where there is time it is repeated until the
    share is over. The rate is that of the largest passes, without the first of several: it pays for what happens once.

    Returns:
        the rate, and the last features [T, P, C] and targets [T, D].
    """
    encoder_view, teacher_view = views
    full = pair.batch_frames
    passes: list[float] = []
    pair.batch_frames = 1
    while True:
        frames = np.arange(pair.batch_frames) % len(encoder_view)
        started = time.perf_counter()
        features, targets = packer.encode(encoder_view[frames], teacher_view[frames])
        passes.append(time.perf_counter() - started)
        clock.tell(f"networks: {counted(pair.batch_frames, 'frame')} a pass")
        if pair.batch_frames < len(frames):
            full = pair.batch_frames  # more do not fit into the memory
        left = clock.left(_NETWORKS_SHARE)
        if left <= 0:
            break
        if pair.batch_frames < full and 2 * passes[-1] < left:
            pair.batch_frames, passes = min(2 * pair.batch_frames, full), []
    timed = passes[1:] or passes
    return Rate(statistics.mean(timed) / len(frames), len(frames) * len(timed)), features, targets


def _time_writing(cache: FeatureCache, features: np.ndarray, targets: np.ndarray, frames: int, clock: _Clock) -> Rate:
    """Time the commits of videos of so many frames, made of the encoded ones, until the time is over.

    Several threads commit at once, as in an extraction: most of a commit is waiting for the disk.
    """
    features = np.resize(features, (frames, *features.shape[1:]))
    targets = np.resize(targets, (frames, *targets.shape[1:]))
    times_s = np.arange(float(frames))
    # The first write pays for an import.
    cache.write_video("warm-up", times_s=times_s[:1], features=features[:1], targets=targets[:1])

    def commit(writer: int) -> int:
        commits = 0
        while not commits or clock.left(1.0) > 0:
            cache.write_video(f"writer-{writer}", times_s=times_s, features=features, targets=targets)
            commits += 1
            clock.tell("writing")
        return commits

    started = time.perf_counter()
    with ThreadPoolExecutor(_WRITERS) as pool:
        written = frames * sum(pool.map(commit, range(_WRITERS)))
    return Rate((time.perf_counter() - started) / written, written)
