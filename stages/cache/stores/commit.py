"""Commit records: one small JSON file per video that names its group; what no record names does not exist.

<root>/commits/<video>.json      the record, replaced in one step, always written last
<root>/videos/<video>.<revision> the group it names; 8 hexadecimal digits, new for every write

Records are read through `SmallFiles`, because exports of a cache keep the same files in other places.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from math import prod
from typing import Literal, Self

import numpy as np
from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from stages.cache.files.errors import DamagedCacheError
from stages.cache.files.files import SmallFiles
from stages.cache.files.places import Place
from stages.cache.source import VideoSource
from stages.ids import check_id
from stages.records import FrozenRecord

COMMITS = "commits"
VIDEOS = "videos"
_SUFFIX = ".json"
_GROUP = re.compile(r"(.+)\.[0-9a-f]{8}")
# Array names become file names, and a record may come from somebody else's export.
_ARRAY_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_READERS = 8
_BATCH = 50


class ArrayRecord(FrozenRecord):
    """One stored array: rows along axis 0, `chunk_rows` of them in each file, a CRC-32C of each file's rows."""

    shape: tuple[int, ...] = Field(min_length=1)
    dtype: Literal["float16", "float32", "float64", "uint16", "int8"]
    chunk_rows: int = Field(gt=0)
    crc32c: tuple[str, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if min(self.shape) < 1 or len(self.crc32c) != -(-self.shape[0] // self.chunk_rows):
            raise ValueError("shape, rows per chunk and number of checksums contradict each other")
        return self

    @property
    def row_bytes(self) -> int:
        return prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def num_bytes(self) -> int:
        """Bytes of all rows, without the padding of the last file."""
        return self.shape[0] * self.row_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files; each is padded to a full chunk."""
        return len(self.crc32c) * self.chunk_rows * self.row_bytes


class CommitRecord(FrozenRecord):
    """What is committed for one video; valid only if `checksum` fits the rest.

    `times_s` are the T frame times in seconds, strictly increasing. `checksum` covers the video's id, times, arrays
    (through their CRCs) and fingerprint, not the revision, the moment or the `source`, so equal contents have equal
    checksums. Records of earlier versions have no source.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    format_version: Literal[1]
    video: str
    group: str
    fingerprint: str
    arrays: dict[str, ArrayRecord]
    checksum: str
    committed: AwareDatetime
    times_s: tuple[float, ...]
    source: VideoSource | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = _GROUP.fullmatch(self.group)
        if named is None or named[1] != self.video:
            raise ValueError(f"group {self.group!r} does not belong to video {self.video!r}")
        odd = [name for name in self.arrays if not _ARRAY_NAME.fullmatch(name)]
        missing = {"times_s", "features", "targets"} - set(self.arrays)
        if odd or missing:
            raise ValueError(f"arrays are missing ({sorted(missing)}) or cannot be named so ({odd})")
        if self.checksum != content_checksum(self.video, self.fingerprint, self.times_array, self.arrays):
            raise ValueError("the checksum does not fit the record's content")
        return self

    @cached_property
    def times_array(self) -> np.ndarray:
        """The frame times as `[T]` float64."""
        return np.array(self.times_s, dtype=np.float64)

    @property
    def remark(self) -> str | None:
        """What is known of damage of the video's file."""
        return None if self.source is None else self.source.remark

    def absent(self, planned_s: np.ndarray) -> np.ndarray:
        """The planned times [T] float64 that are not cached, exactly."""
        cached_s = self.times_array
        at = np.minimum(np.searchsorted(cached_s, planned_s), len(cached_s) - 1)
        return planned_s[cached_s[at] != planned_s]

    def missing(self, planned_s: np.ndarray) -> np.ndarray:
        """Those of the `absent` times that the video's file can give: the ones before its damage."""
        absent = self.absent(planned_s)
        whole_before_s = None if self.source is None else self.source.whole_before_s
        return absent if whole_before_s is None else absent[absent < whole_before_s]

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays, without padding."""
        return sum(array.num_bytes for array in self.arrays.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of all chunk files."""
        return sum(array.stored_bytes for array in self.arrays.values())


def content_checksum(video: str, fingerprint: str, times_s: np.ndarray, arrays: Mapping[str, ArrayRecord]) -> str:
    """Return the SHA-256 (hexadecimal) of a video's committed content."""
    parts = [f"{n} {a.shape} {a.dtype} {a.chunk_rows} {' '.join(a.crc32c)}" for n, a in sorted(arrays.items())]
    text = "\n".join([video, fingerprint, *parts])
    return hashlib.sha256(text.encode() + times_s.astype("<f8").tobytes()).hexdigest()


def record_name(root: Place, video: str) -> str:
    """Return the file name of the commit record of `video`; UserError when the id is unsafe as one."""
    return check_id(video, kind="video id", where=str(root / COMMITS)) + _SUFFIX


def record_path(root: Place, video: str) -> Place:
    """Return where the commit record of `video` is; UserError when the id is unsafe as a file name."""
    return root / COMMITS / record_name(root, video)


def committed_ids(files: SmallFiles) -> list[str]:
    """Return the sorted ids of the videos that have a commit record, by one directory listing."""
    return sorted(name.removesuffix(_SUFFIX) for name in files.names(COMMITS) if name.endswith(_SUFFIX))


def record_content(files: SmallFiles, video: str) -> bytes | None:
    """Return the commit record of `video` as it is stored, None when there is none."""
    return files.content(COMMITS, record_name(files.root, video))


def load_record(files: SmallFiles, video: str) -> CommitRecord | None:
    """Return the commit record of `video`, None when there is none.

    Raises:
        DamagedCacheError: the file is no valid record of this video.
    """
    content = record_content(files, video)
    return None if content is None else parse_commit(content, record_path(files.root, video), video)


def load_records(
    files: SmallFiles, videos: Sequence[str]
) -> Iterator[tuple[str, CommitRecord | DamagedCacheError | None]]:
    """Yield (video, what `load_record` returns or raises) for many videos; about 0.1 s per 1,000.

    They are fetched by threads, because on a network file system or an object store each one costs a round trip.
    """

    def fetch(start: int) -> list[bytes | None]:
        return files.contents(COMMITS, [record_name(files.root, video) for video in videos[start : start + _BATCH]])

    with ThreadPoolExecutor(_READERS) as pool:
        starts = range(0, len(videos), _BATCH)
        for start, contents in zip(starts, pool.map(fetch, starts), strict=True):
            for video, content in zip(videos[start : start + _BATCH], contents, strict=True):
                try:
                    path = record_path(files.root, video)
                    yield video, None if content is None else parse_commit(content, path, video)
                except DamagedCacheError as error:
                    yield video, error


def parse_commit(content: bytes, path: Place, video: str) -> CommitRecord:
    """Return the record of `video` in `content`; DamagedCacheError naming `path` when it is none."""
    try:
        record = CommitRecord.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"broken commit record: {place} {first['msg']}") from None
    if record.video != video:
        raise _damaged(path, f"this commit record belongs to video {record.video!r}")
    return record


def _damaged(path: Place, what: str) -> DamagedCacheError:
    return DamagedCacheError(what, where=path, hint="run the same `pipeline extract` again: it writes the video again")


FILE_NAME = "fingerprint.json"
