"""What the commands do with a trained model: two ways of evaluation, export, prediction from the exported folder.

The commands run in this process, through the entry point that the shell calls; the cache holds random arrays, and the
checkpoint random weights.
"""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline import locations
from pipeline.cli import main
from pipeline.config import resolve
from pipeline.run_folder import RunFolder
from pipeline.stage2 import build_for_training
from stages.cache import FeatureCache
from stages.checkpoint import Checkpoints, Position
from stages.extraction import fingerprint, settle_precision
from stages.frame_plan import plan_frames
from stages.synthetic import generate

WIDTH, PATCHES = 96, 65
TASKS = ["relationship", "way_speaking", "scene", "director", "genre", "writer", "year"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("finished")
    generate(made / "data", seed=1, videos_per_split={"train": 4, "val": 4, "test": 4}, workers=1)
    return made


@pytest.fixture(scope="module")
def config(folder):
    options = {
        "data.videos": str(folder / "data" / "videos"),
        "data.annotations": str(folder / "data" / "annotations"),
        "cache.root": str(folder / "cache"),
    }
    return resolve(preset="tiny", options=options, overrides=[f"run.folder={folder}", "run.name=run"]).config


@pytest.fixture(scope="module")
def cache(folder, config):
    cache = FeatureCache.create_or_open(folder / "cache", fingerprint(config, settle_precision(config.extract)))
    random = np.random.default_rng(0)
    with cache.ledger.writer() as ledger:
        for video, times in plan_frames(locations.manifest_of(config)).times_s.items():
            features = random.standard_normal((len(times), PATCHES, WIDTH)).astype(np.float16)
            targets = random.standard_normal((len(times), WIDTH)).astype(np.float32)
            record = cache.write_video(video, times_s=times, features=features, targets=targets)
            ledger.done(video, checksum=record.checksum, attempts=1)
    return cache


@pytest.fixture(scope="module")
def run(folder, config, cache):
    loaded = build_for_training(config, cache, locations.manifest_of(config, ["train"]).samples[0])
    RunFolder.create(folder / "run", config, {"fingerprint": cache.fingerprint.digest})
    torch.manual_seed(0)
    for parameter in loaded.model.trained_parameters().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    Checkpoints(folder / "run").save(loaded.model.trained_tensors(), {}, Position(1, 8), keep=1)
    return folder / "run"


@pytest.fixture
def pipeline(monkeypatch, capfd):
    """Run a command; what it printed for machines and for people."""

    def call(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert (ended.value.code or 0) == status, said.err
        return said.out, said.err

    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what training starts from


def test_a_run_says_and_keeps_what_it_was_loaded_from(run):
    reports = json.loads((run / "loading.json").read_text())
    assert [report["source"] for report in reports] == ["bundled:tiny-instructblip"] * 2
    assert {name.split(".")[0] for name in reports[0]["taken"]} == {"language_model"}
    assert {name.split(".")[0] for name in reports[1]["taken"]} == {"qformer", "query_tokens", "language_projection"}
    started = reports[1]["initialised"]
    assert {name for name in started if not name.startswith("alignment.")} == {"qformer.frame_positions.weight"}
    assert any(name.startswith("alignment.heads.") for name in started)


def test_labels_that_are_too_long_are_named(config, cache, folder, capfd):
    language = config.language.model_copy(update={"max_new_tokens": 3})
    elsewhere = config.run.model_copy(update={"name": "short"})
    short = config.model_copy(update={"language": language, "run": elsewhere})
    build_for_training(short, cache, locations.manifest_of(config, ["train"]).samples[0])
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "language.max_new_tokens=3" in said[0]
    assert "'ex-boyfriend ex-girlfriend' (7)" in said[0]
    assert (folder / "short" / "loading.json").is_file()


# --- evaluation


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
        assert len(row["answers"]) == min(5, len(samples[row["sample"]].candidates))
        assert set(row["answers"]) <= set(samples[row["sample"]].candidates)
        assert row["log_probability"] == sorted(row["log_probability"], reverse=True)
        assert row["correct"] == (row["answers"][0] == row["gold"])
    for task, score in metrics.items():
        assert (score["method"], score["rank_score"]) == ("rank", "mean")
        assert score["correct"] == sum(row["correct"] for row in rows if row["task"] == task)
    assert "method" not in json.loads(generated[1].read_text())["scene"]


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


def test_the_sum_of_log_likelihoods_is_another_score(run, pipeline):
    pipeline("evaluate", "--run", run, "--method", "rank", "--set", "evaluate.rank_score=sum")
    assert json.loads((run / "metrics-rank.json").read_text())["scene"]["rank_score"] == "sum"
    row = lines_of(run / "predictions-rank.jsonl")[0]
    pipeline("evaluate", "--run", run, "--method", "rank")
    mean = lines_of(run / "predictions-rank.jsonl")[0]
    assert max(row["log_probability"]) < max(mean["log_probability"])


def test_an_unknown_method_is_one_line(run, pipeline):
    _, err = pipeline("evaluate", "--run", run, "--method", "guess", status=2)
    assert err.count("\n") == 1
    assert "evaluate.method: Input should be 'generate', 'rank' or 'both'; got 'guess'" in err


# --- export


def test_a_run_is_exported_and_the_export_predicts_as_the_run(run, folder, tmp_path, pipeline):
    target = tmp_path / "model"
    out, _ = pipeline("export", run, target, "--json")
    summary = json.loads(out)
    assert summary["checkpoint"] == "step-00000008"
    assert summary["bytes"] == sum(path.stat().st_size for path in target.iterdir())
    assert not any(name.startswith("alignment.") for name in load_file(target / "model.safetensors"))
    video = folder / "data" / "videos" / "test_0000.mp4"
    question = ["--question", "What is the scene of the movie?"]
    answers = [json.loads(pipeline("predict", video, *question, "--run", one, "--json")[0]) for one in (run, target)]
    for answer in answers:
        del answer["seconds"], answer["loading_seconds"]
    assert answers[0] == answers[1]
    # Settings may still be changed.
    out, _ = pipeline("predict", video, *question, "--run", target, "--json", "--set", "language.num_beams=2")
    assert len(json.loads(out)["answers"]) == 2


def test_an_export_goes_over_an_older_export_only(run, tmp_path, pipeline):
    pipeline("export", run, tmp_path, "--with-heads")
    assert any(name.startswith("alignment.") for name in load_file(tmp_path / "model.safetensors"))
    pipeline("export", run, tmp_path)
    assert not any(name.startswith("alignment.") for name in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    _, err = pipeline("export", run, tmp_path, status=2)
    assert err == (
        f"error: {tmp_path}: the folder holds something else than an exported model. Name a new or empty folder\n"
    )
    file = tmp_path / "README.md"
    assert "a file of this name is there already" in pipeline("export", run, file, status=2)[1]


def test_an_export_of_another_encoder_is_refused(run, folder, tmp_path, pipeline):
    pipeline("export", run, tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["encoder"]["digest"] = "0" * 64
    path.write_text(json.dumps(content))
    video = folder / "data" / "videos" / "test_0000.mp4"
    _, err = pipeline("predict", video, "--question", "where?", "--run", tmp_path, status=2)
    assert "not the visual encoder that the model was trained with" in err
    assert err.count("\n") == 1


def test_a_model_that_is_nowhere_is_one_line(folder, pipeline):
    video = folder / "data" / "videos" / "test_0000.mp4"
    _, err = pipeline("predict", video, "--question", "where?", "--run", "nobody/nothing", status=2)
    assert "the model hub gave no answer; got 'nobody/nothing'" in err
    _, err = pipeline("predict", video, "--question", "where?", "--run", folder / "nothing", status=2)
    assert "not a run: there is no config.yaml" in err
