"""docs/method.md and the report list the same departures from MA-LMM and the paper, and which of them a run has."""

from pathlib import Path

import pytest

from pipeline.reporting.departures import departures, departures_of, in_ranges, is_as_there, remarks_of
from pipeline.settings.config import resolve, valid_keys

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "method.md").read_text(encoding="utf-8")
HEADER = "| | what | there | here | why | effect | switch |"
NUMBERS = {one.name: number for number, one in enumerate(departures(), start=1)}
RUNS = [("lvu", "year"), ("lvu", "relationship"), ("msvd_qa", "qa")]


def row_of(number, one):
    """A departure as the page has it."""
    switch = ", ".join(f"`{key}={' or '.join(map(str, values))}`" for key, values in one.switch.items()) or "-"
    return (str(number), one.name, f"{one.there} ({one.source})", one.here, one.why, one.effect, switch)


def rows_of_the_page():
    section = PAGE.partition("## Where this departs from MA-LMM and the paper")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == HEADER
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def config_of(dataset, task, *overrides):
    return resolve(options={"data.dataset": dataset, "data.task": task}, overrides=overrides).config


def names_of(*settings):
    return {departures()[number - 1].name for number in departures_of(config_of(*settings))}


def test_the_page_has_the_reports_list():
    assert rows_of_the_page() == [row_of(number, one) for number, one in enumerate(departures(), start=1)]


def test_the_report_can_give_each_departure_of_the_page():
    shown = sorted({number for run in RUNS for number in departures_of(config_of(*run))})
    assert list(remarks_of(shown)) == [int(row[0]) for row in rows_of_the_page()]
    for row in rows_of_the_page():
        remark = remarks_of([int(row[0])])[int(row[0])]
        assert remark.startswith(f"{row[1]}. Here: {row[3]}. There: ")
        assert remark.endswith(f"Effect: {row[5]}")


def test_every_setting_that_is_named_exists_and_every_departure_is_named_once():
    keys = set(valid_keys())
    assert len(NUMBERS) == len(departures())
    for one in departures():
        assert {*one.when, *one.switch} <= keys, one.name


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("train.best_of_equals=first", "best epoch among equals"),
        ("train.answer_loss_samples=16", "mean of the answer loss"),
        ("data.frame_offset=-1", "frame times"),
        ("data.prompts=paper", "wording of the question"),
        ("qformer.start=somewhere.pth", "weights at the start"),
    ],
)
def test_a_switch_takes_its_departure_away_and_no_other(setting, name):
    assert names_of("lvu", "year") - names_of("lvu", "year", setting) == {name}
    assert names_of("lvu", "year", setting) < names_of("lvu", "year")


def test_some_concern_one_data_set_or_task_alone():
    year, relationship, msvd = (names_of(*run) for run in RUNS)
    assert year - relationship == {"wording of the question"}
    assert msvd - year == {name for name in NUMBERS if name.endswith("on MSVD-QA")}
    assert "beam scores" in year - msvd


def test_only_the_values_of_a_switch_do_as_it_is_done_there():
    assert is_as_there("train.answer_loss_samples", 32)
    assert not is_as_there("train.answer_loss_samples", 8)
    assert not is_as_there("train.epochs", 16)


def test_numbers_are_shown_in_ranges():
    assert in_ranges([]) == ""
    assert in_ranges([4]) == "4"
    assert in_ranges([1, 2, 3, 5, 9, 10]) == "1-3,5,9-10"
