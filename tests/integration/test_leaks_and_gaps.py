"""A training on videos of a test split, or without some of the annotated ones, says so in the run and the report."""

import json

import pytest

from pipeline.runs.run_folder import RunFolder
from pipeline.settings.config import resolve
from tests.finished_run import fill_cache
from tests.html_page import read_page
from tests.in_this_process import in_this_process

CARD = """\
name: films
title: Two tasks in the form of LVU's original release
annotations: {format: lvu_csv, files: {train: "{task}/train.csv", test: "{task}/test.csv"}, durations: [durations.csv]}
tasks:
  scene: {prompt: "what is the scene of the movie?", labels: [office, hotel]}
  genre: {prompt: "what is the genre of the movie?", labels: [comedy, action]}
frame_rule: {kind: uniform, num_frames: 4, index_fps: 10}
"""
HEADER = "class_id class_name youtube_id imdb_id"
# v2 is trained on as a scene and tested on as a genre; nobody knows how long v9 is.
FILES = {
    "scene/train.csv": f"{HEADER}\n0 office v1 t\n1 hotel v2 t\n0 office v9 t\n",
    "genre/train.csv": f"{HEADER}\n0 comedy v3 t\n1 action v4 t\n",
    "genre/test.csv": f"{HEADER}\n0 comedy v2 t\n",
    "durations.csv": "videoid,duration\n" + "".join(f"v{index},3\n" for index in range(1, 5)),
}
SETTINGS = ("train.epochs=1", "train.batch_size=2", "train.trackers=[]")


@pytest.fixture
def options(tmp_path):
    for name, text in {"films.yaml": CARD, **FILES}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    given = {
        "data.dataset": str(tmp_path / "films.yaml"),
        "data.annotations": str(tmp_path),
        "cache.root": str(tmp_path / "cache"),
    }
    fill_cache(tmp_path / "cache", resolve(preset="tiny", options=given).config)
    settings = [f"--set={key}={value}" for key, value in given.items()] + [f"--set={one}" for one in SETTINGS]
    return ["--preset", "tiny", f"--set=run.folder={tmp_path}", "--name", "run", *settings]


def test_leaks_are_refused_and_when_allowed_stand_in_the_run_and_the_report(options, tmp_path, monkeypatch, capfd):
    pipeline = in_this_process(monkeypatch, capfd)
    _, err = pipeline("train", *options, status=2)
    assert "training on 2 tasks together would show 1 video that is in a test split (genre 1)" in err
    assert not (tmp_path / "run").exists()
    _, err = pipeline("train", *options, "--set", "data.allow_leakage=true")
    leak = "trained on videos that are in a test split, by task: genre 1"
    assert f"warning: {leak}" in err
    assert "warning: 1 annotated video has no samples" in err
    stamp = RunFolder.open(tmp_path / "run").stamp()
    assert (stamp["leaks"], stamp["videos_left_out"]) == ({"genre": 1}, ["v9"])
    pipeline("evaluate", "--run", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()).keys() == {"genre"}
    pipeline("report", tmp_path / "run")
    source, page = read_page(tmp_path / "run" / "report.html")
    top = source[: source.index('<section id="accuracy">')]
    assert leak in top
    assert "1 annotated video has no known length and no samples" in top
    assert not page.problems


def test_one_task_of_them_shows_nothing(options, tmp_path, monkeypatch, capfd):
    pipeline = in_this_process(monkeypatch, capfd)
    _, err = pipeline("train", *options, "--task", "genre")
    assert "test split" not in err
    assert RunFolder.open(tmp_path / "run").stamp()["leaks"] == {}
