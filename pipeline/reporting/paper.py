"""The project's measured rows beside the paper's tables: every cell says where its number is from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import fmean
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter

from pipeline.reporting.departures import departures_of, in_ranges, remarks_of
from pipeline.reporting.paper_rules import deviations, misfits, obstacles
from pipeline.reporting.runs import RunData
from stages.records import FrozenRecord

State = Literal["measured", "paper", "not run", "not given"]
"""Measured here, printed in the paper, not run here, or not printed in the paper."""
_TABLES = "paper_tables.yaml"
# So many fit on a terminal of 80 columns.
_COLUMNS_AT_ONCE = 4


class Column(FrozenRecord):
    """What is measured: a task's accuracy, the recall of its class `label`, or the `mean` of the columns before it."""

    title: str
    task: str | None = None
    label: str | None = None
    mean: bool = False


class PublishedRow(FrozenRecord):
    """One model; `settings` make it, on top of the paper's preset or another; None where it cannot be measured here."""

    label: str
    paper: tuple[float | None, ...]
    settings: dict[str, Any] | None = None


class PublishedTable(FrozenRecord):
    """One table or figure of the paper, in percent."""

    id: str
    title: str
    dataset: str
    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    notes: tuple[str, ...] = Field(default=())


@dataclass(frozen=True)
class Measurement:
    """What one run measured for a cell: `correct` of `n` samples, and in percent with the Wilson interval.

    `departures` are the numbers of `pipeline.reporting.departures` that the run has.
    """

    run: str
    percent: float
    correct: int
    n: int
    ci95: tuple[float, float]
    departures: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One number of a line; `percent` is None unless it is measured or printed, and the mean of several runs.

    `departures` are those of everything that was measured for it.
    """

    state: State
    percent: float | None = None
    measurements: tuple[Measurement, ...] = ()
    departures: tuple[int, ...] = ()


@dataclass(frozen=True)
class TableLine:
    """One row of a table, the paper's or the project's own."""

    label: str
    source: Literal["paper", "this project"]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PaperTable:
    """One table laid out: the columns' titles, and the paper's lines with the project's below."""

    id: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[TableLine, ...]
    notes: tuple[str, ...]

    @property
    def measured(self) -> list[tuple[TableLine, str, Cell]]:
        return [
            (line, column, cell)
            for line in self.lines
            for column, cell in zip(self.columns, line.cells, strict=True)
            if cell.measurements
        ]


@dataclass(frozen=True)
class PaperSection:
    """All tables.

    Attributes:
        left_out: for each run that fills no cell, why.
        remarks: what differs from the recipe in those that do.
        departures: what the numbers beside measured cells mean.
    """

    tables: tuple[PaperTable, ...]
    left_out: dict[str, tuple[str, ...]]
    remarks: dict[str, tuple[str, ...]]
    departures: dict[int, str]


def published_tables() -> tuple[PublishedTable, ...]:
    """The paper's numbers."""
    text = resources.files("pipeline.reporting").joinpath(_TABLES).read_text("utf-8")
    return TypeAdapter(tuple[PublishedTable, ...]).validate_python(yaml.safe_load(text))


def lay_out(runs: Sequence[RunData]) -> PaperSection:
    """Put the runs that may stand there into the paper's tables, and name why the others may not."""
    tables = published_tables()
    blocked = {run.name: obstacles(run, {table.dataset for table in tables}) for run in runs}
    able = [run for run in runs if not blocked[run.name]]
    laid = tuple(_lay_out(table, able) for table in tables)
    used = {one.run for table in laid for line in table.lines for cell in line.cells for one in cell.measurements}
    for run in able:
        if run.name not in used:
            blocked[run.name] = _nearest_misfits(run, tables)
    remarks = {run.name: deviations(run) for run in able if run.name in used}
    cells = [cell for table in laid for line in table.lines for cell in line.cells]
    return PaperSection(
        laid,
        {name: reasons for name, reasons in blocked.items() if reasons},
        {name: lines for name, lines in remarks.items() if lines},
        remarks_of(_union(cells)),
    )


def _lay_out(table: PublishedTable, able: Sequence[RunData]) -> PaperTable:
    lines = []
    for row in table.rows:
        printed = [Cell("not given") if value is None else Cell("paper", value) for value in row.paper]
        lines.append(TableLine(row.label, "paper", tuple(printed)))
        if row.settings is not None:
            lines.append(TableLine(row.label, "this project", _measured(table, row.settings, able)))
    titles = tuple(column.title for column in table.columns)
    return PaperTable(table.id, table.title, titles, tuple(lines), table.notes)


