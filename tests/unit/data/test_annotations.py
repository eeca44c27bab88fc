"""Annotation forms: each release reads as the same samples, the published tables hold, mistakes are named."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from stages.data.cards import build_manifest, differences_from_expected, load_card
from stages.errors import UserError

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
LVU, MSVD = DATA / "lvu" / "annotation", DATA / "msvd_qa" / "annotation"
needs_lvu = pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
needs_msvd = pytest.mark.skipif(not MSVD.is_dir(), reason="the MSVD-QA annotations are not here")

# Per label in order: training, validation and test videos, and test windows.
LVU_CLASSES = {
    "relationship": ["83/21/21|42", "3/2/0|0", "35/16/12|36", "17/10/8|13"],
    "way_speaking": ["247/61/53|119", "195/47/39|111", "235/44/54|133", "100/20/17|42", "99/24/26|68"],
    "scene": ["65/8/12|32", "31/4/10|27", "187/41/21|51", "62/13/15|39", "124/33/13|41", "46/9/11|28"],
    "director": [
        *("103/25/44|102", "98/36/12|53", "90/39/8|13", "77/0/15|25"),
        *("76/28/10|28", "83/15/10|33", "89/8/8|14", "64/12/0|0"),
    ],
    "genre": ["759/149/128|271", "679/157/159|407", "694/127/158|288", "678/136/143|325"],
    "writer": [
        *("240/41/9|41", "70/27/8|21", "117/24/29|92", "95/34/14|36"),
        *("90/26/20|31", "62/12/68|156", "74/10/20|55"),
    ],
    "year": [
        *("41/9/14|23", "49/15/8|18", "72/25/10|31", "102/16/6|11", "97/22/20|53"),
        *("96/15/25|69", "100/21/12|26", "77/21/25|57", "92/19/21|49"),
    ],
}
# How the original release writes a label, where it is not the label itself.
RELEASED = {
    "relationship": {
        "ex-boyfriend ex-girlfriend": "ex_boyfriend_ex_girlfriend",
        "husband wife": "husband_wife",
        "boyfriend girlfriend": "boyfriend_girlfriend",
    },
    "way_speaking": {"explain": "explains", "confront": "confronts", "teach": "teaches", "threaten": "threatens"},
    "director": dict(
        zip(
            ("steven", "martin", "ron", "robert", "mark", "peter", "ridley", "quentin"),
            ("nm0000229", "nm0000217", "nm0000165", "nm0001675", "nm0040630", "nm0001392", "nm0000631", "nm0000233"),
            strict=True,
        )
    ),
    "genre": {
        "comedy": "Comedy",
        "action": "Action-Crime-Adventure",
        "romance": "Romance",
        "thriller": "Thriller-Horror",
    },
    "writer": dict(
        zip(
            ("unknown", "ian", "stephen", "john", "david", "sylvester", "akiva"),
            ("\\N", "nm0001220", "nm0000175", "nm0000455", "nm0462895", "nm0000230", "nm0326040"),
            strict=True,
        )
    ),
    "year": {str(decade): str(1930 + 10 * decade) for decade in range(9)},
}


@pytest.fixture(scope="module")
def lvu():
    return build_manifest(load_card("lvu"), annotations=LVU, videos=None)


@needs_lvu
def test_lvu_has_the_published_videos_and_test_windows_of_every_class(lvu):
    videos, windows = defaultdict(set), Counter()
    for sample in lvu.samples:
        videos[sample.task, sample.answer, sample.split].add(sample.video)
        windows[sample.task, sample.answer, sample.split] += 1
    found = {
        task: [
            "/".join(str(len(videos[task, label, split])) for split in ("train", "val", "test"))
            + f"|{windows[task, label, 'test']}"
            for label in card.labels
        ]
        for task, card in load_card("lvu").tasks.items()
    }
    assert found == LVU_CLASSES


def write_lvu_release(folder, *, frames):
    """MA-LMM's annotations in the form of LVU v1.0, with a table of durations."""
    lengths = {}
    for split in ("train", "val", "test"):
        clips = json.loads((LVU / f"{split}.json").read_text())
        rows = defaultdict(list)
        for video, clip in clips.items():
            lengths[video] = f"{video},{clip['duration']}" + (f",{clip['num_frames']}" if frames else "")
            for task in LVU_CLASSES:
                if task in clip:
                    name = RELEASED.get(task, {}).get(clip[task], clip[task])
                    rows[task].append(f"{ord(clip[f'{task}_answer'][1]) - ord('a')} {name} {video} tt0088128")
        for task, lines in rows.items():
            path = folder / task / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(["class_id class_name youtube_id imdb_id", *lines]) + "\n")
    header = "videoid,duration" + (",num_frames" if frames else "")
    (folder / "lvu_durations.csv").write_text("\n".join([header, *lengths.values()]) + "\n")


