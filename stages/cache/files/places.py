"""Where a cache may be: a directory (an HDF5 export: a file), or a prefix of an object store, named by its URL."""

from pathlib import Path, PurePosixPath

from stages.errors import UserError
from stages.urls import LOCAL, refuse_secrets


class CacheUrl(str):
    """An fsspec URL without secrets, e.g. s3://bucket/prefix; joined with `/` as a path is, handed around as text."""

    __slots__ = ()

    def __truediv__(self, name: str) -> "CacheUrl":
        return CacheUrl(f"{self}/{name}")

    @property
    def protocol(self) -> str:
        return self.partition("://")[0]

    @property
    def name(self) -> str:
        return PurePosixPath(self.partition("://")[2]).name


Place = Path | CacheUrl


def place_of(named: str | Path) -> Place:
    """Return where `named` (a path, a file:// URL, or the URL of an object store) is.

    Raises:
        UserError: a URL that carries a secret (which is not repeated), or one that wraps another.
    """
    if isinstance(named, Path | CacheUrl):
        return named
    protocol, separator, rest = named.partition("://")
    if not separator:
        return Path(named)
    if protocol in LOCAL:
        return Path(rest)
    refuse_secrets(named, where="--cache")
    if "::" in named or ".." in rest.split("/") or not rest.strip("/"):
        raise UserError(
            "this is no address of a cache",
            where="--cache",
            received=named,
            allowed="a directory, or protocol://bucket/prefix",
        )
    return CacheUrl(f"{protocol}://{rest.rstrip('/')}")
