"""Cards: the bundled ones reproduce the published counts, a user's own needs no code, mistakes are named."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.data.card_schema import FrameRule, VideoFiles
from stages.data.cards import build_manifest, bundled_cards, differences_from_expected, load_card
from stages.decode.alike import named_alike
from stages.decode.frames import DecodeError
from stages.decode.video_file import check_regular_file
from stages.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
LVU, MSVD = DATA / "lvu" / "annotation", DATA / "msvd_qa" / "annotation"
needs_lvu = pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
needs_msvd = pytest.mark.skipif(not MSVD.is_dir(), reason="the MSVD-QA annotations are not here")

CLIP = {"subset": "train", "duration": 130, "num_frames": 1598, "scene": "office", "scene_answer": "(a)"}


@pytest.fixture(scope="module")
def lvu():
    return build_manifest(load_card("lvu"), annotations=LVU, videos=None)


@pytest.fixture(scope="module")
def msvd():
    return build_manifest(load_card("msvd_qa"), annotations=MSVD, videos=None)


def test_three_cards_are_bundled():
    assert bundled_cards() == ("lvu", "msvd_qa", "synthetic")
    assert [load_card(name).name for name in bundled_cards()] == list(bundled_cards())


def test_windows_follow_the_published_rule():
    rule = load_card("lvu").frame_rule
    assert rule.spans(0.0, 119, 1480) == [(0.0, 99.0)]
    assert rule.spans(0.0, 160, 1900) == [(0.0, 99.0), (20.0, 119.0), (40.0, 139.0), (60.0, 159.0)]
    assert rule.spans(0.0, 50, 800) == [(0.0, 50.0)]  # a short video: denser than 1 fps, to its duration
    assert rule.spans(0.0, 50, 497) == [(0.0, 49.6)]  # fewer frames than the duration promises


def test_uniform_frames_span_the_whole_video():
    assert load_card("msvd_qa").frame_rule.spans(0.0, 7.2, 72) == [(0.0, 7.1)]


def test_windows_of_a_segment_start_where_it_starts():
    rule = FrameRule(kind="windows", num_frames=4, index_fps=10, history_s=4, stride_s=2.5)
    assert rule.spans(1.25, 11.0, 200) == [(1.2, 4.2), (3.7, 6.7), (6.2, 9.2)]


@needs_lvu
def test_lvu_reproduces_every_published_count(lvu):
    card = load_card("lvu")
    assert differences_from_expected(card, lvu) == ()
    assert Counter(sample.split for sample in lvu.samples) == {"train": 15612, "val": 3601, "test": 3110}
    assert len({(sample.split, sample.id.split(":")[1]) for sample in lvu.samples}) == 21054
    assert len(lvu.videos) == 8198
    assert lvu.tasks == tuple(card.tasks)


@needs_lvu
def test_lvu_samples_carry_prompt_label_and_unique_id(lvu):
    sample = next(sample for sample in lvu.samples if sample.id == "way_speaking:0bR6pUOhZo4_20")
    assert sample.prompt.replace("{}", sample.question) == "what is the way_speaking of the movie?"
    assert sample.candidates == ("explain", "confront", "discuss", "teach", "threaten")
    assert np.array_equal(sample.frame_times_s(), np.arange(20.0, 120.0))


@needs_lvu
def test_lvu_labels_are_in_the_order_of_the_answer_letters(lvu):
    tasks = load_card("lvu").tasks
    for split in lvu.splits:
        for entry in json.loads((LVU / f"{split}.json").read_text()).values():
            for task, card in tasks.items():
                if task in entry:
                    assert entry[f"{task}_answer"] == f"({'abcdefghi'[card.labels.index(entry[task])]})"


@needs_msvd
def test_msvd_reproduces_the_published_counts_and_keeps_the_question(msvd):
    assert differences_from_expected(load_card("msvd_qa"), msvd) == ()
    assert msvd.splits == ("val", "test")
    assert (len(msvd.select(splits=["test"]).videos), len(msvd.select(splits=["val"]).videos)) == (504, 245)
    raw = json.loads((MSVD / "qa_test.json").read_text())["0000000"]
    sample = next(sample for sample in msvd.samples if sample.id == "qa:test_0000000")
    assert (sample.question, sample.answer, sample.candidates) == (raw["question"], raw["answer"], None)
    assert sample.prompt.replace("{}", sample.question) == f"Question: {raw['question']} Short answer:"
    indices = np.rint(np.linspace(0, raw["frame_length"] - 1, 20))
    assert np.array_equal(sample.frame_times_s(), indices / 10)


@needs_msvd
def test_an_absent_split_is_an_error_only_when_asked_for_and_names_the_file(msvd):
    with pytest.raises(UserError, match=r"qa_train.json: file not found, so data set 'msvd_qa' has no split 'train'"):
        msvd.select(splits=["train"])


def test_other_counts_than_published_are_listed(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"v1": CLIP}))
    card = load_card("lvu")
    lines = differences_from_expected(card, build_manifest(card, annotations=tmp_path, videos=None))
    assert "scene train: 1 video and 2 samples, published 515 and 1202" in lines
    assert len(lines) == len(card.tasks)  # val and test are absent, which is not a difference


def test_a_video_is_found_by_any_listed_extension(tmp_path):
    entries = dict.fromkeys(("in_mp4", "in_mkv", "nowhere"), CLIP)
    (tmp_path / "train.json").write_text(json.dumps(entries))
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "in_mp4.mp4").touch()
    (videos / "in_mkv.mkv").touch()
    found = build_manifest(load_card("lvu"), annotations=tmp_path, videos=videos).videos
    assert [video.path for video in found.values()] == ["in_mp4.mp4", "in_mkv.mkv", "nowhere.mp4"]


def test_an_own_video_is_found_in_any_container_that_the_reader_opens(tmp_path):
    files = VideoFiles()
    names = ["a.gif", "b.ts", "c.MP4", "d.wmv", "e.mpg"]
    for name in names:
        (tmp_path / name).touch()
    assert [files.path_of(name[0], tmp_path) for name in names] == names


def test_an_absent_files_namesakes_are_named(tmp_path):
    for name in ("clip06.gif", "Clip06.txt", "clip060.mp4"):
        (tmp_path / name).touch()
    absent = [tmp_path / "clip06.mp4", tmp_path / "clip07.mp4", tmp_path / "nowhere" / "clip06.mp4"]
    assert named_alike(absent) == {absent[0]: "Clip06.txt, clip06.gif"}
    with pytest.raises(DecodeError, match=r"clip06.mp4; Clip06.txt, clip06.gif is there$"):
        check_regular_file(absent[0])


def lvu_error(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "train.json").write_text(text)
    with pytest.raises(UserError) as error:
        build_manifest(load_card("lvu"), annotations=folder, videos=None)
    line = str(error.value)
    assert line.startswith(str(folder / "train.json"))
    assert "\n" not in line
    return line.removeprefix(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"v1": {"subset": "train",\n "duration" 3}}', "/train.json:2:13: broken JSON: Expecting ':' delimiter"),
        ('{"v1": {}, "v1": {}}', "/train.json:1: key 'v1' appears twice in one object"),
        ("", "/train.json: broken JSON: the file is empty"),
        ("\ufeff", "/train.json: broken JSON: the file is empty"),
        ('{"v1":\n {"duration": 1},\n\n"v1": {}}', "/train.json:4: key 'v1' appears twice in one object"),
        (
            '{"v1": {"duration": 1,\n"duration": 2},\n"v2": {"duration": 3}}',
            "/train.json: key 'duration' appears twice",
        ),
        ([CLIP], "/train.json: must hold one JSON object; got 'list'"),
        ('{"v1":\n {"subset": "train"},\n"v2": {}}', "/train.json:1, video 'v1': missing key 'duration'"),
        (f'{{"v1":\n {json.dumps(CLIP)},\n"v2": {{}}}}', "/train.json:3, video 'v2': missing key 'subset'"),
        ({"v1": CLIP | {"duration": float("nan")}}, "video 'v1': duration: Input should be a finite number; got nan"),
        ({"v1": CLIP | {"num_frames": float("inf")}}, "video 'v1': num_frames: Input should be"),
        ({"v1": [1]}, "/train.json:1, video 'v1': must be an object of keys and values; got [1]"),
        ({"a/b": CLIP}, "/train.json:1, video 'a/b': video id cannot be used as a name"),
        ({"v1": CLIP | {"duration": 0}}, "video 'v1': duration: Input should be greater than 0; got 0"),
        ({"v1": CLIP | {"duration": -5}}, "video 'v1': duration: Input should be greater than 0; got -5"),
        ({"v1": CLIP | {"duration": "5"}}, "video 'v1': duration: Input should be a valid number; got '5'"),
        ({"v1": CLIP | {"num_frames": 1.5}}, "video 'v1': num_frames: Input should be a valid integer"),
        ({"v1": CLIP | {"scene": 3}}, "video 'v1': label of task 'scene' must be text; got 3"),
        ({"v1": CLIP | {"secne": "office"}}, "unknown key 'secne'; allowed: subset, duration, num_frames, relation"),
        ({"v1": CLIP | {"subset": "val"}}, "subset differs from the file's split; got 'val'; allowed: train"),
        ({"v1": {"subset": "train", "num_frames": 3}}, "video 'v1': missing key 'duration'"),
        (
            {"v1": CLIP | {"scene": "ofice"}},
            "/train.json:1, video 'v1': unknown label of task 'scene'; got 'ofice'; "
            "allowed: office, airport, school, hotel, prison, restaurant. Did you mean 'office'?",
        ),
    ],
)
def test_a_broken_lvu_file_is_one_line_that_names_the_place(tmp_path, content, message):
    assert message in lvu_error(tmp_path, content)


def test_splits_that_contradict_each_other_are_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"v1": CLIP}))
    (tmp_path / "val.json").write_text(json.dumps({"v1": CLIP | {"subset": "val", "duration": 131}}))
    with pytest.raises(UserError, match=r"val.json:1, video 'v1': video 'v1' was given before with duration_s 130"):
        build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)


def test_a_video_in_two_splits_of_one_task_is_refused(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"v1": CLIP}))
    (tmp_path / "val.json").write_text(json.dumps({"v1": CLIP | {"subset": "val"}}))
    with pytest.raises(UserError, match=r"val.json:1, video 'v1': sample id 'scene:v1_0' appears twice"):
        build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)


def test_missing_folders_and_files_are_named_with_the_way_to_get_them(tmp_path):
    card = load_card("lvu")
    with pytest.raises(UserError, match=r"gone: annotations folder not found. The card 'lvu' says under 'download'"):
        build_manifest(card, annotations=tmp_path / "gone", videos=None)
    with pytest.raises(UserError, match=r"gone: videos folder not found"):
        build_manifest(card, annotations=tmp_path, videos=tmp_path / "gone")
    with pytest.raises(UserError, match=r"train.json, .*val.json, .*test.json: file not found"):
        build_manifest(card, annotations=tmp_path, videos=None)
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(UserError, match="hold no samples of data set 'lvu'"):
        build_manifest(card, annotations=tmp_path, videos=None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"0": {"video": "v", "frame_length": 9, "question": "who?"}}, "question '0': missing key 'answer'"),
        ({"0": {"video": "v", "frame_length": 0, "question": "who?", "answer": "man"}}, "frame_length: Input should"),
        ({"0": {"video": "../v", "frame_length": 9, "question": "who?", "answer": "man"}}, "video id cannot be used"),
    ],
)
def test_a_broken_msvd_file_names_the_question(tmp_path, content, message):
    (tmp_path / "qa_val.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"qa_val.json:1, question '0': .*{message.rpartition(': ')[2]}"):
        build_manifest(load_card("msvd_qa"), annotations=tmp_path, videos=None)


# A data set of one's own: this card and these ten lines are all there is to write.
OWN_CARD = """
name: kitchen
title: What happens in my kitchen
annotations: {format: jsonl, file: kitchen.jsonl}
tasks:
  room: {labels: [kitchen, hall]}
  action: {prompt: "Question: {} Short answer:"}
