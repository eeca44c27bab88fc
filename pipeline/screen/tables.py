"""Tables for people that fit their terminal: headings break first, then the frame goes, then columns go below."""

import textwrap
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from rich.box import HEAVY_HEAD, SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Columns = Sequence[str | tuple[str, ...]]
"""Headings; those in a tuple stay beside each other, a number and its interval for example."""

_FRAMED: dict[str, Any] = {"box": HEAVY_HEAD}
_OPEN: dict[str, Any] = {"box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "collapse_padding": True}
# What rich measures a table within, to learn how wide it would like to be.
_WITHOUT_LIMIT = 100_000

# A heading and the cells below it.
_Column = tuple[str, Sequence[str]]


def tables_within(console: Console, columns: Columns, rows: Sequence[Sequence[str]]) -> list[Table]:
    """Lay out a table for a terminal, as several with the first column in each if need be.

    No cell is cut off, and none is folded unless it, beside its row's name, is wider than the terminal.
    """
    cells: Iterator[Sequence[str]] = zip(*rows, strict=True)
    groups = [[(heading, next(cells, ())) for heading in _together(group)] for group in columns]
    broken = [[(_broken(*column), column[1]) for column in group] for group in groups]
    for layout in (groups, broken):
        table = _table(list(chain(*layout)), _FRAMED)
        if _fits(console, table):
            return [table]
    (name,), *others = broken
    parts: list[list[_Column]] = [[name]]
    for group in others:
        pieces = [group] if _fits(console, _table([name, *group], _OPEN)) else [[column] for column in group]
        for piece in pieces:
            if len(parts[-1]) > 1 and not _fits(console, _table([*parts[-1], *piece], _OPEN)):
                parts.append([name])
            parts[-1] += piece
    return [_table(part, _OPEN) for part in parts]


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


def _broken(heading: str, cells: Sequence[str]) -> str:
    """The heading on several lines, where it is wider than the cells."""
    width = max(1, *map(cell_len, cells), *map(len, heading.split()))
    return "\n".join(textwrap.wrap(heading, width, break_on_hyphens=False))


def _table(columns: Sequence[_Column], style: dict[str, Any]) -> Table:
    (name, _), *others = columns
    table = Table(**style)
    # As Text, or what is in brackets would be taken for markup.
    table.add_column(Text(name), no_wrap=True, overflow="fold")
    for heading, _ in others:
        table.add_column(Text(heading), justify="right", overflow="fold")
    for row in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def _fits(console: Console, table: Table) -> bool:
    return console.measure(table, options=console.options.update(width=_WITHOUT_LIMIT)).maximum <= console.width
