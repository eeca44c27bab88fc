"""Tables on the terminal: what names a row is never cut, and text is never taken for markup."""

from pipeline.console import table

COLUMNS = ["task", "second - first", "95% over videos", "only second right"]
ROWS = [[name, "+10.0", "-12.5 to +37.5", "1234567"] for name in ("relationship", "way_speaking")]


def test_on_a_narrow_terminal_no_name_and_no_number_is_cut_off(capsys, monkeypatch):
    monkeypatch.setattr("pipeline.console.PEOPLE.width", 44)
    table("a title", COLUMNS, ROWS)
    shown = capsys.readouterr().err
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= 44
    for name in ("relationship", "way_speaking"):
        assert name in shown


def test_what_stands_in_brackets_is_text(capsys):
    table("[/b] of [red]", ["[/i]"], [["[bold] and no markup"]])
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("[/b] of [red]", "[/i]", "[bold]"))
