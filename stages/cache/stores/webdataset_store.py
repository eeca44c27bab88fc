"""A cache as WebDataset shards: plain tar files of .npy members, and an index of where each member's bytes are.

    fingerprint.json, ledger/         as in the cache
    shards/<number>.tar               per video <id>.times_s.npy, <id>.features.npy, ..., <id>.record.json
    index.json                        sizes of the shards; per video its shard, and (offset, bytes) of each member

Streaming readers take the tars as they are: all members of a video are one sample. Random windows go through the index
straight to the rows, without tarfile. WebDataset cuts a member's name at the first dot, so dots of an id are written
as %2E in the tar.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import IO, Any, ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt

from stages.atomic import atomic_write_text, sync
from stages.cache.files.errors import DamagedCacheError, damaged_export
from stages.cache.files.files import Directory, Piece, SmallFiles
from stages.cache.files.places import Place
from stages.cache.files.remote_files import RemoteFiles
from stages.cache.stores.blocks import ReadOnlyStore, content_problems, rows_buffer, runs
from stages.cache.stores.commit import COMMITS, CommitRecord
from stages.errors import UserError
from stages.ids import check_id
from stages.records import FrozenRecord, parse_record

INDEX = "index.json"
SHARDS = "shards"
RECORD = "record.json"
_NPY = ".npy"
_BLOCK = tarfile.BLOCKSIZE
_INDEX_VERSION = 1


class _Video(FrozenRecord):
    shard: NonNegativeInt
    members: dict[str, tuple[NonNegativeInt, NonNegativeInt]]


class _Index(FrozenRecord):
    format_version: Literal[1]
    shard_bytes: tuple[NonNegativeInt, ...]
    videos: dict[str, _Video]


def is_webdataset(files: SmallFiles) -> bool:
    """Whether there is such an export, or what is left of one."""
    return bool(files.names(SHARDS)) or files.content("", INDEX) is not None


class WebDatasetStore(ReadOnlyStore):
    """Reads such an export; see `stores.Store`."""

    kind: ClassVar[str] = "webdataset"

    def __init__(self, files: Directory | RemoteFiles) -> None:
        self.root: Place = files.root
        self._files = files
        self._walked: tuple[tuple[int, object], dict[str, tuple[int, int]]] | None = None

    @cached_property
    def index(self) -> _Index:
        """The index; DamagedCacheError when it is gone, UserError when it is broken."""
        path = self.root / INDEX
        content = self._files.content("", INDEX)
        if content is None:
            raise damaged_export(path, "the index of this export is gone")
        try:
            index = parse_record(_Index, json.loads(content), str(path))
        except ValueError as error:
            raise UserError(f"not valid JSON ({error})", where=path) from None
        for video, entry in index.videos.items():
            check_id(video, kind="video id", where=str(path))
            if entry.shard >= len(index.shard_bytes):
                raise damaged_export(path, f"the index puts video {video!r} into shard {entry.shard}, which it lacks")
        return index

    def names(self, folder: str) -> list[str]:
        if folder == COMMITS:
            return [f"{video}.json" for video in self.index.videos]
        return self._files.names(folder)

    def content(self, folder: str, name: str) -> bytes | None:
        """See `SmallFiles.content`; the records are members of the shards."""
        if folder != COMMITS:
            return self._files.content(folder, name)
        entry = self.index.videos.get(name.removesuffix(".json"))
        if entry is None or RECORD not in entry.members:
            return None
        offset, size = self._member(entry, RECORD)
        content = bytearray(size)
        self._fill([Piece(self._shard(entry), offset, memoryview(content))])
        return bytes(content)

    def read_arrays(self, record: CommitRecord, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        pieces: list[Piece] = []
        for name, rows in wanted.items():
            found[name], target = rows_buffer(record.arrays[name], len(rows))
            pieces += self._pieces(record, name, rows, target)
        self._fill(pieces)
        return found

    def _pieces(self, record: CommitRecord, name: str, rows: np.ndarray, target: memoryview) -> Iterator[Piece]:
        array, entry = record.arrays[name], self.index.videos[record.video]
        offset, size = self._member(entry, name + _NPY)
        header = size - array.num_bytes
        if header < 0:
            raise damaged_export(self.root / INDEX, f"{name} of video {record.video!r} has {size} bytes only")
        filled = 0
        for first, count in runs(rows, array.shape[0]):
            length = count * array.row_bytes
            start = offset + header + first * array.row_bytes
            yield Piece(self._shard(entry), start, target[filled : filled + length])
            filled += length

    def problems(self, record: CommitRecord) -> list[str]:
        entry = self.index.videos[record.video]
        found = self._members(entry.shard)
        problems = []
        for name in [*(f"{array}{_NPY}" for array in record.arrays), RECORD]:
            place = entry.members.get(name)
            if place is None:
                problems.append(f"{name} is not in the index")
            elif found.get(member_name(record.video, name)) != place:
                problems.append(f"{name} is not in shard {shard_name(entry.shard)} where the index puts it")
        problems += self._header_problems(record) if not problems else []
        return problems or content_problems(record, lambda name, rows: self.read_arrays(record, {name: rows})[name])

    def orphans(self) -> list[tuple[str, str]]:
        """See `Store.orphans`: shards and members that the index does not name, shards of another size."""
        index, orphans = self.index, []
        known = {shard_name(number): size for number, size in enumerate(index.shard_bytes)}
        for name in sorted({*self.names(SHARDS), *known}):
            found = self._files.size(f"{SHARDS}/{name}")
            if name not in known:
                orphans.append((f"{SHARDS}/{name}", "the index does not name it"))
            elif found is None:
                orphans.append((f"{SHARDS}/{name}", "this shard is gone"))
            elif found != known[name]:
                orphans.append((f"{SHARDS}/{name}", f"this shard has {found} bytes instead of {known[name]}"))
        named: list[set[str]] = [set() for _ in index.shard_bytes]
        for video, entry in index.videos.items():
            named[entry.shard] |= {member_name(video, name) for name in entry.members}
        for number, names in enumerate(named):
            extra = sorted(set(self._members(number)) - names)
            orphans += [(f"{SHARDS}/{shard_name(number)}", f"the index does not name its member {n}") for n in extra]
        return orphans

    def stored_bytes(self, records: Iterable[CommitRecord]) -> int:  # noqa: ARG002  # the shards hold all of them
        return sum(self.index.shard_bytes)

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "_files": self._files, "_walked": None}

    def _fill(self, pieces: Sequence[Piece]) -> None:
        try:
            self._files.read(pieces)
        except DamagedCacheError as error:
            raise damaged_export(error.where, error.what) from None

    def _shard(self, entry: _Video) -> str:
        return f"{SHARDS}/{shard_name(entry.shard)}"

    def _member(self, entry: _Video, name: str) -> tuple[int, int]:
        offset, size = entry.members.get(name, (0, 0))
        if not size or offset + size > self.index.shard_bytes[entry.shard]:
            raise damaged_export(self.root / INDEX, f"the index has no place for {name}")
        return offset, size

    def _members(self, shard: int) -> dict[str, tuple[int, int]]:
        """(offset, bytes) of every member that the shard's own headers lead to; none beyond a broken one."""
        path = f"{SHARDS}/{shard_name(shard)}"
        try:
            state = (shard, self._files.state(path))
            if self._walked is None or self._walked[0] != state:
                # A shard of short clips has thousands of members, and each of its videos asks for all of them.
                with self._files.open(path) as file:
                    self._walked = state, _walk(file)
        except OSError:
            return {}
        return self._walked[1]

    def _header_problems(self, record: CommitRecord) -> list[str]:
        problems = []
        entry = self.index.videos[record.video]
        for name, array in record.arrays.items():
            offset, size = self._member(entry, name + _NPY)
            header = bytearray(size - array.num_bytes)
            found: object
            try:
                self._fill([Piece(self._shard(entry), offset, memoryview(header))])
                found = _parse_npy_header(bytes(header))
            except (ValueError, DamagedCacheError) as error:
                found = error.fault if isinstance(error, DamagedCacheError) else str(error)
            if found != (array.shape, False, np.dtype(array.dtype)):
                problems.append(f"{name}{_NPY}: its header does not fit the commit record ({found})")
        return problems


