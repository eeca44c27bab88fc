"""The report of runs written in the real file formats: what it shows, what it escapes, what it never fetches."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.commands import report
from pipeline.reporting.mistakes import choose_examples
from pipeline.reporting.plots import Curve, curves_plot, dash_of, thin
from pipeline.reporting.runs import Series, read_runs
from stages.errors import UserError
from stages.evaluate.scoring import Prediction
from stages.networks.checkpoint import Checkpoints, Position
from stages.train.metric_log import FILE
from tests.html_page import read_page
from tests.made_runs import EVIL, FINGERPRINT, add_evaluation, make_run, six_answers
from tests.video_files import write_video


def cells_of(source: str, first: str) -> list[str]:
    """Text of the cells beside a row's heading."""
    row = re.search(rf'<th scope="row">{first}</th>(.*?)</tr>', source, flags=re.DOTALL)[1]
    return [re.sub(r"<[^>]*>", "", cell).strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs"), "first", missing=("v7", "v8"))
    add_evaluation(run)
    return read_page(report.run([run.path], None))


# --- the page as such


def test_the_page_lies_in_the_run_and_is_well_formed(evaluated):
    source, page = evaluated
    assert source.startswith("<!doctype html>")
    assert not page.problems
    assert not page.open
    assert page.tags["svg"] >= 8
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_every_inner_link_has_its_place(evaluated):
    _, page = evaluated
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert {"accuracy", "training", "answers", "about", "settings"} <= inner
    assert inner <= set(page.ids)


def test_headings_go_down_one_level_at_a_time(evaluated):
    _, page = evaluated
    assert page.headings[0] == 1
    assert all(below - above <= 1 for above, below in zip(page.headings, page.headings[1:], strict=False))


def test_text_from_the_data_stays_text(evaluated):
    source, page = evaluated
    assert "<script" not in source.lower()
    assert page.tags["script"] == 0
    assert EVIL in page.text
    assert "who & what?" in page.text


def test_names_of_runs_and_splits_cannot_leave_their_attributes(tmp_path):
    hostile = [f'{index}" onload="alert(1)"><script>alert(2)<' for index in range(2)]
    runs = [make_run(tmp_path, name) for name in hostile]
    for run in runs:
        add_evaluation(run, predictions=six_answers(question='why" onerror="alert(3)'))
    source, page = read_page(report.run([run.path for run in runs], tmp_path / "page.html"))
    assert not page.problems
    assert page.tags["script"] == 0
    assert not re.search(r"<[^>]*\son(load|error)=", re.sub(r'="[^"]*"', '=""', source))
    assert all(name in page.text for name in hostile)


def test_the_page_fetches_nothing(evaluated):
    source, page = evaluated
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []
    assert "@import" not in source
    assert not [url for url in re.findall(r"url\(([^)]*)\)", source) if not url.startswith("#")]
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", source)
    assert not re.search(r"https?://", without_namespaces)


def test_plots_take_their_colours_from_the_page_and_say_in_words_what_they_show(evaluated):
    source, page = evaluated
    drawn = re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL)
    svg = "".join(drawn)
    assert "var(--series-0)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0[12]00\d\d|fill: #ffffff", svg)
    assert all("aria-label=" in one or "aria-hidden=" in one for one in drawn)
    assert "Total loss (Eq. 9)2 to 1.5" in page.text
    assert "level 8 0 to 0.5; level 13 0.1 to 0.1" in page.text


def test_an_axis_shows_its_values_and_nothing_to_be_added_to_them():
    series = Series(np.arange(10), 0.974984 + 1e-7 * np.arange(10))
    svg = curves_plot("flat", "a flat curve", [Curve(0, series)])
    assert "0.9749842" in svg
    assert "e-1" not in svg


def test_the_axes_of_a_single_point_have_whole_steps_and_no_negative_share():
    svg = curves_plot("one", "one point", [Curve(0, Series(np.array([15]), np.array([0.2857])))], percent=True)
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "15" in ticks
    assert not [tick for tick in ticks if "." in tick and "%" not in tick]
    assert "0.0%" in ticks


def test_neighbouring_curves_differ_in_dash_and_not_in_colour_alone():
    assert all(dash_of(slot) != dash_of(slot + 1) for slot in range(12))


