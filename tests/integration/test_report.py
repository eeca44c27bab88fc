"""The report of runs written in the real file formats: what it shows, what it escapes, what it never fetches."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline.commands import evaluate, report
from pipeline.config import resolve
from pipeline.report_data import Series, confident_mistakes, confusions, read_runs
from pipeline.report_plots import thin
from pipeline.run_folder import RunFolder
from stages.errors import UserError
from stages.evaluate import Prediction, score
from stages.metric_log import FILE, MetricLog

EVIL = "<script>alert(1)</script>"
LABELS = ["friend", "husband wife", EVIL]
VOID = {"meta", "link", "br"}


def write_card(folder: Path) -> Path:
    card = {
        "name": "tiny-set",
        "title": "Three labels, one of them hostile",
        "annotations": {"format": "jsonl", "file": "samples.jsonl"},
        "tasks": {"relation": {"labels": LABELS}},
        "frame_rule": {"kind": "uniform", "num_frames": 4, "index_fps": 10},
        "expected": {"relation": {"train": {"videos": 9, "samples": 9}, "test": {"videos": 6, "samples": 6}}},
    }
    path = folder / "tiny-set.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    return path


def make_run(folder: Path, name: str, *, kd_weight: float = 1.0, missing: tuple[str, ...] = ()) -> RunFolder:
    card = write_card(folder)
    config = resolve(
        preset="tiny", options={"data.dataset": str(card)}, overrides=[f"alignment.kd_weight={kd_weight}"]
    ).config
    stamp = {"fingerprint": "5eed" * 16, "samples": {"train": 9 - len(missing)}, "videos_missing": list(missing)}
    run = RunFolder.create(folder / name, config, stamp)
    log = MetricLog(run.path)
    for step in range(6):
        row = {"step": step, "epoch": step // 3, "lr": 1e-4, "loss": 2.0 - step / 10, "answer_loss": 1.5}
        if kd_weight:
            row |= {"kd_loss": 0.5, "saturated": 0.0, "cosine/8": step / 10, "weight/8": 0.5, "cosine/13": 0.1}
        log.write(step, "train", {**row, "data_wait_s": 0.01, "samples_per_s": 40.0})
    log.write(6, "val", {"step": 6, "top1": 0.5, "answer_loss": 1.4})
    log.close()
    return run


def add_evaluation(run: RunFolder, split: str = "test") -> None:
    """Six answers: four right; the surest mistake gives the hostile label, the other one no label at all."""
    answered = [
        ("friend", "friend", -0.1),
        ("friend", EVIL, -0.2),
        ("friend", "friend", -0.3),
        ("husband wife", "husband wife", -0.4),
        ("husband wife", "two people", -0.5),
        (EVIL, EVIL, -0.6),
    ]
    predictions = [
        Prediction(f"s{index}", f"v{index}", "relation", "who & what?", gold, (given, "friend"), (surety, surety - 1))
        for index, (gold, given, surety) in enumerate(answered)
    ]
    evaluate._write(run, split, predictions, score(predictions))


class Page(HTMLParser):
    """What a browser would see: elements, their attributes, text outside of style and script."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.problems: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self._note(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._note(tag, attrs)

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> at {self.getpos()} closes {self.open[-3:]}")
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def _note(self, tag, attrs):
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value] += 1
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)


def read_page(path: Path) -> tuple[str, Page]:
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs"), "first", missing=("v7", "v8"))
    add_evaluation(run)
    return read_page(report.run([run.path], None))


def test_the_page_lies_in_the_run_and_is_well_formed(evaluated):
    source, page = evaluated
    assert source.startswith("<!doctype html>")
    assert not page.problems
    assert not page.open
    assert page.tags["svg"] >= 8
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_text_from_the_data_stays_text(evaluated):
    source, page = evaluated
    assert "<script" not in source.lower()
    assert page.tags["script"] == 0
    assert EVIL in page.text
    assert "who & what?" in page.text


def test_the_page_fetches_nothing(evaluated):
    source, page = evaluated
    assert [link for link in page.links if not link.startswith(("#", "data:,"))] == []
    assert "@import" not in source
    assert not [url for url in re.findall(r"url\(([^)]*)\)", source) if not url.startswith("#")]
    without_namespaces = re.sub(r'xmlns(:xlink)?="[^"]*"', "", source)
    assert not re.search(r"https?://", without_namespaces)


def test_plots_take_their_colours_from_the_page(evaluated):
    source, _ = evaluated
    svg = "".join(re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL))
    assert "var(--series-0)" in svg
    assert "currentColor" in svg
    assert not re.search(r"#0[12]00\d\d|fill: #ffffff", svg)


