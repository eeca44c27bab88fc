"""What a command was asked for is on stdout, as text or as JSON; progress and remarks are on stderr."""

import json
import re

import pytest

from tests.made_runs import add_evaluation, make_run
from tests.video_files import RATE_FPS, write_video

PROGRESS = re.compile(r"(read|verify|lengths|compare|calibrate) [\d,]+/[\d,]+ (videos?|files?|seconds) in .*")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluated runs."""
    folder = tmp_path_factory.mktemp("runs")
    made = [make_run(folder, name) for name in ("first", "second")]
    for run in made:
        add_evaluation(run)
    return [run.path for run in made]


@pytest.fixture
def calls(world, runs, tmp_path):
    """The commands that are asked for something: arguments, and words of the result."""
    data = [*world.options(), "--dataset", "synthetic"]
    return {
        "doctor": (["doctor", *data], "annotations train"),
        "plan": (["plan", *data, "--no-calibrate"], "distinct frames"),
        "compare": (["compare", *runs], "McNemar"),
        "report": (["report", runs[0], "--output", tmp_path / "page.html"], "report of 1 run: "),
        "paper": (["report", "--paper"], "Table 3: MSVD-QA"),
        "info": (["cache", "info", world.cache], "24 videos, "),
        "verify": (["cache", "verify", world.cache], "every video is whole"),
        "prune": (["cache", "prune", world.cache, "--dry-run"], "0 leftovers, 0.000 GB would be removed"),
        "config": (["config", "show", "--preset", "tiny"], "train.lr"),
        "again": (["extract", *data], "24 of 24 videos done, 0 failed"),
    }


NAMES = ["doctor", "plan", "compare", "report", "paper", "info", "verify", "prune", "config", "again"]


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_on_stdout_and_as_json_nothing_else_is(name, calls, pipeline):
    call, words = calls[name]
    out, err = pipeline(*call)
    assert words in out
    assert words not in err
    remarks = [line for line in err.splitlines() if not PROGRESS.fullmatch(line) and not line.startswith("bundled:")]
    assert remarks == []
    out, _ = pipeline(*call, "--json")
    json.loads(out)


# --- one long video

FRAMES = 600
CARD = f"""\
name: film
title: One long film
annotations: {{format: jsonl, file: samples.jsonl}}
tasks: {{scene: {{labels: [office, street]}}}}
frame_rule: {{kind: uniform, num_frames: {FRAMES}, index_fps: 10}}
"""


def test_frames_are_counted_within_one_long_video(tmp_path, pipeline, monkeypatch):
    """Small passes, so that there are many; the video ends once, and much is said before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.screen.console.FIRST_LINE_S", 0.2)
    monkeypatch.setattr("pipeline.screen.console.LINE_EVERY_S", 0.2)
    write_video(tmp_path / "film.mp4", count=FRAMES // 10 * RATE_FPS, height=48, width=64)
    (tmp_path / "film.yaml").write_text(CARD)
    sample = {"video": "film", "duration_s": FRAMES / 10, "task": "scene", "question": "where?", "answer": "office"}
    (tmp_path / "samples.jsonl").write_text(json.dumps({**sample, "split": "train"}))
    where = ["--dataset", "film.yaml", "--annotations", ".", "--videos", ".", "--cache", "cache"]
    out, err = pipeline("extract", "--preset", "tiny", *where, "--set", "extract.batch_size=4", "--json-lines")
    *events, summary = map(json.loads, out.splitlines())
    assert (summary["event"], summary["frames_now"]) == ("summary", FRAMES)
    within = [one for one in events[:-2] if one["event"] == "progress"]
    encoded = [one["frames_encoded"] for one in within]
    assert encoded == sorted(encoded)
    assert any(0 < count < FRAMES for count in encoded)
    assert all(one["frames_encoded"] + one["frames_left"] == one["frames_planned"] == FRAMES for one in within)
    assert {(one["done"], one["left"], one["frames"]) for one in within} == {(0, 1, 0)}
    last = next(one for one in reversed(events) if one["event"] == "progress")
    assert (last["done"], last["frames"], last["frames_encoded"], last["frames_left"]) == (1, FRAMES, 0, 0)
    shape = rf"extract \d+/{FRAMES} frames, [\d.]+ frames/(s|min), 0:\d\d:\d\d left; 0 of 1 video done"
    counts = {line.split("/")[0] for line in err.splitlines() if re.fullmatch(shape, line)}
    assert len(counts) >= 1, err
