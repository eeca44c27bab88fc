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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stages.atomic import sync_directory, sync_file
from stages.cache.blocks import chunk_problems, chunk_span, crc32c, read_into, runs, times_problems
from stages.cache.commit import ArrayRecord, CommitRecord

CHUNK_FRAMES = 10
# What no writer writes, so that a chunk that is missing shows to whoever reads the group with zarr. uint16 holds the
# bits of bfloat16, and this is its NaN.
_FILL = {"uint16": 0x7FC0, "int8": -128}

assert sys.byteorder == "little", "stored rows are read as they lie on disk, little-endian"


def write_group(path: Path, arrays: Mapping[str, np.ndarray]) -> dict[str, ArrayRecord]:
    """Write a new group at `path` and return what the commit record says of its arrays.

    Each file is synced to disk before this returns: a record that survives a power cut must not name chunks that did
    not. It costs about 50 ms for 72 MB, the price of knowing it.

    Args:
        arrays: name to array, rows along axis 0.

    Raises:
        OSError: the disk refused, or somebody removed the folder meanwhile.
    """
    import zarr  # 0.3 s that readers need not pay

    group = zarr.create_group(str(path), zarr_format=3)
    records = {name: _write_array(group, name, array) for name, array in arrays.items()}
    sync_file(path / "zarr.json")
    for name, record in records.items():
        sync_file(path / name / "zarr.json")
        for chunk in range(len(record.crc32c)):
            sync_file(_chunk_path(path, name, record, chunk))
        sync_directory(path / name)
    sync_directory(path)
    return records


def read_rows(group: Path, record: CommitRecord, name: str, rows: np.ndarray) -> np.ndarray:
    """Return `rows` (any order, repeats allowed) of an array, in its stored type; neighbours are read in one go.

    Raises:
        DamagedCacheError: a chunk file is gone or too short.
    """
    array = record.arrays[name]
    out = np.empty((len(rows), *array.shape[1:]), dtype=array.dtype)
    target = out.view(np.uint8).reshape(-1).data
    filled = 0
    for first, count in runs(rows, array.chunk_rows):
        chunk, row = divmod(first, array.chunk_rows)
        size = count * array.row_bytes
        path = _chunk_path(group, name, array, chunk)
        read_into(path, row * array.row_bytes, target[filled : filled + size])
        filled += size
    return out


def group_problems(group: Path, record: CommitRecord) -> list[str]:
    """Compare a group's files with its commit record, byte by byte; one sentence per fault, none when all is well."""
    if not group.is_dir():
        return [f"the group {record.group} is gone"]
    problems = []
    for name, array in record.arrays.items():
        problems += _metadata_problems(group / name / "zarr.json", name, array)
        for chunk in range(len(array.crc32c)):
            problems += _file_problems(group, record, name, chunk)
    return problems or times_problems(record, partial(read_rows, group, record))


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
        fill_value=_FILL.get(array.dtype.name, np.nan),
        # With the default "/" every chunk would get folders of its own: three times as many inodes.
        chunk_key_encoding={"name": "default", "separator": "."},
        # Otherwise zarr compares each chunk with the fill value, which takes four times as long as the writing.
        config={"write_empty_chunks": True},
    )
    sums = []
    for start in range(0, len(array), chunk_rows):
        block = np.ascontiguousarray(array[start : start + chunk_rows])
        stored[start : start + chunk_rows] = block
        sums.append(crc32c(block))
    return ArrayRecord(shape=array.shape, dtype=array.dtype.name, chunk_rows=chunk_rows, crc32c=tuple(sums))


def _chunk_path(group: Path, name: str, array: ArrayRecord, chunk: int) -> Path:
    return group / name / ".".join(["c", str(chunk), *["0"] * (len(array.shape) - 1)])


def _metadata_problems(path: Path, name: str, array: ArrayRecord) -> list[str]:
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return [f"{name}: zarr.json is gone"]
    except ValueError as error:
        return [f"{name}: zarr.json is broken ({error})"]
    expected = {
        "shape": list(array.shape),
        "data_type": array.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [array.chunk_rows, *array.shape[1:]]},
        },
        # A type of one byte has no order of bytes to name.
        "codecs": [{"name": "bytes", **({} if array.dtype == "int8" else {"configuration": {"endian": "little"}})}],
    }
    wrong = [key for key, value in expected.items() if not isinstance(stored, dict) or stored.get(key) != value]
    return [f"{name}: zarr.json has another {key} than the commit record" for key in wrong]


def _file_problems(group: Path, record: CommitRecord, name: str, chunk: int) -> list[str]:
    array = record.arrays[name]
    first, end = chunk_span(array, chunk)
    place = f"{name}: chunk {chunk} (rows {first} to {end - 1})"
    try:
        size = _chunk_path(group, name, array, chunk).stat().st_size
    except FileNotFoundError:
        return [f"{place} is missing"]
    expected = array.chunk_rows * array.row_bytes
    if size != expected:
        return [f"{place} has {size} bytes instead of {expected}"]
    return chunk_problems(name, array, chunk, partial(read_rows, group, record))