def _measured(table: PublishedTable, settings: Mapping[str, Any], able: Sequence[RunData]) -> tuple[Cell, ...]:
    fitting = [run for run in able if not misfits(run, table.dataset, settings)]
    cells: list[Cell] = []
    for column in table.columns:
        if column.mean:
            cells.append(_mean(cells))
        else:
            found = [one for run in fitting if (one := _measurement(run, column)) is not None]
            mean = fmean(one.percent for one in found) if found else None
            cells.append(Cell("measured", mean, tuple(found), _union(found)) if found else Cell("not run"))
    return tuple(cells)


def _measurement(run: RunData, column: Column) -> Measurement | None:
    evaluation = run.evaluation("test", "generate")
    assert evaluation is not None, "a run without test results has an obstacle"
    score = evaluation.scores.get(column.task or "")
    if score is None:
        return None
    share, ci95, correct, n = score.top1, score.ci95, score.correct, score.n
    if column.label is not None:
        one = next((found for found in score.classes if found.label == column.label), None)
        if one is None or one.recall is None or one.ci95 is None:
            return None
        share, ci95, correct, n = one.recall, one.ci95, one.correct, one.n
    percent = (100 * ci95[0], 100 * ci95[1])
    return Measurement(run.name, 100 * share, correct, n, percent, departures_of(run.config))


def _union(parts: Iterable[Measurement | Cell]) -> tuple[int, ...]:
    return tuple(sorted({number for part in parts for number in part.departures}))


def _mean(cells: Sequence[Cell]) -> Cell:
    """The mean of a line's cells, where all of them are measured."""
    values = [cell.percent for cell in cells if cell.percent is not None]
    if len(values) < len(cells):
        return Cell("not run")
    return Cell("measured", fmean(values), departures=_union(cells))


def _nearest_misfits(run: RunData, tables: Sequence[PublishedTable]) -> tuple[str, ...]:
    """What keeps a run out of the row that it is nearest to."""
    found = [
        (misfits(run, table.dataset, row.settings), len(row.settings))
        for table in tables
        for row in table.rows
        if row.settings is not None and table.dataset == run.config.data.dataset
    ]
    # Of rows that are equally near, the method as the paper has it.
    return min(found, key=lambda one: (len(one[0]), one[1]))[0]


def printed(percent: float) -> str:
    """A number as the paper prints it: with one decimal, or with two where the second is not 0."""
    return f"{percent:.2f}".removesuffix("0")


def cell_text(cell: Cell) -> str:
    """A cell in a few words, for a terminal."""
    if cell.percent is None:
        return "not run" if cell.state == "not run" else "-"
    if cell.state == "paper":
        return printed(cell.percent)
    # On a line of its own, so that four columns still fit on a terminal.
    several = f"\nmean of {len(cell.measurements)}" if len(cell.measurements) > 1 else ""
    return f"{cell.percent:.1f} [{in_ranges(cell.departures)}]{several}"


def print_section(
    section: PaperSection,
    emit_table: Callable[[str, Sequence[str], Sequence[Sequence[str]]], None],
    emit_line: Callable[[str], None],
) -> None:
    """Print every table, the paper's lines and below them what was measured here, then remarks on the runs."""
    for table in section.tables:
        labels = [line.label if line.source == "paper" else "  measured here" for line in table.lines]
        for start in range(0, len(table.columns), _COLUMNS_AT_ONCE):
            part = slice(start, start + _COLUMNS_AT_ONCE)
            rows = [[label, *map(cell_text, line.cells[part])] for label, line in zip(labels, table.lines, strict=True)]
            emit_table(f"{table.title}, percent", ["paper", *table.columns[part]], rows)
    for name, reasons in section.left_out.items():
        emit_line(f"{name} fills no cell: {'; '.join(reasons)}")
    for name, lines in section.remarks.items():
        emit_line(f"{name} differs from the recipe of its row: {'; '.join(lines)}")
    if section.departures:
        emit_line("in brackets: where numbers measured here depart from MA-LMM and the paper")
    for number, remark in section.departures.items():
        emit_line(f"[{number}] {remark}")
    emit_line(
        "not run: no run given here measured it; -: the paper gives no number; "
        "docs/paper-numbers.md in the project's repository has more"
    )
