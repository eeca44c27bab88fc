"""docs/paper-numbers.md: every snippet gives the output printed below it, and the numbers are those of the tables."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from pipeline.reporting.paper import published_tables
from stages.data.cards import load_card
from stages.evaluate.metrics import wilson_interval

ROOT = Path(__file__).resolve().parents[3]
ANNOTATIONS = ROOT.parent / "shared" / "data" / "lvu" / "annotation"
PAGE = (ROOT / "docs" / "paper-numbers.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", PAGE, flags=re.DOTALL)
NEEDS_FILES = [source for source, _ in SNIPPETS if "data/lvu/annotations" in source]


def run_snippets(sources):
    """What each of the snippets prints, and the names that they leave behind."""
    names, printed = {}, []
    for source in sources:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(source, names)
        printed.append(out.getvalue())
    return printed, names


def test_every_snippet_is_followed_by_its_output():
    assert len(SNIPPETS) == PAGE.count("```python") == PAGE.count("```text") == 6
    assert [source for source, _ in SNIPPETS][-1:] == NEEDS_FILES


def test_the_arithmetic_gives_what_is_printed():
    plain = [pair for pair in SNIPPETS if pair[0] not in NEEDS_FILES]
    printed, _ = run_snippets([source for source, _ in plain])
    assert printed == [output for _, output in plain]


@pytest.mark.skipif(not ANNOTATIONS.is_dir(), reason="MA-LMM's annotation files are not here")
def test_the_counts_from_the_annotation_files_are_what_is_printed(tmp_path, monkeypatch):
    (tmp_path / "data" / "lvu").mkdir(parents=True)
    (tmp_path / "data" / "lvu" / "annotations").symlink_to(ANNOTATIONS)
    monkeypatch.chdir(tmp_path)
    printed, _ = run_snippets([source for source, _ in SNIPPETS])
    assert printed[-1] == SNIPPETS[-1][1]


def test_the_snippets_numbers_are_those_of_the_tables_and_the_card():
    _, names = run_snippets([source for source, _ in SNIPPETS[:2]])
    (table,) = (table for table in published_tables() if table.id == "table-1")
    rows = {row.label: row.paper[:7] for row in table.rows}
    assert tuple(map(float, names["MA_LMM"].values())) == rows["MA-LMM"]
    assert tuple(map(float, names["DIFF_LMM"].values())) == rows["Diff-LMM"]
    expected = load_card("lvu").expected
    for counts, split, kind in (
        ("TEST_WINDOWS", "test", "samples"),
        ("VIDEOS", "test", "videos"),
        ("VAL_WINDOWS", "val", "samples"),
    ):
        assert names[counts] == {task: getattr(by_split[split], kind) for task, by_split in expected.items()}
    assert names["wilson"](63, 91) == pytest.approx([100 * end for end in wilson_interval(63, 91)], abs=1e-4)
