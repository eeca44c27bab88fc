"""`pipeline evaluate` on a finished model: what it writes, says, records and refuses.

The commands run in this process, through the entry point that the shell calls; the cache holds random arrays, and the
checkpoint random weights.
"""

import hashlib
import json
import re
import shutil

import pytest
import torch
import yaml

from model.language import FrozenLanguageModel
from pipeline.runs.results import EvaluationRecord, read_predictions, write_results
from pipeline.runs.run_folder import RunFolder
from pipeline.settings import locations
from pipeline.settings.config import overlay, resolve
from pipeline.studies.members import Training, is_evaluated
from stages.config import EvaluateConfig
from stages.evaluate.answering import first_words
from stages.evaluate.scoring import TaskScore, labels_of, majority_answers, score
from stages.networks.tokens import Tokenizers
from stages.records import parse_record
from stages.studies.study import Member
from tests.finished_run import fill_cache
from tests.in_this_process import lines_of

TASKS = ["relationship", "way_speaking", "scene", "director", "genre", "writer", "year"]


@pytest.fixture(scope="module")
def generated(run):
    """Where the beam search's files are, and what is in them after an evaluation without options."""
    return run / "predictions.jsonl", run / "metrics.json"


def test_ranking_orders_the_candidates_and_leaves_the_beams_files_alone(run, config, generated, pipeline):
    pipeline("evaluate", "--run", run)
    before = [path.read_bytes() for path in generated]
    out, err = pipeline("evaluate", "--run", run, "--method", "rank", "--json")
    assert [path.read_bytes() for path in generated] == before
    assert "accuracy of ranked candidates on test" in err
    metrics = json.loads((run / "metrics-rank.json").read_text())
    assert json.loads(out) == metrics
    assert list(metrics) == TASKS
    samples = {sample.id: sample for sample in locations.manifest_of(config, ["test"]).samples}
    rows = lines_of(run / "predictions-rank.jsonl")
    assert {row["sample"] for row in rows} == samples.keys()
    for row in rows:
        # All of them, so that likelihoods can be averaged over a video's windows.
        assert sorted(row["answers"]) == sorted(samples[row["sample"]].candidates)
        assert row["log_probability"] == sorted(row["log_probability"], reverse=True)
        assert row["correct"] == (row["answers"][0] == row["gold"])
    for task, one in metrics.items():
        assert (one["method"], one["top5"], one["no_label"]) == ("rank", None, 0.0)
        assert one["correct"] == sum(row["correct"] for row in rows if row["task"] == task)
        assert one["videos"]["n"] == one["num_videos"] == 4
        assert 0 <= one["videos"]["correct_likelihood"] <= 4
    assert json.loads(generated[1].read_text())["scene"]["method"] == "generate"


def test_both_methods_give_what_each_gives_alone(run, pipeline):
    pipeline("evaluate", "--run", run, "--split", "val", "--method", "generate")
    pipeline("evaluate", "--run", run, "--split", "val", "--set", "evaluate.method=rank")
    names = ("predictions{}-val.jsonl", "metrics{}-val.json")
    files = [run / name.format(suffix) for name in names for suffix in ("", "-rank")]
    alone = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    out, err = pipeline("evaluate", "--run", run, "--split", "val", "--method", "both", "--json")
    assert [path.read_bytes() for path in files] == alone
    assert err.index("accuracy on val") < err.index("accuracy of ranked candidates on val")
    found = json.loads(out)
    assert found == {
        method: json.loads((run / f"metrics{suffix}-val.json").read_text())
        for method, suffix in (("generate", ""), ("rank", "-rank"))
    }


def test_the_number_of_rows_and_of_samples_changes_no_ranking(run, pipeline):
    pipeline("evaluate", "--run", run, "--method", "rank")
    whole = lines_of(run / "predictions-rank.jsonl")
    pipeline(
        "evaluate", "--run", run, "--method", "rank", "--set", "evaluate.rank_rows=3", "--set", "evaluate.batch_size=5"
    )
    for mine, theirs in zip(lines_of(run / "predictions-rank.jsonl"), whole, strict=True):
        assert mine["answers"] == theirs["answers"]
        assert mine["log_probability"] == pytest.approx(theirs["log_probability"], rel=1e-4)


