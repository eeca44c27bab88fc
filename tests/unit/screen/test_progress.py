"""Progress without a terminal: lines in time, with a rate that batches do not inflate; counts as messages say them."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from pipeline.runs.cached_data import warn_of_absent_labels
from pipeline.screen.console import beside_json, print_answer, progress_bar, say, table
from stages.data.manifest import Sample
from stages.pace import Pace
from stages.wording import counted, duration, rate


@pytest.fixture
def clock(monkeypatch):
    """What `time.monotonic` says in `stages.pace`; a list of one number."""
    now_s = [0.0]
    monkeypatch.setattr("stages.pace.time.monotonic", lambda: now_s[0])
    return now_s


# --- lines


def test_lines_come_within_a_long_step_too_and_say_how_fast_and_how_long_yet(monkeypatch, capsys):
    monkeypatch.setattr("pipeline.screen.console.FIRST_LINE_S", 0.1)
    monkeypatch.setattr("pipeline.screen.console.LINE_EVERY_S", 0.2)
    with progress_bar("read", 4, "video", done=1) as bar:
        time.sleep(0.25)
        bar.advance(note="two are damaged")
        time.sleep(0.4)
    shown = capsys.readouterr()
    assert shown.out == ""
    first, *within, last = shown.err.splitlines()
    assert first == "read 1/4 videos"
    assert len(within) >= 1
    assert all(line.startswith("read 2/4 videos, ") for line in within)
    assert all(line.endswith(" left; two are damaged") and "videos/s" in line for line in within)
    assert last.startswith("read 2/4 videos in 0:00:01, ")


def test_work_that_fails_leaves_the_last_line_to_what_stopped_it(capsys):
    with pytest.raises(ValueError, match="broken"), progress_bar("read", 4, "video"):
        raise ValueError("broken")
    assert capsys.readouterr().err == ""
    assert "progress" not in {thread.name for thread in threading.enumerate()}


def test_a_short_piece_of_work_has_one_line(capsys):
    with progress_bar("read", 1, "video") as bar:
        bar.advance()
    assert capsys.readouterr().err.startswith("read 1/1 video in 0:00:00")


@pytest.mark.parametrize("width", [50, 80, 200])
def test_on_a_terminal_a_bar_is_one_line_of_which_the_note_is_cut(width, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("pipeline.screen.console.PEOPLE", Console(file=screen, force_terminal=True, width=width))
    with progress_bar("extract", 7200, "frame") as bar:
        bar.move_to(3600, "3 of 12 videos done, networks wait 19%")
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue()).splitlines()
    assert all(len(line) <= width for line in drawn)
    shown = [line for line in drawn if "3,600/7,200 frames, " in line]
    assert shown
    assert all(line.lstrip("\r").startswith("extract ━") for line in shown)
    assert ("networks wait 19%" in shown[-1]) == (width == 200)


# --- rates


def test_answers_that_come_together_are_spread_over_the_time_that_they_took(clock):
    pace = Pace(0)
    for batch in range(1, 4):
        clock[0] = 4.0 * batch
        for sample in range(32):
            pace.look(32 * (batch - 1) + sample + 1)
            clock[0] += 1e-5
        assert pace.per_s == pytest.approx(8.0, rel=0.01)


def test_a_rate_is_that_of_the_last_minute(clock):
    pace = Pace(0)
    for second in range(1, 201):
        clock[0] = float(second)
        pace.look(second if second <= 100 else 100 + 5 * (second - 100))
    assert pace.per_s == pytest.approx(5.0)


def test_steps_that_take_minutes_have_a_rate(clock):
    pace = Pace(0)
    for step in (1, 2, 3):
        clock[0] = 150.0 * step
        pace.look(step)
        assert pace.per_s == pytest.approx(1 / 150)


def test_nothing_done_has_no_rate(clock):
    pace = Pace(7)
    clock[0] = 5.0
    pace.look(7)
    assert pace.per_s is None


@pytest.mark.parametrize(
    ("per_s", "shown"),
    [
        (70301.7, "70,302 samples/s"),
        (123.4, "123 samples/s"),
        (43.21, "43.2 samples/s"),
        (5.312, "5.31 samples/s"),
        (0.5, "30.0 samples/min"),
        (0.001, "3.60 samples/h"),
        (1e-5, "0.04 samples/h"),
    ],
)
def test_a_rate_has_three_digits_and_a_unit_that_suits_it(per_s, shown):
    assert rate(per_s, "sample") == shown


# --- counts


@pytest.mark.parametrize(
    ("number", "nouns", "shown"),
    [
        (0, ("video",), "0 videos"),
        (1, ("video",), "1 video"),
        (1234, ("video",), "1,234 videos"),
        (1, ("process", "processes"), "1 process"),
        (2, ("process", "processes"), "2 processes"),
        (1, ("file is", "files are"), "1 file is"),
        (1.0, ("GPU",), "1 GPU"),
        (0.5, ("GPU",), "0.5 GPUs"),
    ],
)
def test_a_noun_agrees_with_its_count(number, nouns, shown):
    assert counted(number, *nouns) == shown


def test_a_duration_is_hours_minutes_and_seconds():
    assert (duration(3723.4), duration(59.6), duration(None)) == ("1:02:03", "0:01:00", "unknown time")


@pytest.mark.parametrize(
    ("askers", "ending"),
    [
        (0, "has the answer 'office'\n"),
        (1, "has the answer 'office', which 1 of its other samples asks for\n"),
        (2, "has the answer 'office', which 2 of its other samples ask for\n"),
    ],
)
def test_who_asks_for_a_label_that_nothing_teaches_is_said_where_somebody_does(askers, ending, capsys):
    def sample(number, split, answer):
        return Sample(
            id=f"{split}{number}",
            video="v",
            task="scene",
            question="where?",
            answer=answer,
            split=split,
            candidates=("school", "office"),
            times_s=(0.0,),
        )

    train = [sample(0, "train", "school")]
    warn_of_absent_labels(train, [*train, *(sample(number, "val", "office") for number in range(askers))])
    (line,) = capsys.readouterr().err.splitlines(keepends=True)
    assert line.startswith("warning: no training sample of task 'scene' ")
    assert line.endswith(ending)


# --- streams


def test_results_go_to_stdout_and_remarks_to_stderr(capsys):
    say("a remark")
    print_answer("a result with [brackets] and :cat:")
    table("a table", ["name", "n"], [["row", "1"]])
    shown = capsys.readouterr()
    assert shown.err == "a remark\n"
    assert shown.out.startswith("a result with [brackets] and :cat:\na table\n")
    assert "row" in shown.out


def test_beside_json_results_leave_stdout_to_it(capsys):
    with beside_json(True):
        print_answer("a result")
        table("a table", ["name", "n"], [["row", "1"]])
        with beside_json(False):  # a command that another one runs
            print_answer("of a part")
    print_answer("after")
    shown = capsys.readouterr()
    assert shown.out == "after\n"
    assert all(text in shown.err for text in ("a result", "a table", "of a part"))
