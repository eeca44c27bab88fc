"""Files at a place, the little that a cache needs of them: one protocol, here for a directory of this machine."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from stages.atomic import atomic_path
from stages.cache.files.errors import damaged
from stages.cache.files.places import Place


class Piece(NamedTuple):
    """Bytes of a file that are wanted: from `offset` on as many as `target` holds."""

    path: str
    offset: int
    target: memoryview


class SmallFiles(Protocol):
    """Records, ledger files and fingerprint of a cache or an export, wherever they are; "" is the folder at the top."""

    @property
    def root(self) -> Place:
        """The cache's place, or the export's directory or file."""

    def names(self, folder: str) -> list[str]:
        """Return the names in `folder` that do not start with a dot; none when there is no such folder."""

    def content(self, folder: str, name: str) -> bytes | None:
        """Return a file's bytes, None when there is none."""

    def contents(self, folder: str, names: Sequence[str]) -> list[bytes | None]:
        """Return what `content` does of several files; at a URL they are fetched side by side."""


class Files(SmallFiles, Protocol):
    """All that is done to files; paths are relative to the root, with `/` between their parts."""

    def read(self, pieces: Sequence[Piece]) -> None:
        """Fill the pieces' targets; DamagedCacheError when a file is gone or too short."""

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        """Write a whole file: it appears in one step, and what was there is replaced."""

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

    def remove_tree(self, path: str) -> bool:
        """Remove a folder and all in it; returns whether it is gone afterwards."""

    def size(self, path: str) -> int | None:
        """Bytes of a file, None when there is none."""

    def state(self, path: str) -> object:
        """Something that changes when a file does; OSError when there is none."""

    def open(self, path: str) -> IO[bytes]:
        """Open a file to read here and there in it; OSError when there is none."""

    def tree_bytes(self, path: str) -> int:
        """Bytes of all files in a folder."""

    def idle_s(self, path: str) -> float:
        """Seconds since anything in a folder changed; infinite when there is nothing."""


@dataclass(frozen=True)
class Directory:
    """`Files` that are just that: files in folders of a file system."""

    root: Path

    def names(self, folder: str) -> list[str]:
        return names_in(self.root / folder)

    def content(self, folder: str, name: str) -> bytes | None:
        try:
            return (self.root / folder / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def contents(self, folder: str, names: Sequence[str]) -> list[bytes | None]:
        return [self.content(folder, name) for name in names]

    def read(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            _read_into(self.root / piece.path, piece.offset, piece.target)

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        """See `Files.add_file`; it is synced to disk and its folder is made."""
        with atomic_path(self.root / folder / name) as aside:
            aside.write_bytes(content)

    def remove(self, path: str) -> None:
        (self.root / path).unlink(missing_ok=True)

    def remove_tree(self, path: str) -> bool:
        # Another sweep or the writer itself may be removing it too.
        shutil.rmtree(self.root / path, ignore_errors=True)
        return not (self.root / path).exists()

    def size(self, path: str) -> int | None:
        file = self.root / path
        return file.stat().st_size if file.is_file() else None

    def state(self, path: str) -> object:
        status = (self.root / path).stat()
        return status.st_size, status.st_mtime_ns

    def open(self, path: str) -> IO[bytes]:
        return (self.root / path).open("rb")

    def tree_bytes(self, path: str) -> int:
        total = 0
        for file in (self.root / path).rglob("*"):
            try:
                total += file.stat().st_size if file.is_file() else 0
            except FileNotFoundError:
                continue  # another sweep was first
        return total

    def idle_s(self, path: str) -> float:
        folder, changes = self.root / path, []
        for file in [folder, *folder.rglob("*")]:
            try:
                changes.append(file.stat().st_mtime)
            except FileNotFoundError:
                continue  # moved into place meanwhile
        return time.time() - max(changes) if changes else float("inf")


def _read_into(path: Path, offset: int, target: memoryview) -> None:
    # One copy, as from a memory map, and as fast; but a file that is cut short meanwhile is an error and not the end of
    # the process.
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            filled = 0
            while filled < len(target):
                count = file.readinto(target[filled:])
                if not count:
                    raise damaged(path, "this file is cut short")
                filled += count
    except FileNotFoundError:
        raise damaged(path, "this file is gone") from None


def names_in(folder: Path) -> list[str]:
    """Return the names in `folder` that do not start with a dot; none when the folder does not exist yet."""
    try:
        return [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