def test_what_does_not_fit_is_answered_in_smaller_parts_with_the_same_answers(run, pipeline, monkeypatch, caplog):
    """Of the search three samples fit, of the ranking six rows; each halving is one line."""
    files = [run / "predictions.jsonl", run / "predictions-rank.jsonl"]
    pipeline("evaluate", "--run", run, "--method", "both")
    whole = [lines_of(path) for path in files]
    search, rank = FrozenLanguageModel.generate, FrozenLanguageModel.rank

    def small_search(model, queries, *rest):
        if len(queries) > 3:
            raise MemoryError
        return search(model, queries, *rest)

    def small_rank(model, queries, *rest, rows, **more):
        if rows > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rank(model, queries, *rest, rows=rows, **more)

    monkeypatch.setattr(FrozenLanguageModel, "generate", small_search)
    monkeypatch.setattr(FrozenLanguageModel, "rank", small_rank)
    pipeline("evaluate", "--run", run, "--method", "both", "--set", "evaluate.batch_size=auto")
    assert "too little memory: going on with evaluate.batch_size=2, answers are the same" in caplog.messages
    assert caplog.messages[-1] == "too little memory: going on with evaluate.rank_rows=4, scores are the same"
    for path, answers in zip(files, whole, strict=True):
        for mine, theirs in zip(lines_of(path), answers, strict=True):
            assert mine["answers"] == theirs["answers"]
            assert mine["log_probability"] == pytest.approx(theirs["log_probability"], rel=1e-4)
    monkeypatch.setattr(FrozenLanguageModel, "generate", lambda *_: torch.empty(2**50))
    _, err = pipeline("evaluate", "--run", run, status=1)
    assert err.splitlines()[-1].startswith("error: the memory does not hold 1 sample while answering")


def test_the_sum_of_log_likelihoods_is_another_score(run, pipeline):
    pipeline("evaluate", "--run", run, "--method", "rank", "--set", "evaluate.rank_score=sum")
    record = json.loads((run / "evaluation-rank.json").read_text())
    assert record["settings"]["evaluate"]["rank_score"] == "sum"
    assert record["overrides"] == ["evaluate.rank_score=sum", "evaluate.method=rank"]
    row = lines_of(run / "predictions-rank.jsonl")[0]
    pipeline("evaluate", "--run", run, "--method", "rank")
    mean = lines_of(run / "predictions-rank.jsonl")[0]
    assert max(row["log_probability"]) < max(mean["log_probability"])


def test_an_unknown_method_is_one_line(run, pipeline):
    _, err = pipeline("evaluate", "--run", run, "--method", "guess", status=2)
    assert err.count("\n") == 1
    assert "evaluate.method: Input should be 'generate', 'rank' or 'both'; got 'guess'" in err


def test_metrics_are_the_score_of_the_predictions(run, config, pipeline):
    pipeline("evaluate", "--run", run)
    manifest = locations.manifest_of(config)
    found = score(
        read_predictions(run / "predictions.jsonl"),
        split="test",
        method="generate",
        labels=labels_of(manifest.samples),
        train_majority=majority_answers(one for one in manifest.samples if one.split == "train"),
        resamples=EvaluateConfig().resamples,
        seed=EvaluateConfig().resample_seed,
    )
    metrics = json.loads((run / "metrics.json").read_text())
    assert {task: parse_record(TaskScore, entry, task) for task, entry in metrics.items()} == found
    assert all(one.ci95_videos is not None and one.train_floor is not None for one in found.values())
    assert {kind for one in found.values() for kind in one.answer_types} == set()


