"""`pipeline report`: one self-contained HTML page about one or more runs."""

from collections.abc import Sequence
from pathlib import Path

from pipeline.console import say
from pipeline.report import render
from pipeline.report_data import read_runs
from stages.atomic import atomic_write_text
from stages.errors import UserError

_FILE = "report.html"


def run(runs: Sequence[Path], output: Path | None) -> Path:
    """Write the page and return where it is.

    Args:
        runs: run folders; a run that is not evaluated yet gets a page that says so.
        output: HTML file; None means report.html in the first run.

    Raises:
        UserError: a folder is no run, one of its files is broken, or the page cannot be written.
    """
    target = runs[0] / _FILE if output is None else output
    if target.is_dir():
        raise UserError("this is a folder", where=target, hint="give --output the name of an HTML file")
    shown = read_runs(runs)
    page = render(shown)
    try:
        atomic_write_text(target, page)
    except OSError as error:
        raise UserError(f"the report cannot be written ({error.strerror})", where=target) from error
    say(f"report of {len(shown)} run{'s' if len(shown) > 1 else ''}: {target}")
    return target