frame_rule: {kind: windows, history_s: 10, stride_s: 10, num_frames: 10, index_fps: 10}
"""
OWN_LINES = """
{"video": "a1", "duration_s": 30.5, "task": "room", "question": "Which room is this?", "answer": "kitchen", "split": "train"}
{"video": "a1", "duration_s": 30.5, "task": "action", "question": "Who cuts bread?", "answer": "Anna", "split": "train"}
{"video": "a1", "duration_s": 30.5, "task": "action", "question": "Who eats it?", "answer": "Ben", "split": "train"}
{"video": "a2", "duration_s": 12, "task": "room", "question": "Which room is this?", "answer": "hall", "split": "train"}
{"video": "a2", "duration_s": 12, "start_s": 2.5, "end_s": 8, "task": "action", "question": "Who sits?", "answer": "Ben", "split": "train"}
{"video": "b1", "path": "more/b1.mov", "duration_s": 4.04, "task": "room", "question": "Which room is this?", "answer": "hall", "split": "val"}
{"video": "b2", "path": "/films/b2.mkv", "duration_s": 60, "task": "room", "question": "Which room is this?", "answer": "kitchen", "split": "val"}
{"video": "b2", "path": "/films/b2.mkv", "duration_s": 60, "start_s": 40, "task": "action", "question": "Who leaves?", "answer": "Ann.", "split": "val"}
{"video": "c1", "path": "https://example.org/c1.mp4", "duration_s": 9, "task": "room", "question": "Which room is this?", "answer": "hall", "split": "test"}
{"video": "c1", "path": "https://example.org/c1.mp4", "duration_s": 9, "task": "action", "question": "Who sings?", "answer": "nobody", "split": "test"}
"""  # noqa: E501


def own_dataset(folder, lines=OWN_LINES):
    (folder / "kitchen.yaml").write_text(OWN_CARD)
    (folder / "kitchen.jsonl").write_text(lines.lstrip("\n"))
    return build_manifest(load_card(folder / "kitchen.yaml"), annotations=folder, videos=None)


def test_a_users_own_data_set_is_one_card_and_one_jsonl_file(tmp_path):
    manifest = own_dataset(tmp_path)
    samples = {sample.id: sample for sample in manifest.samples}
    assert manifest.dataset == "kitchen"
    assert (manifest.tasks, manifest.splits) == (("room", "action"), ("train", "val", "test"))
    assert [video.path for video in manifest.videos.values()] == [
        "a1.mp4",
        "a2.mp4",
        "more/b1.mov",
        "/films/b2.mkv",
        "https://example.org/c1.mp4",
    ]
    # 30.5 s hold three windows of 10 s; 40..60 s of b2 hold two
    assert [name for name in samples if name.startswith("room:a1")] == [
        "room:a1_line1_0",
        "room:a1_line1_10",
        "room:a1_line1_20",
    ]
    assert [name for name in samples if name.startswith("action:b2")] == ["action:b2_line8_40", "action:b2_line8_50"]
    assert samples["action:b2_line8_50"].answer == "Ann."  # nothing is cleaned unless the card says so
    sample = samples["action:b2_line8_50"]
    assert sample.prompt.replace("{}", sample.question) == "Question: Who leaves? Short answer:"
    assert samples["action:a2_line5_2.5"].frame_times_s()[[0, -1]].tolist() == [2.5, 8.0]
    # 4.04 s at 10 fps are frames 0..39
    assert samples["room:b1_line6_0"].frame_times_s()[-1] == 3.9


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"task": "rom"}', r"kitchen.jsonl:2: unknown task; got 'rom'; allowed: room, action. Did you mean 'room'\?"),
        ('{"answer": "attic"}', r"kitchen.jsonl:2: unknown label of task 'room'; got 'attic'; allowed: kitchen, hall"),
        ('{"end_s": 31}', r"kitchen.jsonl:2: start_s and end_s are not in the video; got '0.0 and 31"),
        ('{"start_s": 8, "end_s": 8}', r"kitchen.jsonl:2: start_s and end_s are not in the video"),
        ('{"duration_s": 20}', r"kitchen.jsonl:2: video 'a1' was given before with duration_s 30.5"),
        ('{"spilt": "val"}', r"kitchen.jsonl:2: unknown key 'spilt'; .*Did you mean 'split'\?"),
        ('{"path": "../x.mp4"}', r"kitchen.jsonl:2: path: a relative path must stay below the videos folder"),
        (
            '{"video": "my clip"}',
            r"kitchen.jsonl:2: video id cannot be used.*\. Give the video a plain id.*under 'path'",
        ),
        ('{"video": "Küche"}', r"kitchen.jsonl:2: video id cannot be used.*\. Give the video a plain id.*under 'path'"),
    ],
)
def test_a_mistake_in_the_users_lines_is_named_with_its_line(tmp_path, line, message):
    first = OWN_LINES.strip().split("\n")[0]
    broken = json.dumps(json.loads(first) | json.loads(line))
    with pytest.raises(UserError, match=message):
        own_dataset(tmp_path, f"{first}\n{broken}\n")


def test_a_missing_jsonl_file_is_named(tmp_path):
    (tmp_path / "kitchen.yaml").write_text(OWN_CARD)
    with pytest.raises(UserError, match=r"kitchen.jsonl: file not found"):
        build_manifest(load_card(tmp_path / "kitchen.yaml"), annotations=tmp_path, videos=None)


def changed_card(**changes):
    return yaml.safe_dump(yaml.safe_load(OWN_CARD) | changes, sort_keys=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("title: a\nname: [", r"card.yaml:2:8: broken YAML"),
        ("just text", r"card.yaml: must be an object of keys and values"),
        (changed_card(titel="x"), r"card.yaml: unknown key 'titel'; allowed: name, title, .*Did you mean 'title'\?"),
        (
            changed_card(frame_rule={"kind": "uniform", "num_frame": 3, "index_fps": 10}),
            r"unknown key 'frame_rule.num_frame'; allowed: kind, num_frames, .*Did you mean 'num_frames'\?",
        ),
        (
            changed_card(tasks={"room": {"lables": ["a"]}}),
            r"unknown key 'tasks.room.lables'; .*Did you mean 'labels'\?",
        ),
        (
            changed_card(tasks={"year": {"labels": [0, 1]}}),
            r"tasks.year.labels.0: Input should be a valid string; got 0. Write it in quotes: \"0\"",
        ),
        (
            changed_card(tasks={"room": {"labels": ["yes", "no"]}}).replace("'", ""),
            r"tasks.room.labels.0: Input should be a valid string; got True. Write it in quotes, as in \"yes\": YAML",
        ),
        (changed_card(tasks={"room": {"labels": ["A."]}}, text="caption"), r"'A.' becomes 'a' under text: caption"),
        (changed_card(tasks={"room": {"labels": ["a", "a"]}}), r"tasks.room.labels names a label twice"),
        (changed_card(tasks={"room": {"prompt": "which?"}}), r"tasks.room.prompt 'which\?': .* needs '\{\}'"),
        (changed_card(tasks={"../room": {}}), r"task cannot be used as a name; got '../room'"),
        (
            changed_card(frame_rule={"kind": "windows", "num_frames": 3, "index_fps": 10}),
            r"needs history_s and stride_s",
        ),
        (changed_card(annotations={"format": "jsonl"}), r"annotations.0: format jsonl needs 'file'"),
        (changed_card(annotations={"format": "csv", "file": "x"}), r"annotations.0.format: Input should be 'lvu_json'"),
        (changed_card(videos={"pattern": "x.mp4"}), r"videos.pattern: must contain \{id\}"),
        (changed_card(expected={"rom": {}}), r"expected.rom is none of the tasks: room, action"),
        (
            changed_card(expected={"room": {"test": {"videos": 1, "sample": 2}}}),
            r"unknown key 'expected.room.test.sample'; allowed: videos, samples, majority_floor",
        ),
    ],
)
def test_a_mistake_in_a_card_is_one_line_with_file_and_key(tmp_path, text, message):
    (tmp_path / "card.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_card(tmp_path / "card.yaml")
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"got 'lvuu'; allowed: lvu, msvd_qa, synthetic, or .*Did you mean 'lvu'\?"):
        load_card("lvuu")
    with pytest.raises(UserError, match=r"none.yaml: file not found"):
        load_card(tmp_path / "none.yaml")
