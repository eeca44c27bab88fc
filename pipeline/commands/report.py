"""`pipeline report`: one self-contained HTML page about one or more runs, and their rows beside the paper's tables."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.reporting.page import render
from pipeline.reporting.paper import lay_out, print_section
from pipeline.reporting.runs import read_runs
from pipeline.screen.console import beside_json, emit_json, print_answer, table
from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.wording import counted

_FILE = "report.html"


def run(runs: Sequence[Path], output: Path | None, *, paper: bool = False, as_json: bool = False) -> Path | None:
    """Write the page and return where it is; None where there is nothing to write it for.

    Args:
        runs: run folders; a run that is not evaluated yet gets a page that says so. May be empty with `paper`.
        output: HTML file; None means report.html in the first run, and no page without a run.
        paper: lay the runs beside the paper's tables too, on the page and on the terminal.

    Raises:
        UserError: a folder is no run, one of its files is broken, or the page cannot be written.
    """
    if not runs and not paper:
        raise UserError("no run is given", where="RUNS", hint="name the folder of a run, or add --paper")
    target = runs[0] / _FILE if output is None and runs else output
    if target is not None and target.is_dir():
        raise UserError("this is a folder", where=target, hint="give --output the name of an HTML file")
    shown = read_runs(runs)
    section = lay_out(shown) if paper else None
    if target is not None:
        page = render(shown, section)
        try:
            atomic_write_text(target, page)
        except OSError as error:
            raise UserError(f"the report cannot be written ({error.strerror})", where=target) from error
    if as_json:
        tables = {} if section is None else {"paper": asdict(section)}
        emit_json({"report": None if target is None else str(target), **tables})
    with beside_json(as_json):
        if section is not None:
            print_section(section, table, print_answer)
        if target is not None:
            of_runs = f" of {counted(len(shown), 'run')}" if shown else ""
            print_answer(f"report{of_runs}: {target}")
    return target
