"""A cache, a run and an export that version 0.1.0 wrote on 2026-12-01 (tests/assets) are still read."""

import json
import tarfile
from pathlib import Path

import pytest

from tests.in_this_process import lines_of

MADE = Path(__file__).parents[1] / "assets" / "made-2026-12-01.tar.xz"


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder of then: cache, runs/old, export, data."""
    with tarfile.open(MADE) as packed:
        packed.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("old")
def test_the_cache_is_whole_and_an_extraction_finds_nothing_to_do(pipeline):
    pipeline("cache", "verify", "cache")
    asked = ["--dataset", "synthetic", "--preset", "tiny", "--annotations", "data/annotations", "--cache", "cache"]
    printed, _ = pipeline("extract", *asked, "--dry-run", "--json")
    assert json.loads(printed)["left"]["videos"] == 0, printed


def test_the_run_answers_as_it_did(old, pipeline):
    answers = old / "runs" / "old" / "predictions.jsonl"
    was = lines_of(answers)
    pipeline("evaluate", "--run", "runs/old", "--split", "test")
    for before, now in zip(was, lines_of(answers), strict=True):
        assert now.pop("log_probability") == pytest.approx(before.pop("log_probability"), abs=1e-4)
        assert now == before


@pytest.mark.usefixtures("old")
def test_the_export_answers(pipeline):
    asked = ["--run", "export", "--question", "what is the scene of the movie?", "--json"]
    printed, _ = pipeline("predict", "data/videos/test_0000.mp4", *asked)
    assert json.loads(printed)["answers"]
