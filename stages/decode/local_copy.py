"""A video at a URL as a local file, for as long as it is needed and not longer than this process."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.decode.child import DecodeChild
from stages.errors import UserError


@contextmanager
def local_copy(
    child: DecodeChild, url: str, *, folder: str | None, limit_bytes: int, deadline_s: float
) -> Iterator[Path]:
    """Fetch `url` into a temporary file in `folder` (None: the system's) and yield its path, good in children too.

    On Linux the file has no name: however this process ends, the system gives its room back.

    Raises:
        DecodeError: the file cannot be had, is too large, or takes too long.
        UserError: no driver for the protocol, or the folder takes no file.
    """
    make = tempfile.TemporaryFile if sys.platform == "linux" else tempfile.NamedTemporaryFile
    try:
        copy = make(dir=folder)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        raise UserError(
            f"nothing can be written here ({error.strerror})", where=where, hint="set extract.scratch to another folder"
        ) from error
    with copy:
        path = Path(f"/proc/{os.getpid()}/fd/{copy.fileno()}" if sys.platform == "linux" else copy.name)
        child.fetch(url, path, limit_bytes=limit_bytes, deadline_s=deadline_s)
        yield path
