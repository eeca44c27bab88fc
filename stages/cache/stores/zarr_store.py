"""One Zarr v3 group per video: `times_s`, `features` and `targets` side by side, rows are frames.

zarr-python writes the groups, so any Zarr v3 reader opens them. Layout: 10 frames a chunk, no sharding, no codec but
little-endian bytes, NaN fill (-128 for int8), files named `c.<chunk>.0.0`. Because a chunk file is then the plain rows
one after another, reading does not go through zarr-python: it reads the wanted rows straight into the result, five
times faster (as fast as a memory map) and without touching the rest of a chunk. The shapes it relies on come from the
commit record.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.cache.files.files import Files, Piece
from stages.cache.stores.blocks import chunk_problems, chunk_span, crc32c, rows_buffer, runs, times_problems
from stages.cache.stores.commit import ArrayRecord, CommitRecord

if TYPE_CHECKING:
    from zarr.storage import MemoryStore

CHUNK_FRAMES = 10
_METADATA = "zarr.json"
_CHUNK_KEYS, _SEPARATOR = "default", "."
# A check holds so many chunks in memory, and asks an object store for so many at once.
_CHECKED_AT_ONCE = 16
# What no writer writes, so that a chunk that is missing shows to whoever reads the group with zarr. uint16 holds the
# bits of bfloat16, and this is its NaN.
_FILL = {"uint16": 0x7FC0, "int8": -128}

assert sys.byteorder == "little", "stored rows are read as they are on disk, little-endian"


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, ArrayRecord]:
    """Write a new group at `path` and return its arrays as the commit record lists them.

    Nothing is synced to disk yet. Whoever puts a record in place has to do that before: a record that survives a power
    cut must not name chunks that did not.

    Args:
        arrays: name to array, rows along axis 0.

    Raises:
        OSError: the disk refused, or somebody removed the folder meanwhile.
    """
    return _create(str(path), arrays)


def group_files(arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, ArrayRecord], dict[str, bytes]]:
    """Return what `write_group` returns, and the files that it writes, by their paths within the group."""
    from zarr.storage import MemoryStore

    stored: dict[str, Any] = {}
    records = _create(MemoryStore(stored), arrays)
    return records, {path: content.to_bytes() for path, content in stored.items()}


def group_names(group: str, record: CommitRecord) -> list[tuple[str, list[str]]]:
    """Return (folder, names) of all files of the group at the path `group`."""
    arrays = [
        (f"{group}/{name}", [_METADATA, *(_chunk_name(array, chunk) for chunk in range(len(array.crc32c)))])
        for name, array in record.arrays.items()
    ]
    return [(group, [_METADATA]), *arrays]


def read_arrays(
    files: Files, group: str, record: CommitRecord, wanted: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return rows (any order, repeats allowed) of arrays, in their stored types; neighbours are read in one go.

    Args:
        wanted: array name to row numbers.

    Raises:
        DamagedCacheError: a chunk file is gone or too short.
    """
    found, pieces = {}, []
    for name, rows in wanted.items():
        array = record.arrays[name]
        found[name], target = rows_buffer(array, len(rows))
        filled = 0
        for first, count in runs(rows, array.chunk_rows):
            chunk, row = divmod(first, array.chunk_rows)
            size = count * array.row_bytes
            path = f"{group}/{name}/{_chunk_name(array, chunk)}"
            pieces.append(Piece(path, row * array.row_bytes, target[filled : filled + size]))
            filled += size
    files.read(pieces)
    return found


def group_problems(files: Files, group: str, record: CommitRecord) -> list[str]:
    """Compare a group's files with its commit record, byte by byte; one sentence per fault, none when all is well."""
    if not files.names(group):
        return [f"the group {record.group} is gone"]
    problems = _metadata_problems(files.content(group, _METADATA), "group", {"zarr_format": 3, "node_type": "group"})
    for name, array in record.arrays.items():
        problems += _metadata_problems(files.content(f"{group}/{name}", _METADATA), name, _array_metadata(array))
        for start in range(0, len(array.crc32c), _CHECKED_AT_ONCE):
            chunks = range(start, min(start + _CHECKED_AT_ONCE, len(array.crc32c)))
            contents = files.contents(f"{group}/{name}", [_chunk_name(array, chunk) for chunk in chunks])
            for chunk, content in zip(chunks, contents, strict=True):
                problems += _file_problems(name, array, chunk, content)
    return problems or times_problems(record, lambda name, rows: read_arrays(files, group, record, {name: rows})[name])