@needs_lvu
def test_the_original_lvu_release_reads_as_the_same_samples(lvu, tmp_path):
    write_lvu_release(tmp_path, frames=True)
    released = build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)
    assert released.videos == lvu.videos
    assert released.samples == lvu.samples
    assert set(released.forms.values()) == {"lvu_csv"}
    assert "relationship train: 138 videos, published 149" in differences_from_expected(load_card("lvu"), released)
    assert differences_from_expected(load_card("lvu"), lvu) == ()


@needs_lvu
def test_without_frame_counts_one_window_of_the_lvu_release_differs(lvu, tmp_path):
    """A download of that video ended 0.7 s before its annotated end, which only MA-LMM's files know."""
    write_lvu_release(tmp_path, frames=False)
    released = build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)
    pairs = zip(lvu.samples, released.samples, strict=True)
    different = [(one.video, one.end_s, other.end_s) for one, other in pairs if one != other]
    assert len({video for video, _, _ in different}) == 1
    assert all(0 < after - before < 1 for _, before, after in different)


@needs_msvd
def test_the_original_msvd_release_reads_as_the_same_samples(tmp_path):
    names, lengths = {}, {}
    for split in ("val", "test"):
        entries = []
        for asked in json.loads((MSVD / f"qa_{split}.json").read_text()).values():
            number = names.setdefault(asked["video"], len(names) + 1)
            lengths[asked["video"]] = f"{asked['video']},{asked['frame_length'] / 10},{asked['frame_length']}"
            entries.append(
                {"answer": asked["answer"], "id": len(entries), "question": asked["question"], "video_id": number}
            )
        (tmp_path / f"{split}_qa.json").write_text(json.dumps(entries))
    mapping = "".join(f"{name} vid{number}\n" for name, number in names.items())
    (tmp_path / "youtube_mapping.txt").write_text(mapping)
    (tmp_path / "durations.csv").write_text("\n".join(["video,duration_s,num_frames", *lengths.values()]) + "\n")
    released = build_manifest(load_card("msvd_qa"), annotations=tmp_path, videos=None)
    published = build_manifest(load_card("msvd_qa"), annotations=MSVD, videos=None)
    assert released.videos == published.videos
    assert released.samples == published.samples
    assert differences_from_expected(load_card("msvd_qa"), released) == ()
    assert Counter(sample.answer_type for sample in released.samples if sample.split == "test") == {
        **{"what": 8149, "who": 4552, "how": 370, "when": 58, "where": 28}
    }


