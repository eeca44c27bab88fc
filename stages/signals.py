"""Being asked to stop: a scheduler's SIGTERM or a person's Ctrl-C, at any moment of a command.

A command has no handlers for the two signals. Ray puts its own in their place from C++ while it starts, at a moment
that nobody can know, and that one aborts the process. Instead both signals are blocked in every thread, and a thread
of ours takes them from the kernel. It interrupts the main thread as Ctrl-C would, by KeyboardInterrupt, unless what
runs there has asked for it and stops by itself (`StopRequest`).
"""

import atexit
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, NoReturn

from stages.process_tree import adopt_orphans, end_descendants

PREEMPTED = 75
"""Exit code after SIGTERM: sysexits' EX_TEMPFAIL, "try again later", on which a scheduler can be set to requeue."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

AGAIN = "run the same command again"
"""What an interrupted command advises where nothing else is known of it."""
GO_ON = f"what is committed stays, {AGAIN} to go on"
"""The same of a command that commits its work bit by bit."""

# Wakes the main thread out of whatever it waits in. It does nothing by default, and libraries do not touch it.
_WAKE = signal.SIGURG
_WAKE_AGAIN_S = 0.05
# What has not ended by then is ended. Schedulers wait about 30 s between SIGTERM and SIGKILL.
_GRACE_S = 10.0
_SHOW_CURSOR = "\x1b[?25h"
# An exception in the middle of one of these would leave half a module, or a process that nobody knows of yet.
_INDIVISIBLE = (
    "<frozen importlib._bootstrap>",
    "multiprocessing/popen_spawn_posix.py",
    "multiprocessing/resource_tracker.py",
)


class StopRequest:
    """Whether somebody has asked; call it to know."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        return _exit_code(self.signal)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note signals within the block instead of being interrupted by them; a second Ctrl-C interrupts at once.

        Only the process of a command takes signals (`run`); in others nothing is noted.
        """
        _command.listener = self
        try:
            yield
        finally:
            _command.listener = None

    def note(self, number: signal.Signals) -> bool:
        """Note a signal; False if it is to interrupt."""
        if self.signal is signal.SIGINT and number is signal.SIGINT:
            return False
        self.signal = number
        return True

    def insist(self) -> None:
        """Be interrupted after all, where a signal came too late for the work to notice it."""
        if self.signal is not None:
            _command.listener = _command.noted = None
            os.kill(os.getpid(), self.signal)
            while True:
                signal.pause()


class Stopped(SystemExit):
    """A command has ended because it was asked to, and has printed so itself."""


@contextmanager
def left_to_this_process() -> Iterator[None]:
    """Have Python processes that are started in the block by multiprocessing leave both signals to this one."""
    both = (signal.SIGTERM, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, both)
    # Python's helper process, which comes with the first of them, unblocks both here once it has started.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def interruption_note(how_far: Callable[[], str]) -> Iterator[None]:
    """Have the line about an interruption in the block go on with these words."""
    before, _command.how_far = _command.how_far, how_far
    yield
    _command.how_far = before  # kept where the block is interrupted


def leave_line_to_another() -> None:
    """Print no line about an interruption: another process of the same work does."""
    _command.has_printed()


def is_interrupted() -> bool:
    """Whether the command is to end because of a signal; what fails from then on is no news."""
    return _command.signal is not None or _command.noted is not None


def run(command: Callable[[], None]) -> None:
    """Run the command of this process, to its end or until a signal asks to stop.

    Then the process exits with `PREEMPTED` or `INTERRUPTED`, prints one line about it, and leaves no process that
    it has started, nor one that those have.
    """
    try:
        try:
            _take_signals()
            command()
        finally:
            _command.is_over = True
    except Stopped:
        _command.has_printed()
        raise
    except BaseException as end:  # whatever an interruption has become on its way
        if not _command.was_asked_before(end):
            raise
    if _command.signal is not None:
        _command.print_line()
        sys.exit(_exit_code(_command.signal))


def _exit_code(number: signal.Signals | None) -> int:
    return INTERRUPTED if number is signal.SIGINT else PREEMPTED


class _Command:
    """What this process's command has been asked, and how far that has been done."""

    def __init__(self) -> None:
        self.listener: StopRequest | None = None
        self.noted: signal.Signals | None = None
        self.signal: signal.Signals | None = None
        self.is_raised = self.is_over = False
        self.how_far: Callable[[], str] = lambda: f"; {AGAIN}"
        self._printed = threading.Lock()

    def hears(self, number: signal.Signals) -> bool:
        """Whether what runs has noted a signal, this one or one before, and will stop by itself."""
        if self.listener is None:
            return self.noted is not None and not self.is_over
        if not self.listener.note(number):
            return False
        self.noted = number
        return True

    def was_asked_before(self, end: BaseException) -> bool:
        """Whether the command ended so because of a signal."""
        if self.signal is None and not (isinstance(end, SystemExit) and not end.code):
            # What was to stop by itself could not, as where Ray's processes were ended, too.
            self.signal = self.noted
        return self.signal is not None

    def interrupt(self, _number: int, frame: FrameType | None) -> None:
        """The handler of `_WAKE`, in the main thread."""
        if self.signal is None or self.is_raised or self.is_over or _is_indivisible(frame):
            return
        self.is_raised = True
        logging.disable()  # what is heard of processes that end now is no news
        raise KeyboardInterrupt

    def has_printed(self) -> bool:
        """Whether the line has been printed; from now on it has."""
        return not self._printed.acquire(blocking=False)

    def print_line(self) -> None:
        if not self.has_printed():
            what = "interrupted" if self.signal is signal.SIGINT else "stopped by SIGTERM"
            cursor = _SHOW_CURSOR if sys.stderr.isatty() else ""
            os.write(2, f"{cursor}{what}{self.how_far()}\n".encode())


