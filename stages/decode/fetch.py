"""What is at a URL, copied into a local file through fsspec; runs in the decode child, which can be ended."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from stages.decode.frames import DecodeError
from stages.errors import UserError, refusal_of
from stages.urls import is_forbidden, open_filesystem, without_secrets
from stages.wording import GIB


def fetch_into(url: str, target: Path, *, limit_bytes: int) -> None:
    """Stream a URL's content into the existing file `target`.

    Raises:
        DecodeError: "missing", "refused" (no permission, or more than `limit_bytes`) or "unreachable".
        UserError: fsspec has no driver for the protocol, or the local disk does not take the file.
    """
    shown, counter = without_secrets(url), _Counter(limit_bytes)
    files, path = open_filesystem(url, **_options(url))
    try:
        files.get_file(path, str(target), callback=counter)
    except DecodeError:
        raise
    except Exception as error:  # the libraries below fsspec have exceptions of their own, which are no OSError
        if isinstance(error, OSError) and not is_forbidden(error) and (refusal := refusal_of(error)) is not None:
            raise UserError(
                f"no room for the copy of {shown}: {refusal}",
                where=target.parent if target.exists() else target,
                hint="set extract.scratch to a folder on a larger disk",
            ) from error
        raise _failure(shown, counter, error) from error
    if counter.size and target.stat().st_size < counter.size:
        raise DecodeError("unreachable", f"only {target.stat().st_size} of {counter.size} bytes came from {shown}")


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
            allowed = f"extract.download_gb allows {self._limit_bytes / GIB:.3g}"
            raise DecodeError("refused", f"the file has {least}{count / GIB:.3g} GiB, and {allowed}")


def _options(url: str) -> dict[str, Any]:
    """fsspec would end every download over http after five minutes; the deadline is the caller's."""
    if url.startswith(("http://", "https://")):
        with suppress(ImportError):  # whose lack is reported when the address is opened
            from aiohttp import ClientTimeout

            return {"client_kwargs": {"timeout": ClientTimeout(total=None)}}
    return {}


def _failure(shown: str, counter: _Counter, error: Exception) -> DecodeError:
    status = getattr(error, "status", None)
    detail = f" (HTTP {status})" if status else ""
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return DecodeError("missing", f"no such file: {shown}{detail}")
    if is_forbidden(error):
        return DecodeError("refused", f"no permission to read {shown}{detail or f': {error}'}")
    came = f" after {counter.value} of {counter.size} bytes" if counter.size else ""
    reason = re.sub(r"https?://\S+", "...", str(error)) or "no reason given"
    return DecodeError("unreachable", f"{shown}{came}: {type(error).__name__}: {reason}")