class WebDatasetWriter:
    """Writes such an export into a folder; see `convert.ZarrWriter`.

    Args:
        shard_bytes: a shard takes no further video that would make it larger; one larger video has one for itself.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._sizes: list[int] = []
        self._videos: dict[str, _Video] = {}
        self._tar: io.BufferedWriter | None = None
        (folder / SHARDS).mkdir()

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        Directory(self.folder).add_file(folder, name, content)

    def add_video(self, record: CommitRecord, content: bytes, arrays: Mapping[str, np.ndarray]) -> None:
        tar = self._shard_for(record.num_bytes)
        members = {}
        for name, array in arrays.items():
            member = name + _NPY
            parts = (npy_header(array), array.view(np.uint8).reshape(-1).data)
            members[member] = _write_member(tar, member_name(record.video, member), parts)
        members[RECORD] = _write_member(tar, member_name(record.video, RECORD), (content,))
        self._videos[record.video] = _Video(shard=len(self._sizes), members=members)

    def finish(self) -> None:
        self._close_shard()
        sync(self.folder / SHARDS)
        index = _Index(format_version=_INDEX_VERSION, shard_bytes=tuple(self._sizes), videos=self._videos)
        atomic_write_text(self.folder / INDEX, index.model_dump_json() + "\n")

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()

    def _shard_for(self, num_bytes: int) -> io.BufferedWriter:
        if self._tar is not None and self._tar.tell() + num_bytes > self.shard_bytes:
            self._close_shard()
        if self._tar is None:
            self._tar = (self.folder / SHARDS / shard_name(len(self._sizes))).open("wb")
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.write(bytes(2 * _BLOCK))  # a tar ends with two empty blocks
            self._sizes.append(self._tar.tell())
            self._tar.close()
            sync(Path(self._tar.name))
            self._tar = None


def _walk(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """(offset, bytes) of a tar's members up to the first header that is broken or beyond the end."""
    found: dict[str, tuple[int, int]] = {}
    with suppress(tarfile.TarError), tarfile.open(fileobj=file, mode="r:") as tar:
        found.update((member.name, (member.offset_data, member.size)) for member in tar)
    return found


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"{number:06d}.tar"


def member_name(video: str, name: str) -> str:
    """A video's member in its shard."""
    return f"{video.replace('.', '%2E')}.{name}"


def npy_header(array: np.ndarray) -> bytes:
    """What stands before a contiguous array's bytes in a .npy file."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    return header.getvalue()


def _parse_npy_header(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    stream = io.BytesIO(content)
    np.lib.format.read_magic(stream)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if stream.read():
        raise ValueError("it is longer than it states")
    return shape, fortran, dtype


def _write_member(tar: io.BufferedWriter, name: str, parts: tuple[bytes | memoryview, ...]) -> tuple[int, int]:
    """Append a tar member and return the offset and size of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = sum(len(part) for part in parts)
    tar.write(info.tobuf(tarfile.GNU_FORMAT))
    offset = tar.tell()
    tar.writelines(parts)
    tar.write(bytes(-info.size % _BLOCK))
    return offset, info.size
