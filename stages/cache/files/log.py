"""Where a run's ledger events go, line by line: a file that grows, or, at a URL, parts of a file."""

import os
import time
from pathlib import Path

from stages.cache.files.errors import storage_errors
from stages.cache.files.places import Place
from stages.cache.files.remote_files import RemoteFiles
from stages.errors import UserError

_PART_LINES = 500
_LATEST_S = 5.0


class FileLog:
    """Appends to a file that appears with the first line; nobody else writes it."""

    def __init__(self, path: Path) -> None:
        if path.exists():
            raise _used(path)
        self.path = path
        self._descriptor: int | None = None

    def append(self, line: bytes, *, restorable: bool) -> None:  # noqa: ARG002  # every line is written at once
        """Add a line, whole or not at all; one that is `restorable` from elsewhere may be stored a little later."""
        with storage_errors(self.path, len(line)):
            if self._descriptor is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            before = os.fstat(self._descriptor).st_size
            try:
                written = os.write(self._descriptor, line)
                while written < len(line):  # a disk that fills up takes half a line first
                    written += os.write(self._descriptor, line[written:])
            except OSError:
                os.ftruncate(self._descriptor, before)
                raise

    def close(self) -> None:
        """Store what is not stored yet; synced to disk."""
        if self._descriptor is not None:
            os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


class RemoteLog:
    """Writes parts of 500 lines, <name>.jsonl, <name>-0001.jsonl, ..., the last one again with each batch of lines.

    An object cannot grow, and one per event would be slow to read. A part is stored when an event cannot be restored
    (a video failed) and otherwise every 5 seconds: a kill costs at most the events of videos done since, which their
    commit records restore.
    """

    def __init__(self, files: RemoteFiles, folder: str, name: str) -> None:
        self.path = files.root / folder / f"{name}.jsonl"
        if files.content(folder, f"{name}.jsonl") is not None:
            raise _used(self.path)
        self._files, self._folder, self._name = files, folder, name
        self._lines: list[bytes] = []
        self._part = self._unstored = 0
        self._stored_s = time.monotonic()

    def append(self, line: bytes, *, restorable: bool) -> None:
        if len(self._lines) == _PART_LINES:
            self._store()
            self._lines, self._part = [], self._part + 1
        self._lines.append(line)
        self._unstored += 1
        if not restorable or time.monotonic() - self._stored_s > _LATEST_S:
            self._store()

    def close(self) -> None:
        self._store()

    def _store(self) -> None:
        if self._unstored:
            part = f"-{self._part:04d}" if self._part else ""
            self._files.add_file(self._folder, f"{self._name}{part}.jsonl", b"".join(self._lines))
            self._unstored = 0
        self._stored_s = time.monotonic()


def _used(path: Place) -> UserError:
    return UserError("this ledger file belongs to an earlier run", where=path, hint="use another name")
