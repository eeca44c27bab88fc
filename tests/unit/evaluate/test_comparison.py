"""Two models on the same samples: by hand, against a plain computation, and what is refused."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from pipeline.runs.results import read_predictions, result_path
from stages.errors import UserError
from stages.evaluate.comparison import compare, pair
from stages.evaluate.scoring import Prediction

SETTINGS = {"seed": 0, "resamples": 10_000}


def rows_of(right, *, task="t", videos=None, prefix="s"):
    """Predictions whose best answer is right where `right` has a 1."""
    return [
        Prediction(
            f"{prefix}{index}", f"v{videos[index] if videos else index}", task, "what?", "yes",
            ("yes" if hit else "no", "maybe"), (-0.5, -1.0),
        )
        for index, hit in enumerate(right)
    ]  # fmt: skip


# --- the numbers


def test_the_example_by_hand():
    # Eight windows of three videos. Differences of the videos: A +1 of 2, B +2 of 3, C -1 of 3.
    videos = [0, 0, 1, 1, 1, 2, 2, 2]
    first = rows_of([1, 0, 0, 0, 1, 1, 1, 0], videos=videos)
    second = rows_of([1, 1, 1, 1, 1, 1, 0, 0], videos=videos)
    one = compare(first, second, **SETTINGS)["t"]
    assert (one.n, one.num_videos) == (8, 3)
    assert (one.top1_first, one.top1_second, one.difference) == (4 / 8, 6 / 8, 2 / 8)
    assert (one.only_first, one.only_second) == (1, 3)
    # Four samples differ; twice the lower tail of a fair coin: 2 * (1 + 4) / 16.
    assert one.mcnemar_p == 10 / 16
    # Three videos are drawn in 27 ways, so the 2.5 % on each side end at the extremes: CCC -1/3, BBB 2/3.
    assert one.ci95 == (-1 / 3, 2 / 3)


def test_each_task_is_compared_on_its_own_in_the_firsts_order():
    first = rows_of([1, 1], task="b", prefix="b") + rows_of([0, 1], task="a", prefix="a")
    second = rows_of([0, 0], task="a", prefix="a") + rows_of([1, 0], task="b", prefix="b")
    found = compare(first, second, **SETTINGS)
    assert list(found) == ["b", "a"]
    assert [(one.top1_first, one.top1_second) for one in found.values()] == [(1.0, 0.5), (0.5, 0.0)]


def test_a_model_does_not_differ_from_itself():
    rows = rows_of([1, 0, 1, 1])
    one = compare(rows, rows[::-1], **SETTINGS)["t"]
    assert (one.difference, one.ci95, one.only_first, one.only_second, one.mcnemar_p) == (0.0, (0.0, 0.0), 0, 0, 1.0)


def test_a_single_video_has_no_interval():
    one = compare(rows_of([1, 0], videos=[7, 7]), rows_of([0, 0], videos=[7, 7]), **SETTINGS)["t"]
    assert one.ci95 is None
    assert one.difference == -0.5


def test_the_pairs_narrow_the_interval():
    # Both are right on the same half of the videos but one, which two independent samples would not know.
    right = [index % 2 for index in range(200)]
    better = [1, *right[1:]]
    one = compare(rows_of(right), rows_of(better), **SETTINGS)["t"]
    assert one.difference == 1 / 200
    assert 0.0 <= one.ci95[0] <= one.ci95[1] < 0.03


def plain_comparison(first, second, seed, resamples):
    by_id = {row.sample: row for row in second}
    videos = list(dict.fromkeys(row.video for row in first))
    shares = []
    for drawn in np.random.default_rng(seed).multinomial(len(videos), [1 / len(videos)] * len(videos), size=resamples):
        gain = total = 0
        for row in first:
            times = int(drawn[videos.index(row.video)])
            hit, other = row.answers[0] == row.gold, by_id[row.sample].answers[0] == row.gold
            gain += times * (other - hit)
            total += times
        shares.append(gain / total)
    shares.sort()
    ends = []
    for quantile in (0.025, 0.975):
        place = quantile * (resamples - 1)
        below = shares[int(place)]
        ends.append(below + (shares[min(int(place) + 1, resamples - 1)] - below) * (place - int(place)))
    only = [0, 0]
    for row in first:
        hit, other = row.answers[0] == row.gold, by_id[row.sample].answers[0] == row.gold
        only[0] += hit and not other
        only[1] += other and not hit
    differing = sum(only)
    tail = sum(math.comb(differing, k) for k in range(min(only) + 1)) / 2**differing
    return ends, only, min(1.0, 2 * tail)


def test_random_pairs_agree_with_a_plain_computation():
    random = np.random.default_rng(11)
    for seed in range(100):
        n = int(random.integers(2, 40))
        videos = [0, 1, *random.integers(0, 8, n - 2).tolist()]
        first = rows_of(random.integers(0, 2, n).tolist(), videos=videos)
        second = rows_of(random.integers(0, 2, n).tolist(), videos=videos)
        shuffled = [second[index] for index in random.permutation(n)]
        one = compare(first, shuffled, seed=seed, resamples=60)["t"]
        ends, only, p = plain_comparison(first, second, seed, 60)
        assert one.ci95 == pytest.approx(ends, abs=1e-12)
        assert [one.only_first, one.only_second] == only
        assert one.mcnemar_p == pytest.approx(p)


# --- what does not fit together


def test_different_samples_are_refused_and_counted():
    first, second = rows_of([1, 1, 1, 0]), rows_of([1, 0, 1, 0, 1, 1])
    with pytest.raises(UserError, match="0 only by the first, 2 only by the second, 4 by both"):
        compare(first, second, **SETTINGS)
    paired = pair(first[1:], second)
    assert (len(paired.pairs), paired.only_first, paired.only_second) == (3, 0, 3)


@pytest.mark.parametrize(
    "changed", [{"gold": "no"}, {"video": "elsewhere"}, {"task": "other"}], ids=["answer", "video", "task"]
)
def test_an_id_that_means_another_sample_is_refused(changed):
    first = rows_of([1, 1])
    other = Prediction(**{**vars(first[1]), **changed})
    with pytest.raises(UserError, match=r"1 of 2 samples have the same id in both, .* the first is 's1'"):
        compare(first, [first[0], other], **SETTINGS)


def test_another_wording_of_the_question_may_be_compared():
    first = rows_of([1, 1])
    worded = [Prediction(**{**vars(row), "question": "which?"}) for row in first]
    assert compare(first, worded, **SETTINGS)["t"].n == 2


# --- the command


def write(folder, rows, split="test", method="generate"):
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({**vars(row), "correct": row.correct}) + "\n" for row in rows]
    result_path(folder, "predictions", split, method, "jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def two(tmp_path):
    first = rows_of([1, 0, 0, 0]) + rows_of([1, 1], task="u", prefix="u")
    second = rows_of([1, 1, 1, 0]) + rows_of([0, 1], task="u", prefix="u")
    return write(tmp_path / "one", first), write(tmp_path / "two", second)


def test_the_command_shows_and_prints_what_the_function_finds(two, pipeline, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.PEOPLE.width", 80)
    out, err = pipeline("compare", *two, "--json")
    found = json.loads(out)
    expected = compare(*(read_predictions(folder / "predictions.jsonl") for folder in two), **SETTINGS)
    assert {task: one.model_dump(mode="json") for task, one in expected.items()} == found.pop("tasks")
    assert found == {
        "first": str(two[0]),
        "second": str(two[1]),
        "split": "test",
        "method": "generate",
        "samples": 6,
        "left_out": {"first": 0, "second": 0},
    }
    assert expected["t"].difference == 0.5
    assert "+50.0" in err
    assert "-50.0" in err
    assert max(len(line) for line in err.splitlines() if str(two[0].parent) not in line) <= 80


def test_comparing_loads_no_network_library():
    heavy = ["av", "ray", "torch", "transformers"]
    code = f"import sys, pipeline.commands.compare; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def refused(pipeline, *arguments):
    _, err = pipeline("compare", *arguments, status=2)
    assert err.count("\n") == 1
    return err


def test_runs_that_answered_different_samples_are_refused_unless_told(two, pipeline, tmp_path):
    fewer = write(tmp_path / "fewer", read_predictions(two[0] / "predictions.jsonl")[1:])
    said = refused(pipeline, fewer, two[1])
    assert f"0 only in {fewer}, 1 only in {two[1]}, 5 in both. Compare those in both with --common" in said
    out, err = pipeline("compare", fewer, two[1], "--common", "--json")
    found = json.loads(out)
    assert (found["samples"], found["left_out"]) == (5, {"first": 0, "second": 1})
    assert found["tasks"]["t"]["n"] == 3
    assert "compared on the 5 samples that both answered" in err


def test_runs_without_a_sample_in_common_are_refused_in_any_case(two, pipeline, tmp_path):
    other = write(tmp_path / "other", rows_of([1], prefix="x"))
    assert "no sample was answered both in" in refused(pipeline, two[0], other, "--common")


def test_absent_predictions_are_named_with_the_command(two, pipeline, tmp_path):
    said = refused(pipeline, two[0], tmp_path / "absent")
    assert f"{tmp_path / 'absent'}: no predictions are here. Run `pipeline evaluate" in said
    said = refused(pipeline, *two, "--split", "val")
    assert f"{two[0]}: no predictions of val; allowed: test generate. Run `pipeline evaluate" in said
    assert "no predictions of rank; allowed: test generate" in refused(pipeline, *two, "--method", "rank")


def test_different_splits_are_refused_and_the_shared_one_is_found(two, pipeline, tmp_path):
    rows = read_predictions(two[1] / "predictions.jsonl")
    only_val = write(tmp_path / "val", rows, split="val", method="rank")
    said = refused(pipeline, two[0], only_val)
    assert f"different splits or methods were answered: test generate in {two[0]}, val rank in {only_val}" in said
    write(two[0], rows, split="val", method="rank")
    out, _ = pipeline("compare", two[0], only_val, "--json")
    assert (json.loads(out)["split"], json.loads(out)["method"]) == ("val", "rank")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "broken JSON"),
        ('{"sample": "s9"}', "not a prediction: video: Field required"),
        (json.dumps({**vars(rows_of([1])[0]), "log_probability": [-1.0]}), "as many log-probabilities"),
        (json.dumps({**vars(rows_of([1])[0]), "answers": [], "log_probability": []}), "it needs answers"),
        (json.dumps(vars(rows_of([1])[0])), "sample 's0' is answered twice"),
    ],
    ids=["json", "key", "length", "empty", "twice"],
)
def test_a_broken_predictions_file_is_named_by_line(two, pipeline, line, said):
    path = two[1] / "predictions.jsonl"
    number = len(path.read_text().splitlines()) + 1
    path.write_text(path.read_text() + line + "\n")
    message = refused(pipeline, *two)
    assert message.startswith(f"error: {path}:{number}")
    assert said in message
