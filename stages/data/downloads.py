"""What a user downloaded: files and the members of archives, read without unpacking."""

import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from stages.errors import UserError

_TAR, _ZIP = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"), (".zip",)


# RuntimeError: an encrypted member, or one of a kind that this Python cannot unpack.
_BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError)


@dataclass(frozen=True)
class Download:
    """One file of the downloads: `path` itself, or the `member` of the archive `path`, at a `position` in it."""

    path: Path
    member: str | None = None
    position: int = 0

    @property
    def name(self) -> PurePosixPath:
        """Its path, inside the archive if it is in one."""
        return PurePosixPath(self.member if self.member is not None else self.path.as_posix())

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path}:{self.member}"


def list_downloads(folders: Sequence[Path], target: Path) -> list[Download]:
    """Return every file under the folders and in the archives there, in a fixed order; `target` itself is left out.

    Raises:
        UserError: a folder is not there, or an archive is broken.
    """
    found = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError("downloads folder not found", where=folder)
        for where, inner, names in os.walk(folder):
            inner[:] = sorted(name for name in inner if name[0] != "." and (Path(where) / name).resolve() != target)
            for name in sorted(names):
                path = Path(where) / name
                found += list(_members(path)) if name.endswith((*_TAR, *_ZIP)) else [Download(path)]
    return found


def _members(path: Path) -> Iterator[Download]:
    with whole_archive(path):
        if path.name.endswith(_ZIP):
            with zipfile.ZipFile(path) as packed:
                names = [name for name in packed.namelist() if not name.endswith("/")]
                yield from (Download(path, name, position) for position, name in enumerate(names))
        else:
            with tarfile.open(path) as archive:
                files = (member for member in archive if member.isfile())
                yield from (Download(path, member.name, position) for position, member in enumerate(files))


@contextmanager
def whole_archive(path: Path) -> Iterator[None]:
    """UserError for what reading a damaged archive raises."""
    try:
        yield
    except (*_BROKEN, OSError) as error:
        # gzip and bz2 report damaged data by an OSError which is none of the system's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"not a whole archive ({error})", where=path, hint="download it again") from None


class DownloadReader(ExitStack):
    """Reads downloads; each archive is opened once."""

    def __init__(self) -> None:
        super().__init__()
        self._archives: dict[Path, tarfile.TarFile | zipfile.ZipFile] = {}

    def open(self, download: Download) -> IO[bytes]:
        """The content as a stream; an archive stays open until the reader is closed."""
        if download.member is None:
            return download.path.open("rb")
        archive = self._archives.get(download.path)
        if archive is None:
            is_zip = download.path.name.endswith(_ZIP)
            archive = zipfile.ZipFile(download.path) if is_zip else tarfile.open(download.path)  # noqa: SIM115
            self.callback(archive.close)
            self._archives[download.path] = archive
        if isinstance(archive, zipfile.ZipFile):
            return archive.open(download.member)
        stream = archive.extractfile(download.member)
        assert stream is not None, "only files are listed"
        return stream

    def read(self, download: Download) -> bytes:
        with whole_archive(download.path), self.open(download) as stream:
            return stream.read()