def test_accuracy_stands_beside_its_interval_and_floor(evaluated):
    source, _ = evaluated
    row = re.search(r'<th scope="row">relation</th>(.*?)</tr>', source)[1]
    assert re.findall(r">([^<]+)</td>", row) == ["6", "66.7%", "30.0% to 90.3%", "50.0%", "no", "83.3%"]


def test_a_partial_training_set_is_named_at_the_top(evaluated):
    _, page = evaluated
    top = page.text[: page.text.index("Accuracy")]
    assert "2 videos failed extraction and are left out (v7, v8)" in top
    assert "7 of 9 train samples" in top


def test_confusion_rows_are_gold_and_foreign_answers_get_the_last_column(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    (data,) = read_runs([run.path])
    (matrix,) = confusions(data, data.evaluations["test"])
    assert matrix.labels == tuple(LABELS)
    assert matrix.other == "no label"
    assert matrix.counts == ((2, 0, 1, 0), (0, 1, 0, 1), (0, 0, 1, 0))


def test_mistakes_are_ordered_by_the_models_certainty(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    (data,) = read_runs([run.path])
    mistakes = confident_mistakes(data.evaluations["test"].predictions, 10)
    assert [row.sample for row in mistakes] == ["s1", "s4"]
    assert [row.sample for row in confident_mistakes(data.evaluations["test"].predictions, 1)] == ["s1"]


def test_the_same_run_gives_the_same_page(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    first = report.run([run.path], tmp_path / "a.html").read_bytes()
    assert report.run([run.path], tmp_path / "b.html").read_bytes() == first


def test_a_run_that_is_not_evaluated_gets_a_page_that_names_the_command(tmp_path):
    run = make_run(tmp_path, "fresh run")
    _, page = read_page(report.run([run.path], None))
    assert f"pipeline evaluate --run '{run.path}'" in page.text
    assert "This run has not been evaluated yet." in page.text
    assert not page.problems


def test_several_runs_stand_side_by_side(tmp_path):
    first, second, third = (make_run(tmp_path, name, kd_weight=kd) for name, kd in (("a", 1.0), ("b", 0.0), ("c", 1.0)))
    add_evaluation(first)
    add_evaluation(second)
    add_evaluation(second, "val")
    source, page = read_page(report.run([first.path, second.path, third.path], tmp_path / "out" / "all.html"))
    assert not page.problems
    assert [name for name, count in page.ids.items() if count > 1] == []
    heads = re.search(r"majority floor</th>(.*?)</thead>", source, flags=re.DOTALL)[1]
    assert re.findall(r'<th scope="col">(\w+)</th>', heads) == ["a", "b", "c"]
    assert "Split val" in page.text
    loss = re.search(r"<svg(?:(?!</svg>).)*Total loss.*?</svg>", source, flags=re.DOTALL)[0]
    assert all(f"stroke: var(--series-{slot})" in loss for slot in range(3))
    kd = re.search(r"<svg(?:(?!</svg>).)*Distillation loss.*?</svg>", source, flags=re.DOTALL)[0]
    assert "stroke: var(--series-1)" not in kd


def test_runs_of_the_same_name_are_told_apart_and_a_repeated_one_is_read_once(tmp_path):
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    runs = [make_run(tmp_path / parent, "same").path for parent in ("x", "y")]
    assert [run.name for run in read_runs([*runs, runs[0]])] == [str(path) for path in runs]


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


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a run"):
        report.run([tmp_path], None)


def test_an_output_that_is_a_folder_is_refused(tmp_path):
    run = make_run(tmp_path, "run")
    with pytest.raises(UserError, match="this is a folder"):
        report.run([run.path], tmp_path)


def test_without_its_card_a_run_is_shown_by_the_answers_that_occur(tmp_path):
    run = make_run(tmp_path, "run")
    add_evaluation(run)
    (tmp_path / "tiny-set.yaml").unlink()
    (data,) = read_runs([run.path])
    (matrix,) = confusions(data, data.evaluations["test"])
    assert matrix.labels == ("friend", "husband wife", EVIL)
    assert matrix.other == "another answer"


def test_long_curves_are_thinned_to_means():
    series = Series(np.arange(1001.0), np.arange(1001.0) * 2)
    thinned, per_point = thin(series)
    assert per_point == 3
    assert len(thinned.steps) == 334
    assert thinned.values[0] == 2.0
    assert thinned.steps[-1] == 999.5
