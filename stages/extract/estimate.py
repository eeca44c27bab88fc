"""What an extraction will ask for, before anything runs: its bytes, its multiply-adds, what is cached already.

Nothing is computed, decoded or written here; how long it takes is measured by `stages.extract.calibration`.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from stages.cache.feature_cache import FeatureCache
from stages.cache.files.places import Place
from stages.cache.fingerprint import Scalar
from stages.cache.ledger import LedgerStatus
from stages.cache.source import find_changes
from stages.cache.storage import STORAGE_TYPES, StorageType
from stages.cache.stores.commit import FILE_NAME
from stages.cache.stores.stores import store_at
from stages.cache.stores.zarr_store import CHUNK_FRAMES
from stages.data.frame_plan import FramePlan
from stages.data.manifest import Manifest
from stages.files import nearest_existing
from stages.frozen.load import load_encoder, load_teacher
from stages.frozen.shapes import FrameShape
from stages.urls import is_url


def count_windows(manifest: Manifest) -> int:
    """Distinct windows of a split's videos: samples of several tasks may ask about the same frames."""
    return len(
        {
            (one.split, one.video, one.start_s, one.end_s, one.num_frames, one.index_fps, one.times_s)
            for one in manifest.samples
        }
    )


def frame_multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of one frame through visual encoder and teacher, of which only the shapes are looked at.

    Args:
        config: of checkpoints that are here, or stand-ins (`stages.frozen.stand_ins`), which are opened sooner.

    Raises:
        UserError: a checkpoint cannot be opened.
    """
    with torch.device("meta"):
        networks = load_encoder(config.encoder), load_teacher(config.teacher)
        with FlopCounterMode(display=False) as counter:
            for network in networks:
                network(torch.zeros(1, network.size_px, network.size_px, 3, dtype=torch.uint8))
    return counter.get_total_flops() // 2


# --- bytes


@dataclass(frozen=True)
class _StoredArray:
    """One array of a video; `rows` is None where there is one for each frame."""

    row_bytes: int
    rows: int | None
    in_chunks: bool

    def num_bytes(self, frames: int, *, padded: bool) -> int:
        rows = frames if self.rows is None else self.rows
        if padded and self.in_chunks and rows:
            # As stages.cache.stores.zarr_store lays it out: whole chunks, of fewer rows where the array has fewer.
            chunk = min(CHUNK_FRAMES, rows)
            rows = -(-rows // chunk) * chunk
        return rows * self.row_bytes


@dataclass(frozen=True)
class VideoSize:
    """How many bytes a video of so many frames takes in one storage type."""

    arrays: tuple[_StoredArray, ...]

    def zarr_bytes(self, frames: int) -> int:
        """Bytes of all chunk files of a Zarr group, the last chunk padded; nothing for no frames."""
        return sum(array.num_bytes(frames, padded=True) for array in self.arrays) if frames else 0

    def array_bytes(self, frames: int) -> int:
        """Bytes of the arrays alone, as exports store them."""
        return sum(array.num_bytes(frames, padded=False) for array in self.arrays) if frames else 0


def video_sizes(shape: FrameShape) -> dict[str, VideoSize]:
    """The size of a video in each storage type that the cache knows, by the type's name."""
    return {name: _video_size(kind, shape) for name, kind in STORAGE_TYPES.items()}


def _video_size(kind: StorageType, shape: FrameShape) -> VideoSize:
    # Two frames go through the type itself, so that whatever arrays it makes of them are counted.
    frames = np.ones((2, shape.tokens, shape.width), np.float32)
    times_s = np.arange(2.0)
    encoded = kind.encode(frames, video="plan", times_s=times_s)
    stored = {**encoded, "times_s": times_s, "targets": np.ones((2, shape.teacher_width), np.float32)}
    return VideoSize(
        tuple(
            _StoredArray(array[0].nbytes, len(array) if name in kind.per_video else None, array.ndim > 1)
            for name, array in stored.items()
        )
    )


# --- what is cached already