def test_an_evaluation_says_which_parameters_answered_what_under_which_settings(run, config, cache, pipeline):
    pipeline("evaluate", "--run", run, "--set", "language.num_beams=3", "--set", "evaluate.resamples=50")
    record = json.loads((run / "evaluation.json").read_text())
    weights = run / "checkpoints" / "step-00000008" / "model.safetensors"
    assert record["format"] == "diff-lmm-evaluation-1"
    assert (record["split"], record["method"]) == ("test", "generate")
    assert record["model"] == {
        "source": str(run),
        "kind": "run",
        "checkpoint": "step-00000008",
        "epoch": 1,
        "step": 8,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    samples = len(locations.manifest_of(config, ["test"]).samples)
    assert record["data"] == {
        "dataset": "synthetic",
        "task": "all",
        "cache": str(cache.root),
        "fingerprint": cache.fingerprint.digest,
        "samples": samples,
        "samples_left_out": 0,
        "videos_left_out": [],
        "videos_damaged": [],
        "samples_beyond_damage": [],
    }
    assert record["overrides"] == ["language.num_beams=3", "evaluate.resamples=50"]
    assert record["settings"]["language"]["num_beams"] == 3
    assert record["settings"]["evaluate"]["resamples"] == 50
    assert record["made"].keys() >= {"created", "git", "versions"}
    metrics = json.loads((run / "metrics.json").read_text())
    # Three beams have no top-5.
    assert {one["top5"] for one in metrics.values()} == {None}
    pipeline("evaluate", "--run", run)
    assert json.loads((run / "evaluation.json").read_text())["overrides"] == []


def test_the_tables_fit_a_screen_of_80_columns(run, pipeline, monkeypatch):
    monkeypatch.setattr("pipeline.screen.console.RESULTS.width", 80)
    out, err = pipeline("evaluate", "--run", run, "--method", "both")
    assert "relationship" not in err
    lines = out.splitlines()
    assert max(len(line) for line in lines if "relationship" in line) <= 80
    # Each task is one line in each of the two tables of both methods: nothing is wrapped or cut.
    assert sum("way_speaking" in line for line in lines) == 4
    assert "…" not in out
    found = json.loads((run / "metrics.json").read_text())["way_speaking"]
    low, high = found["ci95_videos"]
    assert f"{100 * low:.1f}-{100 * high:.1f}" in next(line for line in lines if "way_speaking" in line)


@pytest.mark.parametrize("method", ["generate", "rank"])
def test_without_a_terminal_lines_show_how_far_it_is(run, pipeline, monkeypatch, method, tmp_path):
    monkeypatch.setattr("pipeline.screen.console.FIRST_LINE_S", 0.05)
    monkeypatch.setattr("pipeline.screen.console.LINE_EVERY_S", 0.05)
    how = ["--method", method, "--set", "evaluate.batch_size=7", "--output", tmp_path]
    out, err = pipeline("evaluate", "--run", run, *how)
    total = len(lines_of(next(tmp_path.glob("predictions*.jsonl"))))
    *within, last = [line for line in err.splitlines() if line.startswith("evaluate test ")]
    shape = rf"evaluate test \d+/{total} samples, [\d.,]+ samples/(s|min), 0:\d\d:\d\d left"
    assert any(re.fullmatch(shape, line) for line in within), err
    assert re.fullmatch(rf"evaluate test {total}/{total} samples in 0:\d\d:\d\d, [\d.,]+ samples/(s|min)", last)
    assert "samples/" not in out


def test_videos_that_failed_are_counted_as_left_out(run, config, folder, tmp_path, pipeline):
    video = locations.manifest_of(config, ["test"]).samples[0].video
    fill_cache(folder / "partial", config, failed={video})
    pipeline("evaluate", "--run", run, "--cache", folder / "partial", "--output", tmp_path)
    data = json.loads((tmp_path / "evaluation.json").read_text())["data"]
    samples = locations.manifest_of(config, ["test"]).samples
    missing = sum(sample.video == video for sample in samples)
    assert (data["samples"], data["samples_left_out"]) == (len(samples) - missing, missing)
    assert data["videos_left_out"] == [video]
    assert {one["num_videos"] for one in json.loads((tmp_path / "metrics.json").read_text()).values()} == {3}
    _, err = pipeline("compare", tmp_path, run, status=2)
    assert f"0 only in {tmp_path}, {missing} only in {run}" in err


def test_one_task_of_a_run_does_not_overwrite_the_whole(run, tmp_path, pipeline):
    pipeline("evaluate", "--run", run)
    _, err = pipeline("evaluate", "--run", run, "--task", "scene", status=2)
    assert err.count("\n") == 1
    assert f"{run}: results on other data than the model's own" in err
    assert "Name one with --output" in err
    out, _ = pipeline("evaluate", "--run", run, "--task", "scene", "--output", tmp_path / "new", "--json")
    whole = json.loads((run / "metrics.json").read_text())
    assert json.loads(out) == {"scene": whole["scene"]}
    assert "task" not in json.loads(out)["scene"]
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text())["overrides"] == ['data.task="scene"']
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("{}")
    for more in (["--output", other], ["--task", "scene", "--output", run]):
        _, err = pipeline("evaluate", "--run", run, *more, status=2)
        assert f"{more[-1]}: this is a run's folder, and these would stand there for the run's own results" in err
    file = tmp_path / "file"
    file.touch()
    _, err = pipeline("evaluate", "--run", run, "--output", file, status=2)
    assert f"{file}: this is a file" in err


