"""One training of a run at a time: a lock in its folder that the system takes back from whoever is killed."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.errors import UserError

LOCK = "training.lock"
_LOG = logging.getLogger(__name__)


@contextmanager
def training(run: Path) -> Iterator[None]:
    """Be the only one who trains the run within the block.

    The run's folder is made if need be, and removed again if the block has written nothing into it. Where the file
    system has no locks, a warning says so.

    Raises:
        UserError: another process trains it; says which.
    """
    descriptor = _lock(run)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        _remove_unused(run)
        os.close(descriptor)


def _lock(run: Path) -> int:
    """The run's lock file, open and ours."""
    while True:
        run.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # whoever had the run before us has just removed its unused folder
            descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                _take(descriptor, run)
                if (run / LOCK).stat().st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _take(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
        raise UserError(
            f"{holder} is training this run", where=run, hint="wait until it has ended, or give another --name"
        ) from None
    except OSError as error:
        _LOG.warning("%s cannot be locked (%s): do not train this run twice at once", run, error)


def _remove_unused(run: Path) -> None:
    """Remove the folder of a training that was refused before it had begun."""
    with suppress(OSError):  # a disk that refuses it is told of by what was written there
        if [entry.name for entry in run.iterdir()] == [LOCK]:
            (run / LOCK).unlink()
            run.rmdir()
