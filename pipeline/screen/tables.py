"""Tables for people that fit their terminal: headings break first, then the frame goes, then columns go below."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

Columns = Sequence[str | tuple[str, ...]]
"""Headings; those in a tuple stay beside each other, a number and its interval for example."""

_FRAMED_GAP, _OPEN_GAP = 3, 2


@dataclass(frozen=True)
class _Column:
    heading: str
    cells: Sequence[str]

    @property
    def cells_width(self) -> int:
        return max(map(cell_len, self.cells), default=0)

    def broken(self) -> "_Column":
        """With the heading on several lines, where it is wider than the cells."""
        width = max(self.cells_width, *map(len, self.heading.split()), 1)
        lines = textwrap.wrap(self.heading, width, break_on_hyphens=False)
        return _Column("\n".join(lines), self.cells)

    @property
    def width(self) -> int:
        return max(self.cells_width, *map(cell_len, self.heading.split("\n")))


def tables_within(width: int, columns: Columns, rows: Sequence[Sequence[str]]) -> list[Table]:
    """Lay out a table for a terminal of so many columns, as several with the first column in each if need be.

    No cell is cut off, and none is folded unless it alone, beside its row's name, is wider than the terminal.
    """
    groups = _groups(columns, rows)
    name, *others = [column for group in groups for column in group]
    if _framed_width([name, *others]) <= width:
        return [_framed(name, others)]
    groups = [[column.broken() for column in group] for group in groups]
    name, *others = [column for group in groups for column in group]
    if _framed_width([name, *others]) <= width:
        return [_framed(name, others)]
    return [_open(name, part) for part in _parts(groups, width)]


def without_empty(
    columns: Columns, rows: Sequence[Sequence[str]], empty: str
) -> tuple[list[str | tuple[str, ...]], list[list[str]]]:
    """Leave out the headings (all of a tuple's together) under which every row is `empty`."""
    kept_columns: list[str | tuple[str, ...]] = []
    kept: list[int] = []
    at = 0
    for heading in columns:
        mine = range(at, at + len(_together(heading)))
        at = mine.stop
        if any(row[index] != empty for row in rows for index in mine):
            kept_columns.append(heading)
            kept += mine
    return kept_columns, [[row[index] for index in kept] for row in rows]


def _together(heading: str | tuple[str, ...]) -> tuple[str, ...]:
    return (heading,) if isinstance(heading, str) else heading


def _groups(columns: Columns, rows: Sequence[Sequence[str]]) -> list[list[_Column]]:
    cells: Iterator[Sequence[str]] = (list(column) for column in zip(*rows, strict=True))
    return [[_Column(heading, next(cells, ())) for heading in _together(group)] for group in columns]


def _parts(groups: Sequence[Sequence[_Column]], width: int) -> list[list[_Column]]:
    """As many columns to a table as fit beside the first one, groups whole where that is possible."""
    (name,), *others = groups
    room = width - name.width
    parts: list[list[_Column]] = [[]]
    left = room
    for group in others:
        needed = _open_width(group)
        pieces = [group] if needed <= room else [[column] for column in group]
        for piece in pieces:
            if _open_width(piece) > left and parts[-1]:
                parts.append([])
                left = room
            parts[-1] += piece
            left -= _open_width(piece)
    return parts


def _framed_width(columns: Sequence[_Column]) -> int:
    return 1 + sum(column.width + _FRAMED_GAP for column in columns)


def _open_width(columns: Sequence[_Column]) -> int:
    """Of columns that stand behind another one."""
    return sum(column.width + _OPEN_GAP for column in columns)


def _framed(name: _Column, others: Sequence[_Column]) -> Table:
    return _filled(Table(box=HEAVY_HEAD), name, others)


def _open(name: _Column, others: Sequence[_Column]) -> Table:
    return _filled(Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True), name, others)


def _filled(table: Table, name: _Column, others: Sequence[_Column]) -> Table:
    # As Text, or what is in brackets would be taken for markup.
    table.add_column(Text(name.heading), no_wrap=True, overflow="fold")
    for column in others:
        table.add_column(Text(column.heading), justify="right", overflow="fold")
    for cells in zip(name.cells, *(column.cells for column in others), strict=True):
        table.add_row(*map(Text, cells))
    return table
