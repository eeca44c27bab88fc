"""Being asked to stop: a scheduler's SIGTERM or a person's Ctrl-C, answered when it suits."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PREEMPTED = 75
"""Exit code after SIGTERM: sysexits' EX_TEMPFAIL, "try again later", on which a scheduler can be told to requeue."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class StopRequest:
    """Whether somebody has asked; call it to know."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """The status to end with."""
        return INTERRUPTED if self.signal is signal.SIGINT else PREEMPTED

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGTERM and SIGINT within the block instead of dying of them; a second Ctrl-C interrupts at once.

        In another thread than the main one, where no signals arrive, nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


class Terminated(SystemExit):
    """SIGTERM has come; what is whole on disk stays. Ends the process with `PREEMPTED` unless somebody catches it."""

    def __init__(self) -> None:
        super().__init__(PREEMPTED)


@contextmanager
def terminable(*, as_interrupt: bool = False) -> Iterator[None]:
    """Have SIGTERM raise `Terminated` within the block, as Ctrl-C raises KeyboardInterrupt; a second one is ignored.

    In another thread than the main one, where no signals arrive, nothing changes.

    Args:
        as_interrupt: raise KeyboardInterrupt inside and `Terminated` from the block: where Ray waits for its workers on
            this program's behalf, it turns a SystemExit into one of its own, and lets the other through.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def end(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise KeyboardInterrupt if as_interrupt else Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        if asked:
            raise Terminated from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