@pytest.fixture(scope="module")
def own_card(folder):
    """A data set of open questions about the synthetic videos, in the frames that are cached of them."""
    about = {"task": "qa", "answer": "man", "split": "test"}
    annotated = json.loads((folder / "data" / "annotations" / "test.json").read_text())
    lines = [
        {"video": video, "duration_s": float(entry["duration"]), "question": question, **about}
        for video, entry in annotated.items()
        for question in ("who is it?", "what is it?", "is it red?")
    ]
    (folder / "own").mkdir()
    (folder / "own" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = {
        "name": "own",
        "title": "Open questions",
        "annotations": {"format": "jsonl", "file": "samples.jsonl"},
        "tasks": {"qa": {"prompt": "Question: {} Short answer:"}},
        "frame_rule": {"kind": "windows", "history_s": 8, "stride_s": 8, "num_frames": 8, "index_fps": 10},
    }
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    return path


def test_a_run_answers_another_data_set_of_open_questions(run, cache, own_card, tmp_path, pipeline):
    options = ["--dataset", own_card, "--annotations", own_card.with_suffix(""), "--cache", cache.root]
    _, err = pipeline("evaluate", "--run", run, *options, status=2)
    assert "with --output" in err
    options += ["--output", tmp_path, "--json"]
    whole = json.loads(pipeline("evaluate", "--run", run, *options)[0])["qa"]
    assert whole["answer_types"].keys() == {"who", "what", "other"}
    assert sum(one["n"] for one in whole["answer_types"].values()) == whole["n"]
    assert (whole["macro"], whole["classes"], whole["confusion"], whole["no_label"]) == (None, [], None, None)
    # Three questions a video, and no training split.
    assert (whole["videos"], whole["train_floor"]) == (None, None)
    rows = lines_of(tmp_path / "predictions.jsonl")
    assert {row["answer_type"] for row in rows} == {"who", "what", "other"}
    pipeline("evaluate", "--run", run, *options, "--set", "language.answer_words=1")
    cut = lines_of(tmp_path / "predictions.jsonl")
    assert [row["answers"] for row in cut] == [[text.split(" ")[0] for text in row["answers"]] for row in rows]
    assert any(" " in text for row in rows for text in row["answers"])
    _, err = pipeline("evaluate", "--run", run, *options, "--method", "rank", status=2)
    assert "task 'qa' has open answers" in err
    pipeline("evaluate", "--run", run, *options)
    out, err = pipeline("evaluate", "--run", run, *options, "--method", "both")
    assert json.loads(out) == {"generate": {"qa": whole}}
    assert "12 of 12 samples have open answers, with nothing to rank" in err
    assert lines_of(tmp_path / "predictions.jsonl") == rows
    assert not (tmp_path / "predictions-rank.jsonl").exists()


def test_a_studys_open_questions_asked_both_ways_are_done_once_they_are_generated(run, own_card, tmp_path, pipeline):
    shutil.copytree(run, tmp_path / "open")
    data = {"data.dataset": str(own_card), "data.annotations": str(own_card.with_suffix(""))}
    more = {"evaluate.method": "both", "run.folder": str(tmp_path), "run.name": "open"}
    config = overlay(RunFolder.open(run).config(), {**data, **more}, "this test")
    RunFolder(tmp_path / "open").keep(config)
    one = Training(Member(name="open", settings={"train.seed": 0}), 0, config, "")
    (tmp_path / "open" / "metrics.json").unlink(missing_ok=True)
    assert not is_evaluated(one)
    pipeline("evaluate", "--run", tmp_path / "open")
    assert is_evaluated(one)


def test_both_methods_rank_what_has_candidates_and_generate_the_rest(run, cache, own_card, tmp_path, pipeline):
    card = yaml.safe_load(own_card.read_text())
    card["tasks"]["who"] = {**card["tasks"]["qa"], "labels": ["man", "woman"]}
    mixed = own_card.with_name("mixed.yaml")
    mixed.write_text(yaml.safe_dump(card), encoding="utf-8")
    samples = tmp_path / "samples.jsonl"
    lines = lines_of(own_card.with_suffix("") / "samples.jsonl")
    closed = [{**line, "task": "who"} for line in lines if line["question"].startswith("who")]
    samples.write_text("".join(json.dumps(line) + "\n" for line in [*lines, *closed]))
    options = ["--dataset", mixed, "--annotations", tmp_path, "--cache", cache.root, "--output", tmp_path / "out"]
    out, err = pipeline("evaluate", "--run", run, *options, "--method", "both", "--json")
    assert f"{len(lines)} of {len(lines) + len(closed)} samples have open answers" in err
    generated, ranked = (lines_of(tmp_path / "out" / f"predictions{name}.jsonl") for name in ("", "-rank"))
    assert {row["task"] for row in generated} == {"qa", "who"}
    assert (len(generated), len(ranked)) == (len(lines) + len(closed), len(closed))
    assert {tuple(sorted(row["answers"])) for row in ranked} == {("man", "woman")}
    assert {method: list(scores) for method, scores in json.loads(out).items()} == {
        "generate": ["qa", "who"],
        "rank": ["who"],
    }
    record = json.loads((tmp_path / "out" / "evaluation-rank.json").read_text())
    assert record["data"]["samples"] == len(closed)


def test_questions_that_are_too_long_are_counted_once_and_keep_the_words_that_ask_for_an_answer(
    run, cache, own_card, tmp_path, pipeline
):
    options = ["--dataset", own_card, "--annotations", own_card.with_suffix(""), "--cache", cache.root]
    options += ["--output", tmp_path]
    short = pipeline("evaluate", "--run", run, *options)[1]
    whole = [row["question"] for row in lines_of(tmp_path / "predictions.jsonl")]
    longest = max(len(open_tokenizers(run).language(prompt)["input_ids"]) for prompt in whole)
    settings = ["--set", f"language.max_prompt_tokens={longest - 2}"]
    _, err = pipeline("evaluate", "--run", run, *options, *settings)
    asked = [row["question"] for row in lines_of(tmp_path / "predictions.jsonl")]
    cut = sum(one != other for one, other in zip(asked, whole, strict=True))
    assert 0 < cut <= len(whole)
    assert "too long" not in short
    assert err.count("too long") == 1
    assert f"warning: {cut} of {len(whole)} questions are too long for qformer.max_text_tokens=" in err
    for prompt, question in zip(asked, whole, strict=True):
        assert prompt.startswith("Question: ")
        assert prompt.endswith(" Short answer:")
        assert question.endswith(prompt.removeprefix("Question: "))


def open_tokenizers(run):
    return Tokenizers.load(RunFolder.open(run).config())


def test_another_data_set_has_its_own_default_folders(run, own_card, tmp_path, pipeline, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, err = pipeline("evaluate", "--run", run, "--dataset", own_card, "--output", tmp_path, status=2)
    assert "caches/own-" in err


def test_results_that_cannot_be_written_leave_no_metrics_behind(run, tmp_path, pipeline):
    pipeline("evaluate", "--run", run, "--output", tmp_path)
    (tmp_path / "predictions.jsonl").unlink()
    (tmp_path / "predictions.jsonl" / "taken").mkdir(parents=True)
    rows = read_predictions(run / "predictions.jsonl")
    record = parse_record(EvaluationRecord, json.loads((tmp_path / "evaluation.json").read_text()), "evaluation.json")
    with pytest.raises(OSError, match=r"predictions\.jsonl"):
        write_results(tmp_path, record, rows, {})
    assert not (tmp_path / "metrics.json").exists()


def test_msvd_qa_counts_the_first_word_alone():
    language = resolve(options={"data.dataset": "msvd_qa"}).config.language
    assert language.answer_words == 1
    assert first_words("a man running", language.answer_words) == "a"
    assert first_words("a man running", None) == "a man running"
    assert resolve().config.language.answer_words is None


# --- exported models


def test_an_export_is_evaluated_as_the_run_it_is_from(run, folder, tmp_path, pipeline):
    pipeline("evaluate", "--run", run)
    pipeline("export", run, tmp_path)
    data = ["--annotations", folder / "data" / "annotations", "--cache", folder / "cache"]
    pipeline("evaluate", "--run", tmp_path, *data)
    assert lines_of(tmp_path / "predictions.jsonl") == lines_of(run / "predictions.jsonl")
    assert (tmp_path / "metrics.json").read_text() == (run / "metrics.json").read_text()
    model = json.loads((tmp_path / "evaluation.json").read_text())["model"]
    assert (model["kind"], model["checkpoint"], model["step"]) == ("export", None, None)
    assert model["sha256"] == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    out, _ = pipeline("compare", tmp_path, run, "--json")
    assert {one["difference"] for one in json.loads(out)["tasks"].values()} == {0.0}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"name": "mine"}, "data set 'mine', whose card is not shipped. Give the card's file with --dataset"),
        ({"tasks": {"scene": {"prompt": "where?", "labels": ["office"]}}}, "another wording of task 'scene': 'where?'"),
        (
            {
                "frame_rule": {
                    **{"kind": "windows", "history_s": 8, "stride_s": 8, "num_frames": 8, "index_fps": 10},
                    "frame_offset": -1,
                }
            },
            "data.frame_offset=-1; got 0. Add --set data.frame_offset=-1",
        ),
    ],
    ids=["card", "prompt", "frames"],
)
def test_an_export_of_other_data_is_not_asked_the_wrong_questions(run, tmp_path, pipeline, changed, said):
    pipeline("export", run, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["description"]["card"] |= {**changed, "expected": {}}
    path.write_text(json.dumps(content))
    _, err = pipeline("evaluate", "--run", tmp_path, status=2)
    assert err.count("\n") == 1
    assert said in err