def test_each_split_is_read_in_the_first_form_that_is_there(tmp_path):
    """MA-LMM's repository lacks the training questions, so they come from the original release."""
    asked = {"video": "v_1_2", "frame_length": 12, "question": "who runs?", "answer": "man"}
    (tmp_path / "qa_val.json").write_text(json.dumps({"0000000": asked}))
    entry = {"answer": "dog", "id": 7, "question": "what runs?", "video_id": 4}
    (tmp_path / "train_qa.json").write_text(json.dumps([entry, entry | {"video_id": 5}]))
    (tmp_path / "youtube_mapping.txt").write_text("u_1_3 vid4\nw_1_3 vid5\n")
    (tmp_path / "durations.csv").write_text("video,duration_s\nu_1_3,2.04\n")
    manifest = build_manifest(load_card("msvd_qa"), annotations=tmp_path, videos=None)
    assert manifest.forms == {"train": "msvd_release", "val": "msvd_json"}
    assert set(manifest.absent_splits) == {"test"}
    train = next(sample for sample in manifest.samples if sample.split == "train")
    assert (train.id, train.video, train.end_s, train.answer_type) == ("qa:train_0000000", "u_1_3", 1.9, "what")
    assert (train.jitter, manifest.samples[-1].jitter) == (True, False)
    assert manifest.left_out == {"w_1_3": "the table of durations does not have it"}


def release(folder, **changed):
    """A small LVU release; `changed` replaces whole files by path."""
    files = {
        "scene/train.csv": "class_id class_name youtube_id imdb_id\n0 office v1 tt1\n1 airport v2 tt2\n",
        "durations.csv": "videoid,duration\nv1,130\nv2,90.5\n",
    }
    for name, text in {**files, **changed}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def test_a_release_with_some_tasks_is_read(tmp_path):
    manifest = build_manifest(load_card("lvu"), annotations=release(tmp_path), videos=None)
    assert [sample.id for sample in manifest.samples] == ["scene:v1_0", "scene:v1_20", "scene:v2_0"]
    # 90.5 s are shorter than a window, so its frames lie denser and end with the video
    assert manifest.samples[2].frame_times_s()[-1] == 90.5


HEADER = "class_id class_name youtube_id imdb_id\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scene/train.csv": ""}, "scene/train.csv:1: the first line must name the columns; got []"),
        ({"scene/train.csv": "a,b,c,d\n"}, "scene/train.csv:1: the first line must name the columns; got ['a,b,c,d']"),
        ({"scene/train.csv": HEADER + "0 office v1\n"}, "scene/train.csv:2: a line has 4 columns"),
        ({"scene/train.csv": HEADER + "\n0 offise v1 tt\n"}, "scene/train.csv:3: unknown label of task 'scene'"),
        ({"scene/train.csv": HEADER + "0 office v1 t\n0 office v1 t\n"}, "train.csv:3: sample id 'scene:v1_0' appears"),
        (
            {"scene/train.csv": HEADER + "0 office ../v1 t\n", "durations.csv": "video,duration_s\n../v1,9\n"},
            "csv:2: video id",
        ),
        ({"scene/train.csv": HEADER.encode() + b"0 caf\xe9 v1 t\n"}, "train.csv: not UTF-8 text (byte 44)"),
        (
            {"durations.csv": "videoid,duration\nv1,nan\n"},
            "durations.csv:2: a duration must be a number of seconds abo",
        ),
        ({"durations.csv": "videoid,duration\nv1,-4\n"}, "durations.csv:2: a duration must be a number of seconds abo"),
        ({"durations.csv": "videoid,duration\nv1\n"}, "durations.csv:2: the line has too few columns; got 'v1'"),
        ({"durations.csv": "videoid,duration\nv1,1\nv1,1\n"}, "durations.csv:3: video 'v1' appears twice"),
        ({"durations.csv": "name,length\n"}, "durations.csv:1: the first line must name the columns"),
        (
            {"durations.csv": "video,duration_s,num_frames\nv1,3,x\n"},
            "csv:2: num_frames must be a whole number above 0",
        ),
    ],
)
def test_a_mistake_in_a_release_is_one_line_with_file_and_line(tmp_path, changed, message):
    with pytest.raises(UserError) as error:
        build_manifest(load_card("lvu"), annotations=release(tmp_path, **changed), videos=None)
    line = str(error.value)
    assert line.startswith(str(tmp_path))
    assert message in line
    assert "\n" not in line


