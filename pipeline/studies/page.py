"""A study's tables, for the terminal and as one HTML page with its picture."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.reporting.pages import page_environment
from pipeline.studies.record import MemberLine, StudyRecord, TaskLine
from stages.atomic import atomic_write_text

_NONE = "-"
# Place of the column that only the page has room for.
_SETTINGS = 1
Emit = Callable[[str, Sequence[str], Sequence[Sequence[str]]], None]


def columns_of(record: StudyRecord, task: str) -> list[str]:
    """Titles of a task's table."""
    columns = ["member", "settings", "seeds", "mean", "std", f"- {record.base}", "95% over videos", "p", "seeds better"]
    if record.paper_task is not None and task == record.paper_task[1]:
        columns.append(f"paper's: {' '.join(record.paper_task)}")
    return columns


def rows_of(record: StudyRecord, task: str) -> list[list[str]]:
    """The members of a task's table, percent; a member without any result has a row that says so."""
    rows = []
    for member in record.members:
        cells = _cells(record, member, member.tasks.get(task))
        if record.paper_task is not None and task == record.paper_task[1]:
            cells.append(_NONE if member.paper is None else f"{member.paper:g}")
        rows.append(cells)
    return rows


def _cells(record: StudyRecord, member: MemberLine, line: TaskLine | None) -> list[str]:
    settings = ", ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in member.settings.items())
    done = f"{sum(one.state == 'done' for one in member.trainings)}/{len(member.trainings)}"
    if line is None:
        return [member.label, settings, done, *[_NONE] * 6]
    found = line.against_base
    interval = None if found is None else found.ci95
    return [
        member.label,
        settings,
        done,
        f"{100 * line.mean:.1f}",
        _NONE if line.std is None else f"{100 * line.std:.1f}",
        ("base" if member.name == record.base else _NONE) if found is None else f"{100 * found.difference:+.1f}",
        _NONE if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}",
        _NONE if found is None else f"{found.mcnemar_p:.2g}",
        _NONE if found is None else f"{line.seeds_better}/{line.seeds_compared}",
    ]


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 1:
        consecutive = list(value) == list(range(value[0], value[-1] + 1))
        return f"{value[0]}-{value[-1]}" if consecutive else ",".join(map(str, value))
    return str(value[0]) if isinstance(value, list | tuple) and value else str(value)


def print_tables(record: StudyRecord, emit: Emit) -> None:
    """Print the first task's table, and where there are more tasks, their means; the page has all of them in full."""
    if not record.tasks:
        return
    first, *others = record.tasks
    floor = f"{100 * record.floors[first]:.1f}"
    columns, rows = columns_of(record, first), rows_of(record, first)
    for line in (columns, *rows):
        del line[_SETTINGS]
    emit(f"{record.title}: {first}, top-1 on {record.split}, percent; floor {floor}", columns, rows)
    if others:
        floors = ["floor", *(f"{100 * record.floors[task]:.1f}" for task in others)]
        means = [[one.label, *(_mean(one.tasks.get(task)) for task in others)] for one in record.members]
        emit(f"{record.title}: mean over seeds, percent", ["member", *others], [*means, floors])


def _mean(line: TaskLine | None) -> str:
    return _NONE if line is None else f"{100 * line.mean:.1f}"


def write_page(record: StudyRecord, folder: Path, plot: Path | None, report: Path | None) -> Path:
    """Write `study.html`: what the study is, picture, tables, what failed, and a link to the runs' report."""
    environment = page_environment()
    drawn = "" if plot is None else plot.read_text(encoding="utf-8")
    page = environment.get_template("study.html").render(
        record=record,
        picture=drawn[drawn.index("<svg") :] if drawn else "",
        tables=[(task, columns_of(record, task), rows_of(record, task)) for task in record.tasks],
        failed=[(one, training) for one in record.members for training in one.trainings if training.state == "failed"],
        report=None if report is None else report.name,
    )
    target = folder / "study.html"
    atomic_write_text(target, page)
    return target
