"""One training of a run at a time: a lock in its folder that the system takes back from whoever is killed."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.errors import UserError

LOCK = "training.lock"
_LOG = logging.getLogger(__name__)


@contextmanager
def training(run: Path) -> Iterator[None]:
    """Be the only one who trains the run within the block; its folder is made if need be.

    Where the file system has no locks, a warning says so.

    Raises:
        UserError: another process trains it; says which.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            raise UserError(
                f"{holder} is training this run", where=run, hint="wait until it has ended, or give another --name"
            ) from None
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): do not train this run twice at once", run, error)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        os.close(descriptor)
