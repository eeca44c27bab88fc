"""What people see on the terminal, and what machines read.

The result of a command goes to stdout, as text or with `--json` as JSON. Progress, remarks and warnings go to stderr.
"""

import json
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from pipeline.screen.tables import Columns, tables_within
from stages.pace import Pace
from stages.wording import counted, duration, rate

# Where there is no terminal, in a file or a pipe, nothing is to be folded.
_WIDE = 10_000
# Leaves room for numbers on 80 columns.
_BAR_WIDTH = 14
# Without a terminal a bar prints its first line after so long, and from then on one so often.
FIRST_LINE_S, LINE_EVERY_S = 10.0, 60.0


def _console(*, stderr: bool) -> Console:
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=None if is_terminal else _WIDE)


PEOPLE = _console(stderr=True)
RESULTS = _console(stderr=False)
_RESULTS_ON: ContextVar[Console] = ContextVar("results_on", default=RESULTS)


@contextmanager
def beside_json(as_json: bool) -> Iterator[None]:
    """Print the results for people on stderr within the block if stdout is the machine's."""
    token = _RESULTS_ON.set(PEOPLE if as_json else _RESULTS_ON.get())
    try:
        yield
    finally:
        _RESULTS_ON.reset(token)


class Bar:
    """How far a piece of work is: `done` of `total` units, and a note of what stands behind it."""

    def __init__(self, title: str, total: int, unit: str, done: int, pace: Pace | None) -> None:
        self.title, self.total, self.unit, self.done, self.note = title, total, unit, done, ""
        self.on_move: Callable[[], None] = lambda: None
        self._pace, self._all_is_work = pace or Pace(done), pace is None
        self._first, self._began_s = done, time.monotonic()

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        self.move_to(self.done + steps, note)

    def move_to(self, done: int, note: str | None = None, *, total: int | None = None) -> None:
        """Set how much is done, and replace the note and the total."""
        self.done = done
        self._pace.look(done)
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        self.on_move()

    def state(self) -> str:
        """`12/40 videos, 1.50 videos/s, 0:00:19 left; note`: what is known of it."""
        parts, per_s = [self._counts()], self._pace.per_s
        if per_s is not None:
            parts.append(rate(per_s, self.unit))
            if self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / per_s)} left")
        return self._with_note(", ".join(parts))

    def ending(self) -> str:
        """The same when it is over: how long it took, and the rate over all of it, if all of it was work."""
        spent_s, came = time.monotonic() - self._began_s, self.done - self._first
        average = f", {rate(came / spent_s, self.unit)}" if came > 0 and self._all_is_work else ""
        return self._with_note(f"{self._counts()} in {duration(spent_s)}{average}")

    def _counts(self) -> str:
        return f"{self.done:,}/{counted(self.total, self.unit)}"

    def _with_note(self, text: str) -> str:
        return f"{text}; {self.note}" if self.note else text


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0, pace: Pace | None = None) -> Iterator[Bar]:
    """Show a bar while the block runs; on no terminal, a line now and then and one when it is done.

    Args:
        unit: one of them, in the singular.
        done: how many are done before it begins.
        pace: how fast it goes, where the work begins later than the bar; by default it begins now.
    """
    bar = Bar(title, total, unit, done, pace)
    with _drawn(bar) if PEOPLE.is_terminal else _in_lines(bar):
        yield bar


class _StateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        bar: Bar = task.fields["bar"]
        return Text(bar.ending() if task.finished else bar.state())


@contextmanager
def _drawn(bar: Bar) -> Iterator[None]:
    # On a narrow terminal it is the note's end that is cut.
    room = max(_BAR_WIDTH, PEOPLE.width - len(bar.title) - _BAR_WIDTH - 2)
    state = _StateColumn(Column(no_wrap=True, overflow="ellipsis", max_width=room))
    with Progress(TextColumn("{task.description}"), BarColumn(_BAR_WIDTH), state, console=PEOPLE) as progress:
        task = progress.add_task(bar.title, total=bar.total, completed=bar.done, bar=bar)
        bar.on_move = lambda: progress.update(task, completed=bar.done, total=bar.total)
        yield


@contextmanager
def _in_lines(bar: Bar) -> Iterator[None]:
    over = threading.Event()

    def print_lines() -> None:
        wait_s = FIRST_LINE_S
        while not over.wait(wait_s):
            say(f"{bar.title} {bar.state()}")
            wait_s = LINE_EVERY_S

    # A thread, so that a line comes within a step that takes longer than a minute, too.
    printer = threading.Thread(target=print_lines, name="progress", daemon=True)
    printer.start()
    try:
        yield
    finally:
        over.set()
        printer.join()
    # Work that was stopped or failed has a line of its own.
    say(f"{bar.title} {bar.ending()}")


def silence() -> None:
    """Show nothing from now on but errors, neither of our own nor what libraries warn of: another process does."""
    PEOPLE.quiet = RESULTS.quiet = True
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def say(line: str) -> None:
    """Print a remark or a warning for people, on stderr."""
    PEOPLE.print(line, soft_wrap=True)


def print_answer(line: str | Text) -> None:
    """Print one line of what a command was asked for, on stdout unless that is the machine's."""
    _RESULTS_ON.get().print(line, soft_wrap=True)


def table(title: str, columns: Columns, rows: Sequence[Sequence[str]]) -> None:
    """Print a table of a result, laid out for its terminal; all columns but the first are right-aligned."""
    console = _RESULTS_ON.get()
    console.print(Text(title, style="table.title"))
    for number, part in enumerate(tables_within(console, columns, rows)):
        if number:
            console.print()
        console.print(part)


def emit_json(content: Any) -> None:
    """Print one JSON object for machines."""
    sys.stdout.write(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n")


def emit_json_line(content: Any) -> None:
    """Print one JSON object on a line of its own, at once, for machines that read along."""
    sys.stdout.write(json.dumps(content, sort_keys=True, default=str) + "\n")
    sys.stdout.flush()


def set_up_logging(*, verbose: bool) -> None:
    """Send the project's warnings (all of its log with `verbose`) to stderr."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if verbose:
        for name in ("pipeline", "stages", "model"):
            logging.getLogger(name).setLevel(logging.INFO)
