"""What a command was asked for is on stdout, as text or as JSON; progress and remarks are on stderr."""

import json
import re

import pytest

from tests.made_runs import add_evaluation, make_run

PROGRESS = re.compile(r"(read|verify|lengths|calibrate) [\d,]+/[\d,]+ (videos?|files?|seconds) in .*")


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