@dataclass(frozen=True)
class VideoWork:
    """What is left to do of one video: frames to decode, and the frames cached before and after."""

    frames: int
    before: int
    after: int


@dataclass(frozen=True)
class CacheState:
    """What a cache has of a plan; done + failed + pending are all its videos.

    Attributes:
        done: videos whose planned frames are all cached.
        failed: videos given up.
        pending: videos not done yet.
        work: what is left to do, by video id.
    """

    done: int
    failed: int
    pending: int
    work: dict[str, VideoWork]


def cache_state(
    root: Place,
    plan: FramePlan,
    wanted: Mapping[str, Scalar],
    place_of: Callable[[str], str],
    *,
    retry_failed: bool = False,
    refresh_changed: bool = False,
) -> CacheState:
    """Look up in the cache's ledger and commit records what is left of a plan; nothing is changed.

    Args:
        root: the cache's directory or URL; there need not be one.
        plan: the frames wanted.
        wanted: the fields of the fingerprint that are known without reading weights.
        place_of: path or URL of a video's file.
        retry_failed: whether videos that failed before are work, too.
        refresh_changed: whether videos whose files have changed, or may have, are.

    Raises:
        UserError: an export, which is read-only, a place that holds something else, a cache made under another
            fingerprint, or a broken ledger.
    """
    store = store_at(root).require_writable()
    if store.content("", FILE_NAME) is None:
        store.require_free()
        everything = {video: VideoWork(len(times), 0, len(times)) for video, times in plan.times_s.items()}
        return CacheState(0, 0, len(everything), everything)
    cache = FeatureCache.open(root)
    cache.fingerprint.require_match(wanted, root)
    status = cache.ledger.status(plan.times_s)
    outdated = set(find_changes(status.sources, place_of).outdated if refresh_changed else ())
    again = failed_to_try(status, place_of, retry_failed=retry_failed)
    work = {}
    for video in sorted(status.pending | again | outdated):
        planned = plan.times_s[video]
        times_s, fresh = (planned, True) if video in outdated else status.frames_to_do(video, planned)
        before = len(status.records[video].times_s) if video in status.records else 0
        work[video] = VideoWork(len(times_s), before, len(times_s) if fresh else before + len(times_s))
    return CacheState(len(status.done), len(status.failed), len(status.pending), work)


def failed_to_try(status: LedgerStatus, place_of: Callable[[str], str], *, retry_failed: bool) -> set[str]:
    """The failed videos that an extraction tries again: all, or those whose files were not there and may be now."""
    if retry_failed:
        return set(status.failed)
    absent = (video for video, failure in status.failed.items() if failure.absent)
    return {video for video in absent if is_url(place := place_of(video)) or Path(place).exists()}


# --- the disk


@dataclass(frozen=True)
class DiskRoom:
    """Free space where the cache is or will be, in bytes, against what is still to be written."""

    folder: Path
    free_bytes: int
    needed_bytes: int

    @property
    def enough(self) -> bool:
        """Whether it fits."""
        return self.free_bytes >= self.needed_bytes


def disk_room(root: Path, needed_bytes: int) -> DiskRoom:
    """Measure the free space at `root`, or at its nearest parent that exists."""
    folder = nearest_existing(root.resolve())
    return DiskRoom(folder, shutil.disk_usage(folder).free, needed_bytes)


def total_bytes(sizes: Mapping[str, VideoSize], frame_counts: Sequence[int], *, zarr: bool) -> dict[str, int]:
    """Bytes of videos with these numbers of frames, by storage type."""
    return {
        name: sum(size.zarr_bytes(frames) if zarr else size.array_bytes(frames) for frames in frame_counts)
        for name, size in sizes.items()
    }


def bytes_left(sizes: Mapping[str, VideoSize], work: Mapping[str, VideoWork]) -> dict[str, int]:
    """Bytes by which a Zarr cache still grows, by storage type."""
    return {
        name: sum(size.zarr_bytes(video.after) - size.zarr_bytes(video.before) for video in work.values())
        for name, size in sizes.items()
    }