def test_the_same_run_gives_the_same_page(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    first = report.run([run.path], tmp_path / "a.html").read_bytes()
    assert report.run([run.path], tmp_path / "b.html").read_bytes() == first


# --- numbers


def test_accuracy_stands_beside_both_intervals_both_floors_and_the_other_ways_of_counting(evaluated):
    source, page = evaluated
    assert "4 of 6 samples right" not in page.text  # the card's samples are questions
    assert "4 of 6 questions right" in page.text
    assert "not above" not in page.text
    assert "above both floors, but within the noise" in page.text
    found = cells_of(source, "relation")
    assert found[:3] == ["6", "66.7%", "30.0 to 90.3%"]
    assert re.fullmatch(r"[\d.]+ to [\d.]+%", found[3])
    assert found[4:7] == ["50.0%", "33.3%", "no"]
    assert found[7] == "72.2%"  # (2/3 + 1/2 + 1) / 3
    assert found[8].startswith("66.7% (4/6; ")
    assert found[-1] == "16.7%"


def test_classes_and_matrix_are_the_scores_own(evaluated):
    source, _ = evaluated
    matrix = re.search(r'<table class="confusion">.*?</table>', source, flags=re.DOTALL)[0]
    counts = [int(cell) for cell in re.findall(r"<td[^>]+>(\d+)</td>", matrix)]
    assert counts == [2, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0]
    bars = re.search(r'<ul class="bars">.*?</ul>', source, flags=re.DOTALL)[0]
    assert re.findall(r'class="value">([^<]+)<', bars) == ["66.7%", "50.0%", "100.0%"]
    assert "2 of 3, " in bars


def test_ranked_candidates_are_told_apart_from_beam_search(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    rows = [
        Prediction(f"s{n}", f"v{n}", "relation", "who?", "friend", ("friend", "husband wife", EVIL), (-0.1, -1.0, -2.0))
        for n in range(4)
    ]
    add_evaluation(run, method="rank", predictions=rows)
    _, page = read_page(report.run([run.path], None))
    assert "Split test, beam search" in page.text
    after = page.text[page.text.index("Split test, candidates ranked by likelihood") :]
    assert "4 of 4 questions right" in after
    assert "per video, likelihood" in after


def test_open_answers_are_shown_by_their_types(tmp_path):
    run = make_run(tmp_path, "run")
    rows = [
        Prediction(f"s{n}", f"v{n}", "relation", "what?", "man", (given,), (-0.1,), answer_type=kind)
        for n, (given, kind) in enumerate([("man", "what"), ("dog", "what"), ("man", "who")])
    ]
    add_evaluation(run, predictions=rows, labels={"relation": None})
    source, page = read_page(report.run([run.path], None))
    assert 'class="confusion"' not in source
    assert re.findall(r'class="label">([^<]+)</span><span class="value">([^<]+)<', source) == [
        ("what", "50.0%"),
        ("who", "100.0%"),
    ]
    assert not page.problems


def test_configuration_and_fingerprint_are_shown_in_full(evaluated):
    source, page = evaluated
    assert cells_of(source, "cache fingerprint") == [FINGERPRINT]
    assert "warmup_start_lr: 1.0e-08" in page.text
    assert '"videos_missing"' in page.text


def test_a_partial_training_set_is_named_at_the_top(evaluated):
    _, page = evaluated
    top = page.text[: page.text.index("Accuracy", page.text.index("Settings"))]
    assert "2 videos failed extraction and are left out (v7, v8)" in top
    assert "7 of 9 train samples" in top


def test_leaks_and_whatever_was_left_out_are_said_before_the_numbers(tmp_path):
    stamp = {"leaks": {"relation": 3, "scene": 1}, "videos_left_out": ["w1", "w2"]}
    run = make_run(tmp_path, "run", more_stamp=stamp, train__epochs=5)
    add_evaluation(run, left_out=("v8",))
    Checkpoints(run.path).save({"x": torch.zeros(1)}, {}, Position(epoch=2, step=9), keep=1)
    source, _ = read_page(report.run([run.path], None))
    top = source[: source.index('<section id="accuracy">')]
    assert re.findall(r"<li>([^<]+)</li>", top) == [
        "trained on a partial set: 2 annotated videos have no known length and no samples",
        "trained on videos that are in a test split, by task: relation 3, scene 1",
        "scored without 2 test samples of 1 video, which failed extraction",
        "its training has come to epoch 2 of 5",
        "its answers on split test (generate) are those of checkpoint step-00000006, but the best one is "
        "step-00000009; evaluate it again",
    ]


def test_a_whole_and_finished_run_has_nothing_to_be_said_of(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    source, _ = read_page(report.run([run.path], None))
    assert 'class="notices"' not in source


# --- answers


def test_confident_answers_come_by_certainty_and_hard_ones_by_the_right_answers_distance():
    def wrong(name, video, answers, scores):
        return Prediction(name, video, "task", "q?", "right", answers, scores)

    rows = [
        Prediction("fine", "v0", "task", "q?", "right", ("right", "a"), (-0.1, -1.0)),
        wrong("sure", "v1", ("a", "right"), (-0.1, -0.2)),
        wrong("sure-again", "v1", ("a", "right"), (-0.15, -0.2)),
        wrong("near", "v2", ("a", "right"), (-1.0, -1.1)),
        wrong("far", "v3", ("a", "b", "right"), (-1.0, -1.2, -3.0)),
        wrong("absent", "v4", ("a", "b", "c"), (-1.0, -1.1, -1.2)),
    ]
    found = choose_examples(rows, 1)
    assert [one.row.sample for one in found.confident] == ["sure"]
    assert [one.row.sample for one in found.hardest] == ["absent"]
    everything = choose_examples(rows, 2)
    assert [one.row.sample for one in everything.confident] == ["sure", "near"]
    assert [one.row.sample for one in everything.hardest] == ["absent", "far"]
    assert everything.hardest[1].right_stood == "number 3, 2.00 behind in log-probability"
    assert (everything.num_wrong, everything.num_videos) == (5, 4)
    assert [(one.row.sample, one.right_stood) for one in everything.right] == [
        ("fine", "first, 0.90 ahead in log-probability")
    ]


def test_right_answers_stand_beside_the_mistakes(evaluated):
    source, page = evaluated
    headings = ["Most confident mistakes", "Most confident right answers"]
    assert all(page.text.count(heading) == 1 for heading in headings)
    wrong, right = (source.partition(f">{heading}<")[2].partition("</div>")[0] for heading in headings)
    assert (wrong.count("<article"), right.count("<article")) == (2, 4)
    assert "first, " in right
    assert "first, " not in wrong


@pytest.fixture(scope="module")
def with_videos(tmp_path_factory):
    """A run whose mistakes are of three videos: a whole one, one that is damaged, one that is not there."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v0.mp4", count=20, height=48, width=80)
    (folder / "v1.mp4").write_bytes(b"no video at all")
    lines = [
        {
            "video": f"v{n}",
            "duration_s": 0.6,
            "task": "relation",
            "question": "who?",
            "answer": "friend",
            "split": "test",
        }
        for n in range(3)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = make_run(folder, "run", data__videos=str(folder), data__annotations=str(folder))
    from pipeline.settings import locations

    samples = locations.manifest_of(run.config()).samples
    rows = [
        Prediction(one.id, one.video, "relation", "who?", "friend", (EVIL, "friend"), (-0.1, -1.0)) for one in samples
    ]
    add_evaluation(run, predictions=rows)
    return read_page(report.run([run.path], None))


def test_mistakes_show_frames_of_their_videos(with_videos):
    _, page = with_videos
    assert not page.problems
    assert len(page.pictures) == 4  # the card's four frames of the one whole video
    assert [one["alt"] for one in page.pictures][:2] == ["Frame at 0 s", "Frame at 0.2 s"]
    shown = []
    for one in page.pictures:
        kind, _, content = one["src"].partition(";base64,")
        assert kind == "data:image/jpeg"
        shown.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))))
    assert {one.shape for one in shown} == {(112, 112, 3)}
    assert len({one.tobytes() for one in shown}) == 4


def test_videos_that_cannot_be_shown_say_why_in_their_place(with_videos):
    _, page = with_videos
    said = sorted(re.findall(r"No frames: ([^\n]*)", page.text), key=lambda line: "no such file" in line)
    assert len(said) == 2
    assert "Invalid data" in said[0]
    assert said[1].startswith("no such file: ")
    assert "/v2.mp4" in said[1]


def test_without_annotations_all_answers_say_once_why_they_have_no_frames(evaluated):
    _, page = evaluated
    assert page.pictures == []
    assert page.text.count("Answers are shown without frames: ") == 1
    assert "annotations" in page.text.partition("Answers are shown without frames: ")[2][:120]


# --- several runs


def test_several_runs_stand_side_by_side_with_paired_tests(tmp_path):
    first, second, third = (make_run(tmp_path, name, kd_weight=kd) for name, kd in (("a", 1.0), ("b", 0.0), ("c", 1.0)))
    add_evaluation(first)
    better = [
        Prediction(row.sample, row.video, row.task, row.question, row.gold, (row.gold, "friend"), (-0.1, -1.0))
        for row in six_answers()
    ]
    add_evaluation(second, predictions=better)
    add_evaluation(second, "val")
    source, page = read_page(report.run([first.path, second.path, third.path], tmp_path / "out" / "all.html"))
    assert not page.problems
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert "Split val" in page.text
    loss = re.search(r'<svg(?:(?!</svg>).)*aria-label="Total loss.*?</svg>', source, flags=re.DOTALL)[0]
    assert all(f"stroke: var(--series-{slot})" in loss for slot in range(3))
    kd = re.search(r'<svg(?:(?!</svg>).)*aria-label="Distillation loss.*?</svg>', source, flags=re.DOTALL)[0]
    assert "stroke: var(--series-1)" not in kd
    paired = source[source.index('id="paired"') :]
    found = cells_of(paired, "relation")
    assert found[:2] == ["b − a", "+33.3"]  # noqa: RUF001 - a minus sign
    assert found[3] in ("no difference shown", "b is better")
    assert found[4:8] == ["66.7%", "100.0%", "0", "2"]
    assert found[8:] == ["0.5", "6"]  # two discordant samples, both for one side: 2 * 0.5 ** 2


def test_runs_that_answered_other_samples_say_that_they_cannot_be_compared(tmp_path):
    first, second = (make_run(tmp_path, name) for name in "ab")
    add_evaluation(first)
    add_evaluation(second, predictions=six_answers()[:4])
    _, page = read_page(report.run([first.path, second.path], tmp_path / "page.html"))
    assert "a and b cannot be compared: different samples were answered" in page.text


def test_runs_of_the_same_name_are_told_apart_and_a_repeated_one_is_read_once(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = [make_run(tmp_path / parent, "same").path for parent in ("x", "y")]
    assert [run.name for run in read_runs([*runs, runs[0]])] == [str(path) for path in runs]


# --- unfinished and broken runs


def test_a_run_that_is_not_evaluated_gets_a_page_that_names_the_command(tmp_path):
    run = make_run(tmp_path, "fresh run")
    _, page = read_page(report.run([run.path], None))
    assert f"pipeline evaluate --run '{run.path}'" in page.text
    assert "This run has not been evaluated yet." in page.text
    assert not page.problems


def test_a_running_training_may_leave_half_a_line(tmp_path):
    run = make_run(tmp_path, "run")
    whole = read_runs([run.path])[0].log.rows
    with (run.path / FILE).open("a", encoding="utf-8") as file:
        file.write('{"split": "train", "st')
    assert read_runs([run.path])[0].log.rows == whole


def test_a_broken_line_in_the_log_is_named(tmp_path):
    run = make_run(tmp_path, "run")
    lines = (run.path / FILE).read_text().splitlines(keepends=True)
    (run.path / FILE).write_text("".join([lines[0], "{broken\n", *lines[1:]]))
    with pytest.raises(UserError, match=rf"{FILE}:2: not a row of the metric log"):
        report.run([run.path], None)


def test_a_file_that_holds_no_object_is_named(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    (run.path / "metrics.json").write_text("[]")
    with pytest.raises(UserError, match=r"metrics\.json: must hold one JSON object; got 'list'"):
        report.run([run.path], None)


def test_a_broken_prediction_is_named(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    path = run.path / "predictions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"sample": "s"}\n', *lines[1:]]))
    with pytest.raises(UserError, match=r"predictions\.jsonl:2: not a prediction"):
        report.run([run.path], None)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        report.run([tmp_path], None)


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    run = make_run(tmp_path, "run")
    with pytest.raises(UserError, match="this is a folder"):
        report.run([run.path], tmp_path)


def test_no_run_and_no_paper_is_refused():
    with pytest.raises(UserError, match="no run is given"):
        report.run([], None)


def test_without_its_card_a_run_is_still_shown(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    (tmp_path / "tiny-set.yaml").unlink()
    _, page = read_page(report.run([run.path], None))
    assert "4 of 6 samples right" in page.text
    assert not page.problems


def test_long_curves_are_thinned_to_means():
    series = Series(np.arange(1001.0), np.arange(1001.0) * 2)
    thinned, per_point = thin(series)
    assert per_point == 3
    assert len(thinned.steps) == 334
    assert thinned.values[0] == 2.0
    assert thinned.steps[-1] == 999.5
