"""The feature cache as its users see it: write a video, read frames by time, ask what is there."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.cache import maintenance
from stages.cache.files.errors import CacheWriteError, DamagedCacheError, MissingFramesError, storage_errors
from stages.cache.files.places import Place, place_of
from stages.cache.fingerprint import Fingerprint, fingerprint_content, load_fingerprint
from stages.cache.ledger import Ledger
from stages.cache.source import VideoSource
from stages.cache.storage import STORAGE_FIELD, refuse_unstorable, storage_type
from stages.cache.stores.commit import (
    COMMITS,
    FILE_NAME,
    CommitRecord,
    committed_ids,
    load_record,
    record_name,
)
from stages.cache.stores.copied_store import copied
from stages.cache.stores.stores import Store, store_at
from stages.cache.stores.survey import STALE_AFTER_S
from stages.cache.stores.writing import content_of

_OPEN_VIDEOS = 256
_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class CachedFrames:
    """Frames of one video, T in the order they were asked for; what was not asked for is None.

    `features [T, P, C]` float16 or float32 (of bfloat16 and int8 storage: bfloat16's bits in uint16, see
    `storage.widen`), `targets [T, D]` float32, `times_s [T]` float64: the cached times, which may differ from the asked
    ones by the tolerance. Features of int8 storage that were read as stored come with `scales [C]` float32, by which
    they are to be multiplied.
    """

    times_s: np.ndarray
    features: np.ndarray | None
    targets: np.ndarray | None
    scales: np.ndarray | None = None


class FeatureCache:
    """One directory or object-store prefix that holds the features of many videos, all made under one fingerprint.

    An export of it (a folder of WebDataset shards, an HDF5 file) is opened and read in the same way, but not written.
    Cheap to copy to other processes (pickled as a path or a URL): each opens what it reads by itself.
    """

    def __init__(self, store: Store, fingerprint: Fingerprint, *, extract_command: str | None = None) -> None:
        self.store, self.root = store, store.root
        self.fingerprint = fingerprint
        self.storage = storage_type(fingerprint.fields.get(STORAGE_FIELD))
        self.extract_command = extract_command or _extract_command(self.root)
        self._forget_opened()

    @classmethod
    def create_or_open(
        cls, root: Path | str, fingerprint: Fingerprint, *, extract_command: str | None = None
    ) -> "FeatureCache":
        """Open the cache at `root`, or make one there when the directory is absent or empty.

        Args:
            extract_command: the command that fills this cache, quoted to the user when frames are missing.

        Raises:
            UserError: another fingerprint (naming the field), a directory that holds something else, an export, or a
                disk or an object store that cannot be written.
        """
        store = store_at(place_of(root)).require_writable()
        storage_type(fingerprint.fields.get(STORAGE_FIELD))
        if store.content("", FILE_NAME) is None:
            store.create(fingerprint_content(fingerprint))
        # Read back even what was just written: another process may have created the cache at the same moment.
        cache = cls.open(root, extract_command=extract_command)
        cache.fingerprint.require_match(fingerprint, cache.root)
        return cache

    @classmethod
    def open(
        cls, root: Path | str, *, extract_command: str | None = None, local_copy: str | Path | None = None
    ) -> "FeatureCache":
        """Open an existing cache or export, whatever its fingerprint.

        Args:
            extract_command: see `create_or_open`.
            local_copy: folder into which a video of a cache at a URL is copied when it is first read.

        Raises:
            UserError: there is none, it is broken, or it cannot be reached; `local_copy` is one of another cache.
        """
        store = store_at(place_of(root))
        if local_copy is not None:
            store = copied(store, Path(local_copy))
        command = extract_command or _extract_command(store.root)
        return cls(store, load_fingerprint(store, extract_command=command), extract_command=command)

    @classmethod
    def is_at(cls, root: Path | str) -> bool:
        place = place_of(root)
        # An HDF5 export is a file.
        return (isinstance(place, Path) and place.is_file()) or store_at(place).content("", FILE_NAME) is not None

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store, self.fingerprint.digest)

    def video_ids(self) -> list[str]:
        """Return the sorted ids of all committed videos."""
        return committed_ids(self.store)

    def cached_times_s(self, video_id: str) -> np.ndarray:
        """Return the cached frame times `[T]` float64 of a video in seconds; none when it is not committed."""
        record = load_record(self.store, video_id)
        return np.empty(0) if record is None else record.times_array

    def write_video(
        self,
        video_id: str,
        *,
        times_s: np.ndarray,
        features: np.ndarray,
        targets: np.ndarray,
        merge: bool = False,
        source: VideoSource | None = None,
    ) -> CommitRecord:
        """Commit a video's frames as a new revision that replaces the old one, in one step.

        Args:
            times_s: `[T]` seconds, strictly increasing.
            features: `[T, P, C]` float16 or float32, converted to the storage type.
            targets: `[T, D]` float32.
            merge: keep the frames of the old revision whose times are not written now (more frames were planned).
            source: the file that the frames are from.

        Raises:
            CacheWriteError: NaN, infinity, overflow, wrong shape or type, naming video, array and frame time; or the
                frames to keep are damaged, or from another file than `source`.
            UserError: an unsafe id, an export, or a full, read-only or forbidden disk.
        """
        store = self.store.require_writable()
        times_s = np.asarray(times_s, dtype=np.float64)
        _check_shapes(video_id, times_s, features, targets)
        refuse_unstorable(targets, largest=_LARGEST_FLOAT32, name="targets", video=video_id, times_s=times_s)
        kept = None
        if merge and (old := load_record(store, video_id)) is not None:
            source = _joined_source(old, source)
            kept = self._kept_frames(old, times_s, features, targets)
        arrays = {"times_s": times_s, **self.storage.encode(features, video=video_id, times_s=times_s, kept=kept)}
        arrays["targets"] = targets
        if kept is not None:
            arrays = self._in_time_order(kept, arrays)
        return store.commit(video_id, self.fingerprint.digest, arrays, source)

    def add_source(self, video_id: str, source: VideoSource) -> CommitRecord | None:
        """Replace what a video's commit record has of its file, and nothing else; None when there is no record.

        Raises:
            CacheWriteError: the cached frames are from another file.
            UserError: an export, a broken record, or the disk refuses.
        """
        store = self.store.require_writable()
        old = load_record(store, video_id)
        if old is None:
            return None
        record = old.model_copy(update={"source": _joined_source(old, source)})
        content = content_of(record)
        with storage_errors(self.root, len(content)):
            store.add_file(COMMITS, record_name(self.root, video_id), content)
        return record

    def remove_video(self, video_id: str) -> None:
        """Remove what is cached of a video, if anything is. The ledger is the caller's to write."""
        maintenance.remove_video(self.store.require_writable(), video_id)

    def read(
        self,
        video_id: str,
        times_s: np.ndarray,
        *,
        tolerance_s: float = 0.0,
        features: bool = True,
        targets: bool = True,
        as_stored: bool = False,
    ) -> CachedFrames:
        """Read the frames nearest to `times_s` (any order, repeats allowed).

        Args:
            tolerance_s: how far a cached time may be from the asked one; 0 asks for equality.
            as_stored: whether int8 features come as they are, with their scales, for whoever widens them elsewhere.

        Raises:
            MissingFramesError: the video or a frame is not cached; the message names the command that adds it.
            DamagedCacheError: files of the video are gone or cut short.
        """
        wanted = frozenset(name for name, asked in (("features", features), ("targets", targets)) if asked)
        stored = self._stored(video_id, np.asarray(times_s, dtype=np.float64), tolerance_s, wanted)
        found = stored.get("features") if as_stored or not features else self.storage.decode(stored)
        scales = stored.get("scales") if as_stored else None
        return CachedFrames(stored["times_s"], found, stored.get("targets"), scales)

    def verify(self, video_id: str) -> maintenance.CheckResult:
        return maintenance.verify(self.store, self.fingerprint.digest, video_id)

    def verify_all(self) -> Iterator[maintenance.CheckResult]:
        return maintenance.verify_all(self.store, self.fingerprint.digest)

    def requeue(self, videos: Iterable[str]) -> tuple[str, ...]:
        return maintenance.requeue(self.store, self.fingerprint.digest, videos)

    def sweep(self, stale_after_s: float = STALE_AFTER_S, *, dry_run: bool = False) -> maintenance.SweepReport:
        """See `maintenance.sweep`; UserError on an export."""
        return maintenance.sweep(self.store.require_writable(), stale_after_s, dry_run=dry_run)

    def remove_videos(self, videos: Iterable[str], *, reason: str, dry_run: bool = False) -> maintenance.SweepReport:
        return maintenance.remove_videos(self.store, self.fingerprint.digest, videos, reason=reason, dry_run=dry_run)

    def info(self, on_video: Callable[[], None] = lambda: None) -> maintenance.CacheInfo:
        return maintenance.info(self.store, on_video)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_records", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_opened()

    def _stored(
        self, video_id: str, asked_s: np.ndarray, tolerance_s: float, wanted: frozenset[str]
    ) -> dict[str, np.ndarray]:
        """Read, as stored, the rows nearest to `asked_s` of what is `wanted` ("features", "targets"), and `times_s`."""
        record = self._opened(video_id)
        while True:
            try:
                return self._stored_under(record, asked_s, tolerance_s, wanted)
            except (DamagedCacheError, MissingFramesError):
                # The video may have a new revision since its record was opened; the old group is then gone.
                with self._lock:
                    self._records.pop(video_id, None)
                fresh = self._opened(video_id)
                if fresh.group == record.group:
                    raise
                record = fresh

    def _stored_under(
        self, record: CommitRecord, asked_s: np.ndarray, tolerance_s: float, wanted: frozenset[str]
    ) -> dict[str, np.ndarray]:
        rows = self._resolve(record, asked_s, tolerance_s)
        asked = {
            name: np.arange(array.shape[0]) if name in self.storage.per_video else rows
            for name, array in record.arrays.items()
            # Whatever is neither times nor targets belongs to the features.
            if name != "times_s" and ("targets" if name == "targets" else "features") in wanted
        }
        return {"times_s": record.times_array[rows], **self.store.read_arrays(record, asked)}

    def _resolve(self, record: CommitRecord, asked_s: np.ndarray, tolerance_s: float) -> np.ndarray:
        """Return the row of the cached time nearest to each asked one, `[T]` int64."""
        cached_s = record.times_array
        right = np.minimum(np.searchsorted(cached_s, asked_s), len(cached_s) - 1)
        left = np.maximum(right - 1, 0)
        rows = np.where(np.abs(cached_s[left] - asked_s) <= np.abs(cached_s[right] - asked_s), left, right)
        missing = ~(np.abs(cached_s[rows] - asked_s) <= tolerance_s)
        if missing.any():
            first = int(np.argmax(missing))
            raise MissingFramesError(
                f"video {record.video!r} has no cached frame within {tolerance_s:g} s of {asked_s[first]:.6f} s "
                f"(the nearest is at {cached_s[rows[first]]:.6f} s; {missing.sum()} of {len(asked_s)} frames missing)",
                where=self.root,
                hint=f"run `{self.extract_command}` for the data set and task that ask for it",
            )
        return rows

    def _opened(self, video_id: str) -> CommitRecord:
        with self._lock:
            record = self._records.pop(video_id, None)
        if record is None:
            record = load_record(self.store, video_id)
            if record is None:
                raise MissingFramesError(
                    f"video {video_id!r} is not in this cache",
                    where=self.root,
                    hint=f"run `{self.extract_command}` for the data set and task that ask for it",
                )
            if record.fingerprint != self.fingerprint.digest:
                raise DamagedCacheError(
                    f"video {video_id!r} was committed with another fingerprint than this cache has",
                    where=self.root,
                    hint="run `pipeline cache verify`, then the same extraction again",
                )
        with self._lock:
            self._records[video_id] = record
            while len(self._records) > _OPEN_VIDEOS:
                self._records.popitem(last=False)
        return record

    def _forget_opened(self) -> None:
        self._records: OrderedDict[str, CommitRecord] = OrderedDict()
        self._lock = threading.Lock()

    def _kept_frames(
        self, old: CommitRecord, times_s: np.ndarray, features: np.ndarray, targets: np.ndarray
    ) -> dict[str, np.ndarray] | None:
        """The stored arrays of the cached frames that are not written now; None when there are none."""
        video_id, kept_s = old.video, np.setdiff1d(old.times_array, times_s)
        if not kept_s.size:
            return None
        # Bytes that changed after their commit must not get a new checksum, which would look like a true one.
        if problems := self.verify(video_id).problems:
            raise CacheWriteError(
                f"video {video_id!r}: the frames that it has are damaged ({problems[0]}), so none were added. "
                "Run `pipeline cache verify --repair`, then the same extraction again"
            )
        kept = self._stored(video_id, kept_s, 0.0, frozenset({"features", "targets"}))
        cached, new = (kept["features"].shape[1:], kept["targets"].shape[1:]), (features.shape[1:], targets.shape[1:])
        if cached != new:
            raise CacheWriteError(
                f"video {video_id!r}: new frames have features {new[0]} and targets {new[1]}, "
                f"the cached ones {cached[0]} and {cached[1]}"
            )
        return kept

    def _in_time_order(self, kept: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Put the kept frames, which come first in the encoded features, and the new ones into the order of time."""
        times_s = np.concatenate([kept["times_s"], arrays["times_s"]])
        targets = np.concatenate([kept["targets"], arrays["targets"]])
        order = np.argsort(times_s)
        together = {**arrays, "times_s": times_s, "targets": targets}
        return {name: a if name in self.storage.per_video else a[order] for name, a in together.items()}


def _joined_source(old: CommitRecord, now: VideoSource | None) -> VideoSource | None:
    """The file of cached frames and of those added to them; CacheWriteError if these are two files."""
    if old.source is None or now is None:
        return now or old.source
    if old.source.compare(now) == "changed":
        raise CacheWriteError(
            f"video {old.video!r}: its file is another one than that of the frames that it has, so none were added. "
            "Extract it again with --refresh-changed"
        )
    return old.source.later(now)


def _extract_command(root: Place) -> str:
    return f"pipeline extract --dataset <name> --cache {root}"


def _check_shapes(video: str, times_s: np.ndarray, features: np.ndarray, targets: np.ndarray) -> None:
    if times_s.ndim != 1 or not times_s.size or not np.isfinite(times_s).all() or not (np.diff(times_s) > 0).all():
        raise CacheWriteError(f"video {video!r}: times_s must be [T] finite, strictly increasing seconds, T at least 1")
    for name, array, ndim, dtypes in (
        ("features", features, 3, ("float16", "float32")),
        ("targets", targets, 2, ("float32",)),
    ):
        if array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
            raise CacheWriteError(f"video {video!r}: {name} are {array.dtype}; allowed: {', '.join(dtypes)}")
        if array.ndim != ndim or len(array) != len(times_s) or 0 in array.shape:
            letters = "[T, P, C]" if ndim == 3 else "[T, D]"
            raise CacheWriteError(
                f"video {video!r}: {name} have shape {array.shape} instead of {letters} with T = {len(times_s)}"
            )
