"""Processes of this machine that train together, started and watched by torch's elastic launcher."""

import logging
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.errors import UserError

_LOOK_S = 0.1


@dataclass(frozen=True)
class Death:
    """The end of a process that did not do what it was to."""

    rank: int
    exit_code: int

    @property
    def was_killed(self) -> bool:
        """By a signal."""
        return self.exit_code < 0

    def __str__(self) -> str:
        if self.was_killed:
            return f"process {self.rank} was killed by {signal.Signals(-self.exit_code).name}"
        return f"process {self.rank} ended with exit code {self.exit_code}"


def run_processes(words: Sequence[str], count: int, folder: Path, look: Callable[[], None]) -> Death | None:
    """Run `python *words` in several processes; None once all have ended well, else the end of the first that has not.

    As soon as one ends otherwise, the others are ended. The first process writes to this one's streams, the others into
    files.

    Args:
        words: the program's.
        count: how many processes.
        folder: of this call alone, for those files.
        look: called again and again meanwhile; its exceptions go on, and leave the processes as they are.

    Raises:
        UserError: they cannot be started.
    """
    launch = _Launch(words, count, folder)
    launch.start()
    while launch.is_alive():
        launch.join(_LOOK_S)
        look()
    if launch.error is None:
        return None
    if isinstance(launch.error, ChildFailedError):
        return _first_death(launch.error.failures)
    raise UserError(f"the training processes could not be started: {launch.error}", exit_code=1) from launch.error


class _Launch(threading.Thread):
    """Torch's blocking call, in a thread: there it leaves signals to the command."""

    def __init__(self, words: Sequence[str], count: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.words = words
        self.error: Exception | None = None
        self.config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",  # any free port
            local_addr="127.0.0.1",
            max_restarts=0,
            monitor_interval=_LOOK_S,
            logs_specs=DefaultLogsSpecs(str(folder), redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )

    def run(self) -> None:
        # It logs what `error` holds, and traces of every process.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
        try:
            elastic_launch(self.config, sys.executable)(*self.words)
        except Exception as error:  # noqa: BLE001 - for the thread that waits for this one
            self.error = error


def _first_death(failures: dict[int, ProcessFailure]) -> Death:
    def order(rank: int) -> tuple[bool, bool, int]:
        # Torch's agent ends the others by SIGTERM. One that was killed makes them fail, whose exit codes say less.
        code = failures[rank].exitcode
        return code == -signal.SIGTERM, code >= 0, failures[rank].timestamp

    rank = min(failures, key=order)
    return Death(rank, failures[rank].exitcode)
