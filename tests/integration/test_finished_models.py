"""What the commands do with a trained model: what training started from, export, prediction from the exported folder.

The commands run in this process, through the entry point that the shell calls; the cache holds random arrays, and the
checkpoint random weights.
"""

import json
import os
import stat

import pytest
from safetensors.torch import load_file

from pipeline.runs.models import build_for_training
from pipeline.settings import locations

# --- what training starts from


def test_a_run_says_and_keeps_what_it_was_loaded_from(run):
    reports = json.loads((run / "loading.json").read_text())
    assert [report["source"] for report in reports] == ["bundled:tiny-instructblip"] * 2
    assert {name.split(".")[0] for name in reports[0]["taken"]} == {"language_model"}
    assert {name.split(".")[0] for name in reports[1]["taken"]} == {"qformer", "query_tokens", "language_projection"}
    started = reports[1]["initialised"]
    assert {name for name in started if not name.startswith("alignment.")} == {"qformer.frame_positions.weight"}
    assert any(name.startswith("alignment.heads.") for name in started)


def test_labels_that_are_too_long_are_named(config, cache, capfd):
    language = config.language.model_copy(update={"max_new_tokens": 3})
    elsewhere = config.run.model_copy(update={"name": "short"})
    short = config.model_copy(update={"language": language, "run": elsewhere})
    build_for_training(short, cache, locations.manifest_of(config, ["train"]).samples[0])
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "language.max_new_tokens=3" in said[0]
    assert "'ex-boyfriend ex-girlfriend' (6)" in said[0]


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
    out, _ = pipeline("predict", video, *question, "--run", run, "--json", "--set", "data.frame_offset=-1")
    shifted = json.loads(out)
    assert (shifted["from_s"], shifted["to_s"]) == (0.0, pytest.approx(answers[0]["to_s"] - 0.1))


def test_an_export_goes_over_an_older_export_only_and_only_when_told_to(run, tmp_path, pipeline):
    pipeline("export", run, tmp_path, "--with-heads")
    assert any(name.startswith("alignment.") for name in load_file(tmp_path / "model.safetensors"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert pipeline("export", run, tmp_path, status=2)[1] == (
        f"error: {tmp_path}: an exported model is there already. "
        "Name another folder, or add --overwrite to replace it\n"
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    pipeline("export", run, tmp_path, "--overwrite")
    assert not any(name.startswith("alignment.") for name in load_file(tmp_path / "model.safetensors"))
    (tmp_path / "config.json").write_text("{}")
    _, err = pipeline("export", run, tmp_path, "--overwrite", status=2)
    assert err == (
        f"error: {tmp_path}: the folder holds something else than an exported model. Name a new or empty folder\n"
    )
    file = tmp_path / "README.md"
    assert "a file of this name is there already" in pipeline("export", run, file, status=2)[1]


def test_a_prediction_ranks_the_labels_of_the_task_that_asks_the_question(run, config, folder, pipeline):
    """As the evaluation ranks them, whose features are the cache's random ones here; only the labels are compared."""
    video = folder / "data" / "videos" / "test_0000.mp4"
    ask = ["predict", video, "--run", run, "--method", "rank", "--json", "--question"]
    labels = {name: task.labels for name, task in locations.card_of(config).tasks.items()}
    found = json.loads(pipeline(*ask, "What is the SCENE of the movie?")[0])
    assert found["method"] == "rank"
    assert sorted(found["answers"]) == sorted(labels["scene"])
    assert found["answer"] == found["answers"][0]
    assert found["log_probability"] == sorted(found["log_probability"], reverse=True)
    found = json.loads(pipeline(*ask, "where is it?", "--task", "genre")[0])
    assert sorted(found["answers"]) == sorted(labels["genre"])
    _, err = pipeline(*ask, "where is it?", status=2)
    assert err == (
        f"error: --task: the task that has the candidates to rank is not known; allowed: {', '.join(labels)}\n"
    )
    _, err = pipeline(*ask, "where is it?", "--task", "gen", status=2)
    assert "is not known; got 'gen'; allowed: " in err
    _, err = pipeline("predict", video, "--question", "where?", "--run", run, "--method", "beam", status=2)
    assert err == "error: --method: unknown method; got 'beam'; allowed: generate, rank\n"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_every_file_of_a_run_and_an_export_has_the_permissions_of_the_umask(cache, folder, tmp_path, pipeline, mask):
    data = ["--annotations", folder / "data" / "annotations", "--cache", cache.root]
    here = ["--set", f"run.folder={tmp_path}", "--name", "run", "--set", "train.epochs=1"]
    before = os.umask(mask)
    try:
        said = pipeline("train", "--preset", "tiny", *data, *here)[1]
        said += pipeline("evaluate", "--run", tmp_path / "run")[1]
        pipeline("report", tmp_path / "run")
        pipeline("export", tmp_path / "run", tmp_path / "model")
    finally:
        os.umask(before)
    written = [path for name in ("run", "model") for path in (tmp_path / name).rglob("*")]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".yaml", ".jsonl", ".html", ".md"}
    permissions = {path: stat.S_IMODE(path.stat().st_mode) for path in written}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~mask for path in written}
    assert permissions == expected
    assert "synthetic videos only" not in said, "these are the synthetic videos"


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
    for run in (folder / "nothing", "runs/nothing"):  # a run wherever there may be one, and the hub is not asked
        _, err = pipeline("predict", video, "--question", "where?", "--run", run, status=2)
        assert f"{run}: not a run: there is no config.yaml" in err
