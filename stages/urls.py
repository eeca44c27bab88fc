"""Addresses: what is one, which may be given, and how it may be shown."""

import re

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
