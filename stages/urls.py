"""Addresses: what is one, and how it may be shown."""

import re

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(::|://)")


def is_url(path: str) -> bool:
    """Whether a path names a protocol; fsspec's chains ("simplecache::s3://...") do, too."""
    return _URL.match(path) is not None


def without_secrets(url: str) -> str:
    """The URL as it may be shown and kept: without a query, which may be a signature."""
    return url.partition("?")[0]
