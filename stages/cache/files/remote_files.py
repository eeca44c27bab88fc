"""Files at a URL, through fsspec: S3, GCS, Azure, http(s) to read only, fsspec's memory.

fsspec holds credentials, endpoints and time limits (`FSSPEC_S3_...` variables, ~/.config/fsspec/*.json), nothing here
does. An object store has no rename and no append; an object appears whole or not at all. Its filesystems are
asynchronous inside, so that many small requests run side by side.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from operator import methodcaller
from typing import IO, Any, TypeVar

from stages.cache.files.errors import damaged
from stages.cache.files.files import Piece
from stages.cache.files.places import CacheUrl
from stages.errors import UserError
from stages.urls import is_forbidden, open_filesystem

T = TypeVar("T")

_TRIES = 3
_PAUSE_S = 0.5
# Bytes between two wanted pieces of one object that are read along, because a request of their own costs more:
# at 80 MB/s and 30 ms to the first byte about as much time.
_GAP_BYTES = 1_000_000
# Uploads in flight at once: ten frames at full size are 7 MB, and each is held in memory until it has gone.
_UPLOADS = 16
# Headers of a tar are read one by one, far from each other.
_BLOCK_BYTES = 65_536
_READ_ONLY = ("http", "https")
# Ten connections, the library's default, would be ten requests in flight at most.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    protocol: {"config_kwargs": {"max_pool_connections": 64}} for protocol in ("s3", "s3a")
}
# The libraries below fsspec have exceptions of their own for a network that fails, which are no OSError.
_NETWORK = ("aiohttp", "aiobotocore", "azure", "botocore", "gcsfs", "google", "requests", "urllib3")
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError", "TokenRetrievalError")


class RemoteFiles:
    """`files.Files` at a URL; pickled as the URL, and opened by whoever asks first in a process."""

    def __init__(self, root: CacheUrl) -> None:
        self.root = root
        self._opened: tuple[int, Any, str] | None = None

    def names(self, folder: str) -> list[str]:
        """See `SmallFiles.names`; over http the server must list folders."""
        prefix = self._path(folder)
        listed = prefix + "/" if self.root.protocol in _READ_ONLY else prefix
        try:
            found = self._call(lambda fs: fs.ls(listed, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        parts = (str(entry).rstrip("/").removeprefix(prefix).lstrip("/") for entry in found)
        return [name for name in parts if name and name[0] not in ".?" and "/" not in name]

    def content(self, folder: str, name: str) -> bytes | None:
        return self.contents(folder, [name])[0]

    def contents(self, folder: str, names: Sequence[str]) -> list[bytes | None]:
        paths = [f"{folder}/{name}" if folder else name for name in names]
        # From the first byte on, because drivers ask for the size first when they are asked for the whole.
        return self._fetch(paths, [0] * len(paths), [None] * len(paths))

    def read(self, pieces: Sequence[Piece]) -> None:
        """See `Files.read`: pieces near to each other in an object are one request, and all requests run at once."""
        spans = list(_spans(pieces))
        bounds = [(span[0].offset, max(p.offset + len(p.target) for p in span)) for span in spans]
        paths = [span[0].path for span in spans]
        found = self._fetch(paths, [start for start, _ in bounds], [end for _, end in bounds])
        for span, (start, end), content in zip(spans, bounds, found, strict=True):
            where = self.root / span[0].path
            if content is None:
                raise damaged(where, "this file is gone")
            # A server that does not know ranges sends the whole object instead.
            skip = start if len(content) > end - start else 0
            if len(content) < skip + end - start:
                raise damaged(where, "this file is cut short")
            for piece in span:
                begin = skip + piece.offset - start
                piece.target[:] = content[begin : begin + len(piece.target)]

    def add_file(self, folder: str, name: str, content: bytes) -> None:
        self.add_files({f"{folder}/{name}" if folder else name: content})

    def add_files(self, contents: Mapping[str, bytes]) -> None:
        """Write whole files, several at once; in no order."""
        self.require_writable()
        objects = {self._path(path): content for path, content in contents.items()}
        # The memory filesystem and others without requests take no `batch_size`.
        more = {"batch_size": _UPLOADS} if self._filesystem()[0].async_impl else {}
        self._call(lambda fs: fs.pipe(objects, **more))

    def create_file(self, name: str, content: bytes) -> bool:
        """Write a file at the top unless it is there, where the store can do that in one step; returns whether it did.

        Stores that cannot refuse overwrite it, so whoever needs to know reads it back.
        """
        self.require_writable()
        try:
            self._call(lambda fs: fs.pipe_file(self._path(name), content, mode="create"))
        except FileExistsError:
            return False
        except UserError as error:
            if "PreconditionFailed" in str(error) or "412" in str(error):
                return False
            raise
        return True

    def remove(self, path: str) -> None:
        self.require_writable()
        try:
            self._call(lambda fs: fs.rm_file(self._path(path)))
        except FileNotFoundError:
            return

    def remove_tree(self, path: str) -> bool:
        self.require_writable()
        try:
            self._call(lambda fs: fs.rm(self._path(path), recursive=True))
        except (FileNotFoundError, UserError):
            return not self.names(path)
        return True

    def size(self, path: str) -> int | None:
        try:
            found = self._call(lambda fs: fs.info(self._path(path)))
        except FileNotFoundError:
            return None
        return found["size"] if found["type"] == "file" else None

    def state(self, path: str) -> object:
        return sorted((str(key), str(value)) for key, value in self._call(lambda fs: fs.info(self._path(path))).items())

    def open(self, path: str) -> IO[bytes]:
        """See `Files.open`: what is read goes over the network in small blocks."""
        return self._call(lambda fs: fs.open(self._path(path), "rb", block_size=_BLOCK_BYTES))

    def tree_bytes(self, path: str) -> int:
        try:
            return int(self._call(lambda fs: fs.du(self._path(path))))
        except FileNotFoundError:
            return 0

    def idle_s(self, path: str) -> float:
        """See `Files.idle_s`; by the store's clock, which is taken to agree with this machine's within minutes."""
        if self.root.protocol in _READ_ONLY:
            return 0.0  # nobody can remove anything there, so it does not matter
        try:
            files = self._call(lambda fs: fs.find(self._path(path)))
            changes = self._call(lambda fs: [fs.modified(file) for file in files])
        except FileNotFoundError:
            return float("inf")
        return (datetime.now(UTC) - max(changes)).total_seconds() if changes else float("inf")

    def require_writable(self) -> None:
        """UserError at a place that can only be read."""
        if self.root.protocol in _READ_ONLY:
            raise UserError(
                f"a cache at an {self.root.protocol}:// address can only be read",
                where=self.root,
                hint="write into a directory or an object store (s3://bucket/prefix)",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def _path(self, path: str) -> str:
        base = self._filesystem()[1]
        return f"{base}/{path}" if path else base

    def _filesystem(self) -> tuple[Any, str]:
        # An event loop does not survive a fork, so each process has its own.
        if self._opened is None or self._opened[0] != os.getpid():
            # Other processes write too, so a listing is never taken from memory.
            options = {"use_listings_cache": False, **_OPTIONS.get(self.root.protocol, {})}
            self._opened = (os.getpid(), *open_filesystem(str(self.root), **options))
        return self._opened[1:]

    def _fetch(self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int | None]) -> list[bytes | None]:
        """Ranges of objects, None where there is none, side by side; the ones that fail are asked for again."""
        full = [self._path(path) for path in paths]
        found: list[Any] = [None] * len(full)
        todo = list(range(len(full)))
        for tries in range(1, _TRIES + 1):
            asked = ([full[i] for i in todo], [starts[i] for i in todo], [ends[i] for i in todo])
            answers = self._call(methodcaller("cat_ranges", *asked, on_error="return"))
            failed = []
            for i, answer in zip(todo, answers, strict=True):
                found[i] = answer
                if isinstance(answer, Exception):
                    found[i] = _missing_or(answer, self.root, final=tries == _TRIES)
                    if isinstance(found[i], Exception):
                        failed.append(i)
            if not failed:
                break
            todo = failed
            time.sleep(_PAUSE_S * tries)
        return found

    def _call(self, work: Callable[[Any], T]) -> T:
        """Do something with the filesystem; a network that fails is tried again, then it is one clear line."""
        filesystem = self._filesystem()[0]
        for tries in range(1, _TRIES + 1):
            try:
                return work(filesystem)
            except Exception as error:  # the drivers have no common base for what they raise
                if isinstance(error, FileExistsError | NotADirectoryError):
                    raise
                if isinstance(error, FileNotFoundError) and not _says_no_bucket(error):
                    raise
                if not _is_passing(error) or tries == _TRIES:
                    raise _as_user_error(error, self.root) from error
                time.sleep(_PAUSE_S * tries)
        raise AssertionError


def _spans(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces of one object with little between them."""
    span: list[Piece] = []
    end = 0
    for piece in sorted(pieces, key=lambda piece: (piece.path, piece.offset)):
        if span and (piece.path != span[0].path or piece.offset > end + _GAP_BYTES):
            yield span
            span, end = [], 0
        span.append(piece)
        end = max(end, piece.offset + len(piece.target))
    if span:
        yield span


