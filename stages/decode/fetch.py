"""What is at a URL, copied into a local file through fsspec; runs in the decode child, which can be ended."""

import re
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from stages.decode.frames import DecodeError
from stages.errors import UserError, refusal_of
from stages.urls import without_secrets

_GIB = 2**30

# Extras of fsspec by protocol, where they are not called like it.
_EXTRAS = {"https": "http", "s3a": "s3", "gs": "gcs", "az": "abfs"}


def fetch_into(url: str, target: Path, *, limit_bytes: int) -> None:
    """Stream a URL's content into the existing file `target`.

    Raises:
        DecodeError: "missing", "refused" (no permission, or more than `limit_bytes`) or "unreachable".
        UserError: fsspec has no driver for the protocol, or the local disk does not take the file.
    """
    shown, counter = without_secrets(url), _Counter(limit_bytes)
    try:
        files, path = url_to_fs(url, **_options(url))
        files.get_file(path, str(target), callback=counter)
    except (ImportError, ValueError) as error:
        raise no_driver(url, error) from error
    except FileNotFoundError:
        raise DecodeError("missing", f"no such file: {shown}") from None
    except PermissionError as error:
        raise DecodeError("refused", f"no permission to read {shown}: {error}") from error
    except OSError as error:
        if (refusal := refusal_of(error)) is not None:
            raise UserError(
                f"no room for the copy of {shown}: {refusal}",
                where=target.parent if target.exists() else target,
                hint="set extract.scratch to a folder on a larger disk",
            ) from error
        raise _unreachable(shown, counter, error) from error
    except DecodeError:
        raise
    except Exception as error:  # the libraries below fsspec have exceptions of their own, which are no OSError
        raise _of_library(shown, counter, error) from error
    if counter.size and target.stat().st_size < counter.size:
        raise DecodeError("unreachable", f"only {target.stat().st_size} of {counter.size} bytes came from {shown}")


def no_driver(url: str, error: Exception) -> UserError:
    """One line for a protocol that fsspec does not know, or whose package is not installed."""
    protocol = url.partition("://")[0]
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(protocol, protocol)
        return UserError(f"{protocol}:// addresses need a package", hint=f"run pip install 'fsspec[{extra}]'")
    return UserError("no video can be fetched from such an address", received=without_secrets(url))


class _Counter(Callback):
    """Ends a copy that grows past a limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__()
        self._limit_bytes = limit_bytes

    def set_size(self, size: int | None) -> None:
        super().set_size(size)
        self._check(size or 0)

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._check(self.value)

    def _check(self, count: int) -> None:
        if count > self._limit_bytes:
            least = "" if count == self.size else "at least "
            allowed = f"extract.download_gb allows {self._limit_bytes / _GIB:.3g}"
            raise DecodeError("refused", f"the file has {least}{count / _GIB:.3g} GiB, and {allowed}")


def _options(url: str) -> dict[str, Any]:
    """fsspec would end every download over http after five minutes; the deadline is the caller's."""
    if not url.startswith(("http://", "https://")):
        return {}
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None)}}


def _of_library(shown: str, counter: _Counter, error: Exception) -> DecodeError:
    status = getattr(error, "status", None)
    if status in (401, 403):
        return DecodeError("refused", f"no permission to read {shown} (HTTP {status})")
    if status in (404, 410):
        return DecodeError("missing", f"no such file: {shown} (HTTP {status})")
    return _unreachable(shown, counter, error)


def _unreachable(shown: str, counter: _Counter, error: Exception) -> DecodeError:
    came = f" after {counter.value} of {counter.size} bytes" if counter.size else ""
    reason = re.sub(r"https?://\S+", "...", str(error)) or "no reason given"
    return DecodeError("unreachable", f"{shown}{came}: {type(error).__name__}: {reason}")
