"""The paper's tables with the project's rows: what fills a cell, what never does, and that every cell says which."""

import json
from statistics import fmean

import pytest
import torch
import yaml

from pipeline.commands import report
from pipeline.reporting.paper import lay_out, printed, published_tables
from pipeline.reporting.paper_rules import deviations, misfits
from pipeline.reporting.runs import read_runs
from pipeline.runs.run_folder import RunFolder
from pipeline.settings.config import resolve
from stages.data.cards import load_card
from stages.evaluate.scoring import Prediction
from stages.networks.checkpoint import Checkpoints, Position
from stages.train.metric_log import FILE
from tests.conftest import run_pipeline
from tests.made_runs import add_evaluation

# Test windows of each right answer, and how many of them are answered right: Diff-LMM's 63 of 91.
RELATIONSHIP = {"friend": (42, 38), "husband wife": (36, 24), "boyfriend girlfriend": (13, 1)}


def make_lvu_run(
    folder, name="run", *overrides, task="relationship", preset="diff-lmm-7b", samples=None, missing=(), epoch=None
):
    """A run that says of itself to be the paper's, except for what is given."""
    config = resolve(preset=preset, options={"data.dataset": "lvu", "data.task": task}, overrides=overrides).config
    card = load_card("lvu")
    tasks = card.tasks if task == "all" else [task]
    published = {split: sum(card.expected[one][split].samples for one in tasks) for split in ("train", "val")}
    stamp = {"fingerprint": "5eed" * 16, "samples": samples or published, "videos_missing": list(missing)}
    run = RunFolder.create(folder / name, config, stamp)
    come_to = config.train.epochs if epoch is None else epoch
    rows = [{"split": "train", "step": 4 * done, "epoch": done, "loss": 1.0} for done in range(come_to)]
    (run.path / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def answers(task="relationship", classes=None, *, leave_out=0):
    rows = []
    for label, (windows, right) in (classes or RELATIONSHIP).items():
        for index in range(windows):
            given = label if index < right else "wrong"
            rows.append(
                Prediction(f"{label}{index}", f"{label}{index // 3}", task, "q?", label, (given, *"abcd"), (-0.1,) * 5)
            )
    return rows[leave_out:]


def ranked():
    labels = load_card("lvu").tasks["relationship"].labels
    return [Prediction("s0", "v0", "relationship", "q?", labels[0], labels, (-0.1, -0.2, -0.3, -0.4))]


def evaluate(run, *, task="relationship", **options):
    labels = {task: load_card("lvu").tasks[task].labels}
    options.setdefault("predictions", answers(task))
    add_evaluation(run, labels=labels, **options)
    return run


def section_of(*runs):
    return lay_out(read_runs([run.path for run in runs]))


def measured_cells(section):
    """(table, row, column) -> percent of every cell that is measured."""
    return {
        (table.id, line.label, column): round(cell.percent, 2)
        for table in section.tables
        for line in table.lines
        for column, cell in zip(table.columns, line.cells, strict=True)
        if cell.state == "measured"
    }


# --- the paper's numbers


def test_the_averages_of_table_1_are_the_means_of_their_rows():
    (table,) = (table for table in published_tables() if table.id == "table-1")
    means = {row.label: fmean(row.paper[:7]) for row in table.rows}
    assert round(means["MA-LMM"], 2) == 63.03
    assert round(means["Diff-LMM"], 2) == 64.78
    for row in table.rows:
        assert row.paper[7] == pytest.approx(means[row.label], abs=0.06), row.label


def test_the_cards_hold_the_same_numbers():
    tables = {table.id: table for table in published_tables()}
    lvu, msvd = load_card("lvu").paper, load_card("msvd_qa").paper
    for table, by_model in (("table-1", lvu["top1_percent"]), ("table-2", lvu["relationship_per_class_percent"])):
        for model, by_column in by_model.items():
            (row,) = (row for row in tables[table].rows if row.label == model)
            here = {column.title: value for column, value in zip(tables[table].columns, row.paper, strict=True)}
            assert {key: here[key] for key in by_column} == by_column
    assert {row.label: row.paper[0] for row in tables["table-3"].rows} == msvd["top1_percent"]


def test_a_number_is_shown_as_the_paper_prints_it():
    assert [printed(value) for value in (48.96, 45.0, 69.2)] == ["48.96", "45.0", "69.2"]


# --- which run fills which cell


def test_without_runs_no_cell_is_measured_and_every_own_cell_says_not_run():
    section = lay_out([])
    assert measured_cells(section) == {}
    own = [cell for table in section.tables for line in table.lines if line.source != "paper" for cell in line.cells]
    assert {cell.state for cell in own} == {"not run"}
    assert all(cell.percent is None and cell.measurements == () for cell in own)
    theirs = [cell for table in section.tables for line in table.lines if line.source == "paper" for cell in line.cells]
    assert {(cell.state, cell.percent is None) for cell in theirs} == {("paper", False), ("not given", True)}


def test_a_run_of_the_papers_method_fills_every_cell_that_it_measures(tmp_path):
    section = section_of(evaluate(make_lvu_run(tmp_path)))
    assert measured_cells(section) == {
        ("table-1", "Diff-LMM", "relationship"): 69.23,
        ("table-2", "Diff-LMM", "husband wife"): 66.67,
        ("table-2", "Diff-LMM", "friend"): 90.48,
        ("table-2", "Diff-LMM", "boyfriend girlfriend"): 7.69,
        ("table-4", "adaptive", "accuracy"): 69.23,
        ("figure-3", "lambda 1", "accuracy"): 69.23,
        ("figure-4", "higher (8 to 13)", "accuracy"): 69.23,
    }
    assert section.left_out == {}
    assert section.remarks == {}


@pytest.mark.parametrize(
    ("overrides", "filled"),
    [
        (["alignment.kd_weight=0"], {"table-1", "table-2"}),
        (["alignment.weighting=average"], {"table-4"}),
        (["alignment.levels=[1,2,3,4,5,6,7]"], {"figure-4"}),
        (["alignment.levels=[13]"], {"figure-4"}),
    ],
)
def test_a_variant_fills_its_own_row_and_no_other(tmp_path, overrides, filled):
    cells = measured_cells(section_of(evaluate(make_lvu_run(tmp_path, "run", *overrides))))
    assert {table for table, _, _ in cells} == filled
    assert not {("Diff-LMM", "relationship"), ("adaptive", "accuracy")} & {cell[1:] for cell in cells}


def test_seeds_of_one_row_are_averaged_and_named(tmp_path):
    first = evaluate(make_lvu_run(tmp_path, "first"))
    second = evaluate(
        make_lvu_run(tmp_path, "second", "train.seed=7"),
        predictions=answers(classes={**RELATIONSHIP, "friend": (42, 28)}),
    )
    section = section_of(first, second)
    assert measured_cells(section)["table-1", "Diff-LMM", "relationship"] == round(100 * (63 + 53) / 2 / 91, 2)
    line = section.tables[0].lines[-1]
    assert [(one.run, one.correct, one.n) for one in line.cells[0].measurements] == [
        ("first", 63, 91),
        ("second", 53, 91),
    ]


def test_the_average_stands_there_only_when_all_seven_tasks_are_measured(tmp_path):
    card, runs = load_card("lvu"), []
    for task in card.tasks:
        run = make_lvu_run(tmp_path, task, task=task)
        label, total = card.tasks[task].labels[0], card.expected[task]["test"].samples
        runs.append(evaluate(run, task=task, predictions=answers(task, {label: (total, total // 2)})))
    assert ("table-1", "Diff-LMM", "average") not in measured_cells(section_of(*runs[:6]))
    cells = measured_cells(section_of(*runs))
    own = [cells["table-1", "Diff-LMM", task] for task in card.tasks]
    assert cells["table-1", "Diff-LMM", "average"] == pytest.approx(fmean(own), abs=0.01)


REFUSED = {
    "the tiny networks": ({"preset": "tiny"}, {}, "bundled tiny network"),
    "a bundled teacher alone": ({"overrides": ["teacher.source=bundled:tiny-dit"]}, {}, "teacher is a bundled tiny"),
    "a random teacher": ({"overrides": ["teacher.random_seed=1"]}, {}, "teacher.random_seed is 1, not None"),
    "another kind of teacher": ({"overrides": ["teacher.kind=tower"]}, {}, "teacher.kind is tower, not dit"),
    "another lambda": ({"overrides": ["alignment.kd_weight=0.5"]}, {}, "alignment.kd_weight is 0.5, not 1.0"),
    "another memory": ({"overrides": ["qformer.memory_slots=10"]}, {}, "qformer.memory_slots is 10, not 20"),
    "a part of the training set": ({"samples": {"train": 100, "val": 103}}, {}, "100 train samples, not 298"),
    "videos without features": ({"missing": ["a", "b"]}, {}, "2 videos failed extraction"),
    "a part of the test set": ({}, {"predictions": answers(leave_out=2)}, "89 test samples, not 91"),
    "the validation split": ({}, {"split": "val"}, "not evaluated on the test split by beam search"),
    "ranked candidates": (
        {},
        {"method": "rank", "predictions": ranked()},
        "not evaluated on the test split by beam search",
    ),
    "fewer beams": ({"overrides": ["language.num_beams=1"]}, {}, "language.num_beams 1, not 5"),
    "one model for all tasks": ({"task": "all"}, {}, "one model was trained for all tasks"),
    "networks that nothing is known of": (
        {"overrides": ["encoder.source=/somewhere"]},
        {},
        "no checkpoint to see their sizes by",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_the_papers_setting_fills_no_cell_and_says_why(tmp_path, case):
    made, evaluated, reason = REFUSED[case]
    overrides = made.get("overrides", [])
    run = make_lvu_run(tmp_path, "run", *overrides, **{key: value for key, value in made.items() if key != "overrides"})
    section = section_of(evaluate(run, **evaluated))
    assert measured_cells(section) == {}
    assert reason in "; ".join(section.left_out["run"])


def test_a_data_set_of_ones_own_fills_no_cell_even_under_the_papers_name(tmp_path):
    copy = tmp_path / "lvu.yaml"
    copy.write_text(yaml.safe_dump(load_card("lvu").model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    config = resolve(options={"data.dataset": str(copy), "data.task": "relationship"}).config
    stamp = {"fingerprint": "5eed" * 16, "samples": {"train": 298, "val": 103}, "videos_missing": []}
    run = evaluate(RunFolder.create(tmp_path / "run", config, stamp))
    section = section_of(run)
    assert measured_cells(section) == {}
    assert "none of the paper's" in section.left_out["run"][0]


@pytest.mark.parametrize(("width", "fills"), [(1408, True), (96, False)])
def test_networks_from_a_folder_count_only_with_the_published_sizes(tmp_path, width, fills):
    named = ("encoder.source=/models/instructblip", "teacher.source=/models/DiT.pt", "teacher.vae_source=/models/vae")
    run = evaluate(make_lvu_run(tmp_path, "run", *named))
    sizes = {
        "qformer.query_tokens": (1, 32, 768),
        "qformer.qformer.encoder.layer.0.crossattention.attention.key.weight": (768, width),
        "language_projection.weight": (4096, 768),
    }
    tensors = {name: torch.zeros(size, dtype=torch.uint8) for name, size in sizes.items()}
    Checkpoints(run.path).save(tensors, {}, Position(epoch=2, step=6, target_width=1152), keep=1)
    section = section_of(run)
    assert bool(measured_cells(section)) == fills
    if fills:
        (remark,) = section.remarks["run"]
        read = (
            "encoder was read from /models/inst",
            "teacher was read from /models/DiT.pt",
            "VAE was read from /models/v",
        )
        assert all(one in remark for one in read)
    else:
        assert "other sizes" in section.left_out["run"][0]


def test_another_recipe_is_remarked_on_and_what_changes_no_result_is_not(tmp_path):
    run = evaluate(make_lvu_run(tmp_path, "run", "train.epochs=5", "train.loader_workers=0", "train.seed=3"))
    section = section_of(run)
    assert measured_cells(section)
    assert section.remarks == {"run": ("train.epochs is 5, not 20",)}


def test_a_training_that_is_not_at_its_end_and_answers_of_an_older_checkpoint_are_remarked_on(tmp_path):
    half = evaluate(make_lvu_run(tmp_path, "half", epoch=3))
    unknown = evaluate(make_lvu_run(tmp_path, "unknown", epoch=0))
    older = evaluate(make_lvu_run(tmp_path, "older"))
    Checkpoints(older.path).save({"x": torch.zeros(1)}, {}, Position(epoch=20, step=80), keep=1)
    remarks = section_of(half, unknown, older).remarks
    assert remarks["half"] == ("its training has come to epoch 3 of 20",)
    assert remarks["unknown"] == ("it has no log of its training, so how long that was is not known",)
    (said,) = remarks["older"]
    assert said == (
        "its answers on split test (generate) are those of checkpoint step-00000006, but the best one is "
        "step-00000080; evaluate it again"
    )


# --- where it is shown


def test_json_and_terminal_and_page_all_mark_every_cell(tmp_path):
    run = evaluate(make_lvu_run(tmp_path))
    tiny = evaluate(make_lvu_run(tmp_path, "small", preset="tiny"))
    done = run_pipeline("report", "--paper", run.path, tiny.path, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    states = {cell["state"] for table in told["paper"]["tables"] for line in table["lines"] for cell in line["cells"]}
    assert states == {"measured", "paper", "not run", "not given"}
    assert "bundled tiny network" in told["paper"]["left_out"]["small"][0]
    assert "measured here" in done.stderr
    assert "not run" in done.stderr
    assert "small fills no cell" in done.stderr
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert told["report"] == str(run.path / "report.html")
    assert '<b>69.2</b> <small>here [<a href="#departures">1-11</a>]</small>' in page
    assert "63/91 = 69.2 (59.1 to 77.8)" in page
    assert "48.96 <small>paper</small>" in page
    assert '<td class="notrun"><small>not run</small></td>' in page


def test_the_departures_that_apply_stand_beside_every_number_of_ours(tmp_path, capfd):
    plain = evaluate(make_lvu_run(tmp_path, "plain"))
    first = evaluate(make_lvu_run(tmp_path, "first", "train.best_of_equals=first", "data.frame_offset=-1", epoch=20))
    section = section_of(plain, first)
    assert "first" not in section.remarks, "what does as MA-LMM is no difference in the recipe"
    all_of_lvu = tuple(range(1, 12))
    of_run = {"plain": all_of_lvu, "first": tuple(number for number in all_of_lvu if number not in (4, 8))}
    for table in section.tables:
        for line in table.lines:
            for cell in line.cells:
                assert (cell.departures == all_of_lvu) == (cell.state == "measured")
                assert all(one.departures == of_run[one.run] for one in cell.measurements)
    assert list(section.departures) == list(all_of_lvu)
    report.run([plain.path, first.path], None, paper=True, as_json=True)
    out, err = capfd.readouterr()
    assert json.loads(out)["paper"]["departures"]["8"].startswith("frame times. Here: frame i shows second i/10")
    page = (plain.path / "report.html").read_text(encoding="utf-8")
    for number, remark in section.departures.items():
        assert f"[{number}] {remark.split('.')[0]}" in err
        assert f"<b>[{number}]</b> {remark.split('.')[0]}" in page
    assert "[1-11]" in err


def test_an_average_departs_as_its_columns_do(tmp_path):
    card = load_card("lvu")
    runs = []
    for task in card.tasks:
        label, total = card.tasks[task].labels[0], card.expected[task]["test"].samples
        run = make_lvu_run(tmp_path, task, task=task)
        runs.append(evaluate(run, task=task, predictions=answers(task, {label: (total, total // 2)})))
    line = section_of(*runs).tables[0].lines[-1]
    assert line.cells[-1].departures == tuple(range(1, 13)), "the wording concerns two of the tasks"


def test_the_baseline_on_msvd_qa_is_held_against_ma_lmms_recipe(tmp_path):
    recipes = {"as ma-lmm": (), "as the paper": ("train.epochs=20", "train.batch_size=64")}
    found = {}
    for name, overrides in recipes.items():
        options = {"data.dataset": "msvd_qa", "data.task": "qa"}
        config = resolve(preset="ma-lmm-7b", options=options, overrides=overrides).config
        run = RunFolder.create(tmp_path / name, config, {"fingerprint": "5eed" * 16})
        (read,) = read_runs([run.path])
        assert misfits(read, "msvd_qa", {"preset": "ma-lmm-7b"}) == ()
        found[name] = [line for line in deviations(read) if line.startswith("train.")]
    assert found == {
        "as ma-lmm": [],
        "as the paper": ["train.epochs is 20, not 5", "train.batch_size is 64, not 128"],
    }


def test_without_runs_the_tables_are_printed_and_no_page_is_written_unless_asked_for(tmp_path, capsys):
    assert report.run([], None, paper=True) is None
    assert "Table 3: MSVD-QA" in capsys.readouterr().out
    page = report.run([], tmp_path / "paper.html", paper=True)
    assert "Figure 4: LVU relationship, aligned levels" in page.read_text(encoding="utf-8")
