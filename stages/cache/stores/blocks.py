"""What all three kinds of store share: runs of rows, reading them straight into a result, checksums of blocks."""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NoReturn

import google_crc32c
import numpy as np

from stages.cache.files.errors import DamagedCacheError, read_only_export
from stages.cache.files.files import SmallFiles
from stages.cache.files.places import Place
from stages.cache.stores.commit import ArrayRecord, CommitRecord


class ReadOnlyStore:
    """The part of `stores.Store` that is the same for every kind."""

    kind: ClassVar[str]
    root: Place

    def contents(self: SmallFiles, folder: str, names: Sequence[str]) -> list[bytes | None]:
        return [self.content(folder, name) for name in names]

    def require_writable(self) -> NoReturn:
        raise read_only_export(self.kind, self.root)

    def groups(self) -> None:
        return


ReadRows = Callable[[str, np.ndarray], np.ndarray]
"""Array name and row numbers [n] -> the rows [n, ...] in their stored type."""


def crc32c(block: np.ndarray) -> str:
    """CRC-32C of a contiguous array's bytes, 8 hexadecimal digits."""
    plain = block.view(np.uint8).reshape(-1)
    plain.flags.writeable = False  # google_crc32c accepts read-only buffers only
    return f"{google_crc32c.value(plain):08x}"


def rows_buffer(array: ArrayRecord, num_rows: int) -> tuple[np.ndarray, memoryview]:
    """Room for rows of an array, and the same as plain bytes."""
    out = np.empty((num_rows, *array.shape[1:]), dtype=array.dtype)
    return out, out.view(np.uint8).reshape(-1).data


def runs(rows: np.ndarray, chunk_rows: int) -> Iterator[tuple[int, int]]:
    """Cut `rows` into (first row, count) runs of neighbours in one chunk."""
    if rows.size:
        cuts = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] % chunk_rows == 0)) + 1
        for run in np.split(rows, cuts):
            yield int(run[0]), len(run)


def chunk_span(array: ArrayRecord, chunk: int) -> tuple[int, int]:
    """First row of a chunk, and the row after its last."""
    first = chunk * array.chunk_rows
    return first, min(first + array.chunk_rows, array.shape[0])


def chunk_problems(name: str, array: ArrayRecord, chunk: int, found: str) -> list[str]:
    """Compare the checksum `found` of one chunk's rows with the committed one; at most one sentence."""
    first, end = chunk_span(array, chunk)
    if found == array.crc32c[chunk]:
        return []
    where = f"{name}: chunk {chunk} (rows {first} to {end - 1})"
    return [f"{where} has CRC-32C {found} instead of {array.crc32c[chunk]}: its bytes changed after the commit"]


def times_problems(record: CommitRecord, read: ReadRows) -> list[str]:
    """Compare the stored frame times with those in the commit record; at most one sentence."""
    stored = read("times_s", np.arange(record.arrays["times_s"].shape[0]))
    return [] if np.array_equal(stored, record.times_array) else ["times_s differs from the times in the commit record"]


def content_problems(record: CommitRecord, read: ReadRows) -> list[str]:
    """Check every chunk of every array and the times, for arrays in one piece each."""
    problems = []
    for name, array in record.arrays.items():
        for chunk in range(len(array.crc32c)):
            try:
                rows = read(name, np.arange(*chunk_span(array, chunk)))
                problems += chunk_problems(name, array, chunk, crc32c(rows))
            except DamagedCacheError as error:
                problems.append(f"{name}: {error}")
                break
    return problems or times_problems(record, read)
