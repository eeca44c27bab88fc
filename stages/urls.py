"""Addresses: what is one, which may be given, how it may be shown, and how it is opened."""

import re
from typing import Any

from stages.errors import UserError

LOCAL = ("file", "local")
"""Protocols of this machine's own files."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


def is_url(path: str) -> bool:
    """Whether a path names a protocol; fsspec's chains ("simplecache::s3://...") do, too."""
    return _URL.match(path) is not None


def without_secrets(url: str) -> str:
    """The URL as it may be shown and kept: without a query, which may be a signature."""
    return url.partition("?")[0]


def refuse_secrets(url: str, *, where: str) -> None:
    """Raise UserError for an address with a user, a password or a query in it, without repeating it."""
    protocol, _, rest = url.partition("://")
    if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
        raise UserError(
            f"a {protocol.rpartition(':')[2].lower()}:// address with a user, a password or a query in it is refused, "
            "because it would be written into run folders and logs",
            where=where,
            hint="leave it out, and give credentials to fsspec by its configuration or the environment",
        )


def open_filesystem(url: str, **options: Any) -> tuple[Any, str]:
    """fsspec's filesystem of an address, made with `options`, and the path in it.

    Raises:
        UserError: fsspec does not know the protocol, or its driver is not installed.
    """
    import fsspec  # 0.1 s that local caches need not pay

    protocol, where = url.partition("://")[0], without_secrets(url)
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise UserError(
            f"{protocol}:// needs a package that is not installed ({error})",
            where=where,
            hint="run `pip install 'diff-lmm[remote]'` for s3:// and http(s)://, gcsfs for gs://, adlfs for az://",
        ) from error
    except ValueError as error:
        known = "s3, gs, az, http, https, file and what else fsspec knows"
        raise UserError(
            "this kind of address is not known", where=where, received=f"{protocol}://", allowed=known
        ) from error


def is_forbidden(error: BaseException) -> bool:
    """Whether a driver of fsspec reports a lack of permission (HTTP 401, 403)."""
    return isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
