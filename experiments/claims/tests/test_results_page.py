"""RESULTS.md: its tables are those of the published results, which follow from the published answers."""

import json
import re
from pathlib import Path

import pytest

from experiments.claims.__main__ import result_of
from experiments.claims.trainings import read_trainings

STUDY = Path(__file__).parents[1]
RESULTS = STUDY / "results"
PAGE = (STUDY / "RESULTS.md").read_text(encoding="utf-8")
RUNS = ("claims", "claims-again")


def published(run, parse_float=float):
    return json.loads(max(RESULTS.glob(f"{run}-20*.json")).read_text(encoding="utf-8"), parse_float=parse_float)


def rows_of_page(width):
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if len(row) == width}


def points(effect):
    low, high = effect["ci95"]
    return f"{100 * effect['difference']:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"


@pytest.mark.parametrize("run", RUNS)
def test_the_published_result_follows_from_the_published_answers(run):
    # Another machine may add in another order.
    was = published(run, lambda digits: pytest.approx(float(digits), abs=1e-12))
    bootstrap = was["work"]["bootstrap"]
    _, content = result_of(read_trainings(RESULTS / f"{run}-trainings.json"), **bootstrap)
    for part in ("work", "tests", "members"):
        assert json.loads(json.dumps(content[part])) == was[part]


@pytest.mark.parametrize("run", RUNS)
def test_the_pages_verdicts_are_the_results(run):
    rows = rows_of_page(8)
    for test in published(run)["tests"]:
        above = sum(one > 0 for one in test["by_seed"])
        numbers = [*points(test), f"{above} of {len(test['by_seed'])}", f"{test['p_holm']:.2f}", test["verdict"]]
        assert rows[test["name"]][2:] == numbers, test["name"]


def test_the_pages_tasks_are_the_results():
    rows = {re.sub(r" \(.*", "", name): cells for name, cells in rows_of_page(8).items()}
    first, again = (published(run)["members"] for run in RUNS)
    for name in first["none"]["accuracy"].keys() - {"over time"}:
        expected = []
        for members, compared in ((first, ["lambda-0.1"]), (again, ["lambda-0.1", "lambda-1"])):
            expected += [f"{100 * members[one]['accuracy'][name]['mean']:.1f}" for one in ("none", "lambda-0.1")]
            expected += ["{} ({})".format(*points(members[one]["less_none"][name])) for one in compared]
        assert rows[name] == expected, name