def _missing_or(error: Exception, root: CacheUrl, *, final: bool) -> bytes | Exception | None:
    """What an answer that is an error means: no such object (None), fewer bytes (b""), or another try."""
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) and not _says_no_bucket(error):
        return None
    # The range begins behind the object's end.
    if getattr(error, "status", None) == 416 or "satisfiable" in str(error):
        return b""
    if final or not _is_passing(error):
        raise _as_user_error(error, root) from error
    return error


def _is_passing(error: BaseException) -> bool:
    """Whether another try may help: the network's fault, or a server's that is busy."""
    if isinstance(error, PermissionError | FileNotFoundError | NotImplementedError | FileExistsError):
        return False
    if type(error).__name__ in _CREDENTIALS:
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and status < 500:
        return False
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK


def _says_no_bucket(error: BaseException) -> bool:
    return "bucket does not exist" in str(error)


def _as_user_error(error: Exception, root: CacheUrl) -> Exception:
    """The error as one line for the user; what is a bug of ours stays what it is."""
    detail = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    hint = (
        "credentials and endpoints are fsspec's and its driver's, such as AWS_ACCESS_KEY_ID; "
        "see docs/cache.md in the project's repository, Caches at a URL"
    )
    if is_forbidden(error):
        return UserError(f"no permission ({detail})", where=root, hint=hint)
    if type(error).__name__ in _CREDENTIALS:
        return UserError(f"no credentials for this place ({detail})", where=root, hint=hint)
    if _says_no_bucket(error):
        return UserError("there is no such bucket", where=root, hint="make it first, or correct the address")
    if isinstance(error, NotImplementedError):
        return UserError(f"{root.protocol}:// cannot do this ({detail})", where=root, hint="use an object store")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _NETWORK:
        again = f", {_TRIES} times" if _is_passing(error) else ""
        hint = f"try the same command again later; {hint}"
        return UserError(f"no answer{again} ({detail})", where=root, hint=hint, exit_code=1)
    return error