_command = _Command()


def _is_indivisible(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith(_INDIVISIBLE):
            return True
        frame = frame.f_back
    return False


def _take_signals() -> None:
    # One that is ignored, as Ctrl-C in the background of a script, stays so.
    taken = {number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN}
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    for number in taken:  # should a library let it through
        signal.signal(number, partial(_put_back, taken))
    os.register_at_fork(after_in_child=partial(_leave_to_the_command, taken))
    signal.signal(_WAKE, _command.interrupt)
    sys.unraisablehook = partial(_again_if_lost, sys.unraisablehook)
    adopt_orphans()
    atexit.register(_end_what_is_left)  # the first to be registered is the last to be called
    threading.Thread(target=_answer, args=(taken, threading.get_ident()), daemon=True).start()


def _leave_to_the_command(taken: Collection[signal.Signals]) -> None:
    """In Ray's own processes, before they begin."""
    # A signal to the command's whole group would take them from it before it has ended in order.
    os.setpgid(0, 0)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, taken)  # Ray ends them by SIGTERM


def _put_back(taken: Collection[signal.Signals], number: int, _frame: FrameType | None) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, taken)
    os.kill(os.getpid(), number)


def _answer(taken: Collection[signal.Signals], main_thread: int) -> None:
    """Wait for a signal that is not noted, and see that the command ends by it."""
    number = signal.Signals(signal.sigwait(taken))
    while _command.hears(number):
        number = signal.Signals(signal.sigwait(taken))
    _command.signal = number
    until = time.monotonic() + (0.0 if _command.is_over else _GRACE_S)
    while time.monotonic() < until:
        if not _command.is_raised:
            signal.pthread_kill(main_thread, _WAKE)
        time.sleep(_WAKE_AGAIN_S)
    _command.print_line()
    _end_now()


def _again_if_lost(hook: Callable[[Any], None], lost: Any) -> None:
    """Python has dropped an exception, in a finalizer or a callback: if it was the interruption, raise it again."""
    if _command.is_raised and issubclass(lost.exc_type, KeyboardInterrupt):
        _command.is_raised = False
    else:
        hook(lost)


def _end_what_is_left() -> None:
    if is_interrupted():
        with suppress(OSError):
            sys.stdout.flush()
        _end_now()
    # The interpreter now gives the system's own answer back to signals that have a handler, and the work is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_now() -> NoReturn:
    end_descendants()
    # Not by way of the interpreter's own end, in which threads of Ray's that were interrupted have crashed.
    os._exit(_exit_code(_command.signal or _command.noted))
