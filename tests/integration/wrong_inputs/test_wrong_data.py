"""Videos and annotations that are missing or broken."""

import json
import re

import pytest


def test_a_missing_videos_folder(made, refused):
    assert refused("extract", *made.options(videos="/nowhere/videos")) == (
        "/nowhere/videos: videos folder not found. The card 'synthetic' says under 'download' how to get it"
    )


@pytest.mark.parametrize("command", ["extract", "train"])
def test_a_missing_annotations_folder(made, refused, command):
    assert refused(command, *made.options(annotations="/nowhere/annotations")) == (
        "/nowhere/annotations: annotations folder not found. The card 'synthetic' says under 'download' how to get it"
    )


@pytest.mark.parametrize("command", ["extract", "train"])
def test_a_broken_line_in_an_annotation_file(made, refused, tmp_path, command):
    lines = (made.annotations / "train.json").read_text().split("\n")
    lines[2] = lines[2].replace(":", "", 1)
    (tmp_path / "train.json").write_text("\n".join(lines))
    said = refused(command, *made.options(annotations=tmp_path))
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/train\.json:3:\d+: broken JSON: Expecting ':' delimiter", said)


def test_a_label_that_does_not_exist(made, refused, tmp_path):
    text = (made.annotations / "train.json").read_text()
    (tmp_path / "train.json").write_text(re.sub(r'"scene": "\w+"', '"scene": "offise"', text, count=1))
    said = refused("extract", *made.options(annotations=tmp_path))
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/train\.json:\d+, video '\w+': unknown label of task 'scene'; got 'offise'; "
        r"allowed: office, hotel, prison, restaurant\. Did you mean 'office'\?",
        said,
    )


def test_a_broken_line_in_a_list_of_own_samples(made, refused, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "name: own\ntitle: own\nannotations: {format: jsonl, file: samples.jsonl}\nvideos: {pattern: '{id}.mp4'}\n"
        "text: caption\ntasks: {scene: {prompt: '{}', labels: [office, hotel]}}\n"
        "frame_rule: {kind: uniform, num_frames: 4, index_fps: 10}\n"
    )
    good = {"video": "v", "duration_s": 9, "task": "scene", "question": "where?", "answer": "hotel", "split": "train"}
    path = tmp_path / "samples.jsonl"
    options = made.options(annotations=tmp_path, dataset=tmp_path / "own.yaml")

    path.write_text(f"{json.dumps(good)}\n{{broken\n")
    assert refused("train", *options).startswith(f"{path}:2:2: broken JSON: ")
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps({**good, 'task': 'scen'})}\n")
    said = refused("train", *options)
    assert said == f"{path}:3: unknown task; got 'scen'; allowed: scene. Did you mean 'scene'?"