def _create(store: "str | MemoryStore", arrays: Mapping[str, np.ndarray]) -> dict[str, ArrayRecord]:
    import zarr  # 0.3 s that readers need not pay

    group = zarr.create_group(store, zarr_format=3)
    return {name: _write_array(group, name, array) for name, array in arrays.items()}


def _write_array(group: Any, name: str, array: np.ndarray) -> ArrayRecord:
    # The times are always read whole, and a short video needs no padding up to ten frames.
    chunk_rows = len(array) if array.ndim == 1 else min(CHUNK_FRAMES, len(array))
    stored = group.create_array(
        name,
        shape=array.shape,
        dtype=array.dtype,
        chunks=(chunk_rows, *array.shape[1:]),
        compressors=None,
        filters=None,
        fill_value=_fill_value(array.dtype.name),
        # With the default "/" every chunk would get folders of its own: three times as many inodes.
        chunk_key_encoding={"name": _CHUNK_KEYS, "separator": _SEPARATOR},
        # Otherwise zarr compares each chunk with the fill value, which takes four times as long as the writing.
        config={"write_empty_chunks": True},
    )
    sums = []
    for start in range(0, len(array), chunk_rows):
        block = np.ascontiguousarray(array[start : start + chunk_rows])
        stored[start : start + chunk_rows] = block
        sums.append(crc32c(block))
    return ArrayRecord(shape=array.shape, dtype=array.dtype.name, chunk_rows=chunk_rows, crc32c=tuple(sums))


def _fill_value(dtype: str) -> float:
    return _FILL.get(dtype, np.nan)


def _chunk_name(array: ArrayRecord, chunk: int) -> str:
    return _SEPARATOR.join(["c", str(chunk), *["0"] * (len(array.shape) - 1)])


def _metadata_problems(content: bytes | None, name: str, expected: Mapping[str, object]) -> list[str]:
    if content is None:
        return [f"{name}: {_METADATA} is gone"]
    try:
        stored = json.loads(content)
    except ValueError as error:
        return [f"{name}: {_METADATA} is broken ({error})"]
    wrong = [key for key, value in expected.items() if not isinstance(stored, dict) or stored.get(key) != value]
    return [f"{name}: {_METADATA} has another {key} than the commit record" for key in wrong]


def _array_metadata(array: ArrayRecord) -> dict[str, object]:
    """The metadata of an array, as far as it decides what other readers of Zarr see."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [array.chunk_rows, *array.shape[1:]]},
        },
        "chunk_key_encoding": {"name": _CHUNK_KEYS, "configuration": {"separator": _SEPARATOR}},
        "fill_value": fill if np.isfinite(fill := _fill_value(array.dtype)) else "NaN",
        # A type of one byte has no order of bytes to name.
        "codecs": [{"name": "bytes", **({} if array.dtype == "int8" else {"configuration": {"endian": "little"}})}],
    }


def _file_problems(name: str, array: ArrayRecord, chunk: int, content: bytes | None) -> list[str]:
    first, end = chunk_span(array, chunk)
    place = f"{name}: chunk {chunk} (rows {first} to {end - 1})"
    if content is None:
        return [f"{place} is missing"]
    expected = array.chunk_rows * array.row_bytes
    if len(content) != expected:
        return [f"{place} has {len(content)} bytes instead of {expected}"]
    size = (end - first) * array.row_bytes
    problems = chunk_problems(name, array, chunk, crc32c(np.frombuffer(content, np.uint8, count=size)))
    padding = np.full((expected - size) // np.dtype(array.dtype).itemsize, _fill_value(array.dtype), array.dtype)
    if content[size:] != padding.tobytes():
        problems.append(f"{place}: the padding behind these rows changed after the commit")
    return problems
