"""Tables on the terminal: nothing in a row is cut or folded, and text is never taken for markup."""

import os
import pty
import subprocess
import sys
import termios

import pytest

from pipeline.screen.console import table

COLUMNS = ["task", "n", ("difference", "95% over videos"), "only second right"]
ROWS = [[name, "120", "+10.0", "-12.5 to +37.5", "1234567"] for name in ("relationship", "way_speaking")]
SHOW = f"from pipeline.screen.console import table; table('a title', {COLUMNS!r}, {ROWS!r})"


@pytest.mark.parametrize(("width", "tables"), [(100, 1), (80, 1), (50, 2), (36, 3)])
def test_on_a_narrow_terminal_columns_go_below_and_every_cell_is_whole(width, tables, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.RESULTS.width", width)
    table("a title", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    for row in ROWS:
        mine = [line for line in lines if row[0] in line]
        assert len(mine) == tables
        assert all(any(cell in line for line in mine) for cell in row)


def test_a_number_and_its_interval_stay_beside_each_other(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.RESULTS.width", 40)
    table("a title", COLUMNS, ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert all("-12.5 to +37.5" in line for line in lines if "+10.0" in line)


def test_a_cell_too_wide_for_the_terminal_is_folded_and_not_cut(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.RESULTS.width", 30)
    table("a title", ["run", "folder"], [["first", "runs/" + "abcdefghij" * 5]])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 30
    assert "runs/" + "abcdefghij" * 5 in "".join(line.removeprefix("first").strip() for line in lines)


def test_without_a_terminal_tables_are_wide_and_on_one_they_fit_it():
    command = [sys.executable, "-c", SHOW]
    plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=plain).stdout
    assert all("│" in line and "1234567" in line for line in piped.splitlines() if "relationship" in line)
    assert "difference ┃ 95% over videos ┃ only second right" in piped
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 50))
    with subprocess.Popen(command, stdout=theirs, env={**plain, "TERM": "xterm"}) as process:
        os.close(theirs)
        shown = os.read(ours, 1 << 16)
        while chunk := _read(ours):
            shown += chunk
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().replace("\r", "").splitlines()
    assert sum("relationship" in line for line in lines) == 2


def test_what_stands_in_brackets_is_text(capsys):
    table("[/b] of [red]", ["[/i]"], [["[bold] and no markup"]])
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[/b] of [red]", "[/i]", "[bold]"))


def _read(terminal):
    try:
        return os.read(terminal, 1 << 16)
    except OSError:  # nobody has its other side open any more
        return b""
