"""Progress bars, tables and lines on the terminal: people read stderr, machines read stdout."""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline.tables import Columns, tables_within

# Where there is no terminal, in a file or a pipe, nothing is to be folded.
_WIDE = 10_000
# Everything for people goes to stderr, so that `--json` leaves stdout to the machine.
PEOPLE = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _WIDE)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        return Text("" if rate is None else f"{rate:.1f} {task.fields['unit']}/s", style="cyan")


class Bar:
    """One progress bar; `advance` also says what stands behind it."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1, note: str | None = None) -> None:
        """Move on by `steps` and replace the note."""
        self._progress.advance(self._task, steps)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(title: str, total: int, unit: str, done: int = 0) -> Iterator[Bar]:
    """Show a bar with rate and time left while the block runs; on no terminal, one line at the end."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=PEOPLE,
    ) as progress:
        yield Bar(progress, progress.add_task(title, total=total, completed=done, unit=unit, note=""))


def say(line: str) -> None:
    """Print one line for people."""
    PEOPLE.print(line, markup=False, soft_wrap=True)


def print_answer(line: str) -> None:
    """Print the one line that a command was asked for, on stdout."""
    sys.stdout.write(line + "\n")


def table(title: str, columns: Columns, rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people, laid out for their terminal; all columns but the first are right-aligned."""
    PEOPLE.print(Text(title, style="table.title"))
    for number, part in enumerate(tables_within(PEOPLE.width, columns, rows)):
        if number:
            say("")
        PEOPLE.print(part)


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
