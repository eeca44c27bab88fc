"""What the commands do with a trained model: what training started from, export, prediction from the exported folder.

The commands run in this process, through the entry point that the shell calls; the cache holds random arrays, and the
checkpoint random weights.
"""

import json

import pytest
from safetensors.torch import load_file

from pipeline import locations
from pipeline.stage2 import build_for_training

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