def test_a_release_without_durations_says_where_to_get_them(tmp_path):
    release(tmp_path)
    (tmp_path / "durations.csv").unlink()
    with pytest.raises(
        UserError, match=r"durations.csv or .*lvu_durations.csv: file not found, .*md-mohaiminul/ViS4mer"
    ):
        build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)


def test_a_release_none_of_whose_videos_has_a_duration_says_so(tmp_path):
    release(tmp_path, **{"durations.csv": "videoid,duration\nother,9\n"})
    with pytest.raises(UserError, match=r"no samples of data set 'lvu': 2 videos are left out, the table of durations"):
        build_manifest(load_card("lvu"), annotations=tmp_path, videos=None)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    files = {
        "scene/train.csv": "\ufeff" + HEADER + "0 office v1 t\n",
        "durations.csv": "\ufeffvideoid,duration\nv1,9\n",
    }
    assert len(build_manifest(load_card("lvu"), annotations=release(tmp_path, **files), videos=None).samples) == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train_qa.json": "{}"}, "train_qa.json: must hold one JSON list; got 'dict'"),
        ({"train_qa.json": "[3]"}, "train_qa.json, entry 0: must be an object of keys and values"),
        ({"train_qa.json": '[{"question": "a", "answer": "b"}]'}, "train_qa.json, entry 0: missing key 'video_id'"),
        (
            {"train_qa.json": '[{"question": "a", "answer": "b", "video_id": 9}]'},
            "train_qa.json, entry 0: {folder}/youtube_mapping.txt does not name vid9",
        ),
        (
            {"youtube_mapping.txt": "u_1_3\n"},
            "youtube_mapping.txt:1: a line names one video and its number; got 'u_1_3'",
        ),
        ({"youtube_mapping.txt": "u vid1\n\nw vid1\n"}, "youtube_mapping.txt:3: vid1 appears twice"),
    ],
)
def test_a_mistake_in_the_msvd_release_is_one_line_with_file_and_place(tmp_path, files, message):
    for name, text in {
        "train_qa.json": "[]",
        "youtube_mapping.txt": "u_1_3 vid4\n",
        "durations.csv": "video,duration_s\n",
        **files,
    }.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as error:
        build_manifest(load_card("msvd_qa"), annotations=tmp_path, videos=None)
    assert message.replace("{folder}", str(tmp_path)) in str(error.value)


def test_prompts_are_ma_lmms_unless_the_papers_are_asked_for():
    card = load_card("lvu")
    paper = card.as_asked(prompts="paper", jitter=True)
    assert card.as_asked(prompts="ma-lmm", jitter=True) == card
    assert paper.tasks["way_speaking"].prompt == "What is the speaking style of the movie?"
    assert paper.tasks["year"].prompt == "What is the release year of the movie?"
    assert paper.tasks["scene"] == card.tasks["scene"]


def test_the_papers_prompts_reach_the_samples_cleaned(tmp_path):
    clip = {"subset": "train", "duration": 30, "num_frames": 310, "year": "4", "year_answer": "(e)"}
    (tmp_path / "train.json").write_text(json.dumps({"v1": clip}))
    card = load_card("lvu").as_asked(prompts="paper", jitter=True)
    (sample,) = build_manifest(card, annotations=tmp_path, videos=None).samples
    assert sample.prompt.replace("{}", sample.question) == "what is the release year of the movie?"


def test_a_card_without_the_papers_wording_refuses_it():
    with pytest.raises(UserError, match=r"data.prompts: data set 'msvd_qa' has no wording of the paper"):
        load_card("msvd_qa").as_asked(prompts="paper", jitter=True)


def test_jitter_can_be_left_out():
    card = load_card("msvd_qa")
    assert card.frame_rule.jitter
    assert not card.as_asked(prompts="ma-lmm", jitter=False).frame_rule.jitter
