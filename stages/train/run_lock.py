"""One training of a run at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stages.lock import ProcessLock

RUN_LOCK = "training.lock"


@contextmanager
def training(run: Path) -> Iterator[None]:
    """Be the only one who trains the run within the block.

    The run's folder is made if need be, and removed again if the block has written nothing into it.

    Raises:
        UserError: another process trains it; says which.
    """
    run.mkdir(parents=True, exist_ok=True)
    hint = "wait until it has ended, or give another --name"
    lock = ProcessLock(run / RUN_LOCK, purpose="training this run", hint=hint)
    lock.acquire()
    try:
        yield
    finally:
        with suppress(OSError):  # a disk that refuses it was reported by what was written there
            if [entry.name for entry in run.iterdir()] == [RUN_LOCK]:
                (run / RUN_LOCK).unlink()
                run.rmdir()
        lock.release()
