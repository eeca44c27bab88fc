"""Manifests: frame times, selection, and files whose every mistake is named with its line."""

import json
from itertools import pairwise

import numpy as np
import pytest

from stages.data.manifest import Manifest, Sample, Video
from stages.errors import UserError

VIDEO = {"id": "v1", "path": "v1.mp4", "duration_s": 130.0}
SAMPLE = {
    "id": "scene:v1_0",
    "video": "v1",
    "task": "scene",
    "question": "what is the scene?",
    "answer": "office",
    "split": "train",
    "candidates": ["office", "hotel"],
    "start_s": 0.0,
    "end_s": 99.0,
    "num_frames": 100,
    "index_fps": 10.0,
}


def sample(**changes):
    return Sample.model_validate({**SAMPLE, **changes})


def write(folder, videos, samples):
    """Write raw lines, so that broken ones can be written too."""
    (folder / "dataset.json").write_text('{"dataset": "mine"}')
    for name, records in (("videos", videos), ("samples", samples)):
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def error_of(folder):
    with pytest.raises(UserError) as error:
        Manifest.read_jsonl(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_full_window_is_one_frame_a_second():
    assert np.array_equal(sample(start_s=20.0, end_s=119.0).frame_times_s(), np.arange(20, 120))


def test_a_short_window_rounds_half_to_even_onto_the_index():
    # indices over [0, 5] in 5 steps: 0, 1.25, 2.5, 3.75, 5
    times = sample(start_s=0.0, end_s=0.5, num_frames=5).frame_times_s()
    assert times.tolist() == [0.0, 0.1, 0.2, 0.4, 0.5]


def test_the_same_frame_reached_by_different_windows_is_the_same_float():
    for index_fps in (10.0, 24.0, 29.97, 30.0):
        whole = sample(start_s=0.0, end_s=300 / index_fps, num_frames=301, index_fps=index_fps).frame_times_s()
        for first in range(300):
            part = sample(start_s=first / index_fps, end_s=300 / index_fps, num_frames=301 - first, index_fps=index_fps)
            assert np.array_equal(part.frame_times_s(), whole[first:])


def test_explicit_times_are_kept_as_given():
    rule = dict.fromkeys(("start_s", "end_s", "num_frames", "index_fps"))
    times = sample(**rule, times_s=[0.04, 1.0, 2.5]).frame_times_s()
    assert times.tolist() == [0.04, 1.0, 2.5]
    assert times.dtype == np.float64


def clip(indexed_frames, *, name="qa:train_0000000", num_frames=20, jitter=True):
    """A sample over the whole of a clip with so many frames at 10 a second."""
    span = {"start_s": 0.0, "end_s": (indexed_frames - 1) / 10, "num_frames": num_frames}
    return sample(id=name, jitter=jitter, **span)


@pytest.mark.parametrize("indexed_frames", [19, 20, 21, 72, 102, 482])
def test_training_draws_one_frame_from_each_segment(indexed_frames):
    """Against MA-LMM's own loop over segments (msvd_vqa_datasets.py)."""
    bounds = np.linspace(0, indexed_frames, 21, dtype=int)
    drawn = np.array([clip(indexed_frames).training_times_s(0, epoch) for epoch in range(200)])
    indices = np.rint(drawn * 10).astype(int)
    assert np.array_equal(indices / 10, drawn)
    for segment, (start, end) in enumerate(pairwise(bounds)):
        allowed = {start} if start == end else set(range(start, end))
        # 200 draws of at most 25 values: each is missed with probability 25 * (24 / 25) ** 200 = 0.7 %
        assert set(indices[:, segment]) <= allowed
        assert len(set(indices[:, segment])) > len(allowed) / 2


def test_a_draw_depends_on_seed_epoch_and_sample_alone():
    one = clip(72).training_times_s(1, 2)
    assert np.array_equal(one, clip(72).training_times_s(1, 2))
    for other in (
        clip(72).training_times_s(1, 3),
        clip(72).training_times_s(2, 2),
        clip(72, name="b").training_times_s(1, 2),
    ):
        assert not np.array_equal(one, other)
    # a fixed draw, so that runs of different versions and machines see the same frames
    assert (one[:5] * 10).round().astype(int).tolist() == [1, 6, 9, 13, 15]


def test_the_plan_holds_the_frames_of_evaluation_and_all_that_training_can_draw():
    for indexed_frames in (5, 20, 72):
        planned = clip(indexed_frames).planned_times_s()
        assert np.array_equal(planned, np.arange(indexed_frames) / 10)
        assert np.isin(clip(indexed_frames).frame_times_s(), planned).all()
        assert np.isin(clip(indexed_frames).training_times_s(5, 6), planned).all()


def test_without_jitter_training_sees_the_frames_of_evaluation():
    still = clip(72, jitter=False)
    assert np.array_equal(still.training_times_s(1, 2), still.frame_times_s())
    assert np.array_equal(still.planned_times_s(), still.frame_times_s())
    short = clip(9, jitter=False)
    assert np.array_equal(short.planned_times_s(), np.arange(9) / 10), "repeated frames are cached once"


def test_an_offset_shifts_every_index_and_none_below_the_first():
    """MA-LMM's frame i shows second (i - 1)/10."""
    assert sample(start_s=20.0, end_s=119.0, frame_offset=-1).frame_times_s().tolist() == [
        (10 * second - 1) / 10 for second in range(20, 120)
    ]
    assert sample(start_s=0.0, end_s=0.5, num_frames=6, frame_offset=-1).frame_times_s().tolist() == [
        0.0,
        *(index / 10 for index in range(5)),
    ]
    for jitter in (False, True):
        plain, shifted = clip(72, jitter=jitter), clip(72, jitter=jitter).model_copy(update={"frame_offset": -1})
        for epoch in range(5):
            indices = np.rint(plain.training_times_s(1, epoch) * 10)
            assert np.array_equal(shifted.training_times_s(1, epoch), np.maximum(indices - 1, 0) / 10)
            assert np.isin(shifted.training_times_s(1, epoch), shifted.planned_times_s()).all()
        assert np.isin(shifted.frame_times_s(), shifted.planned_times_s()).all()
        assert len(np.unique(shifted.planned_times_s())) == len(shifted.planned_times_s())


def test_an_offset_lies_before_and_is_none_of_explicit_times():
    with pytest.raises(ValueError, match="less than or equal to 0"):
        sample(frame_offset=1)
    rule = dict.fromkeys(("start_s", "end_s", "num_frames", "index_fps"))
    with pytest.raises(ValueError, match="frame_offset needs start_s"):
        sample(**rule, times_s=[0.5], frame_offset=-1)


def test_a_part_of_a_video_is_drawn_from_where_it_starts():
    part = sample(start_s=2.0, end_s=5.9, num_frames=4, jitter=True)
    drawn = np.array([part.training_times_s(0, epoch) for epoch in range(100)])
    assert (drawn >= [2.0, 3.0, 4.0, 5.0]).all()
    assert (drawn <= [2.95, 3.95, 4.95, 5.95]).all()


@pytest.fixture
def manifest():
    second = Video(id="v2", path="v2.mp4", duration_s=120.0)
    samples = (
        sample(),
        sample(id="year:v1_0", task="year", answer="3", candidates=None),
        sample(id="scene:v2_0", video="v2", split="test"),
    )
    videos = {"v1": Video.model_validate(VIDEO), "v2": second}
    notes = ({"val": "/data/val.json"}, {"v3": "no duration"}, {"train": "jsonl"})
    return Manifest("mine", videos, samples, *notes)


def test_selection_keeps_only_the_videos_in_use(manifest):
    chosen = manifest.select(tasks=["scene"], splits=["test"])
    assert [entry.id for entry in chosen.samples] == ["scene:v2_0"]
    assert set(chosen.videos) == {"v2"}
    assert (manifest.tasks, manifest.splits) == (("scene", "year"), ("train", "test"))
    assert manifest.select() == manifest


@pytest.mark.parametrize(
    ("tasks", "splits", "message"),
    [
        (["scnee"], None, r"no task 'scnee'; allowed: scene, year. Did you mean 'scene'\?"),
        (None, ["tset"], r"no split 'tset'; allowed: train, test. Did you mean 'test'\?"),
        (None, ["val"], r"/data/val.json: file not found, so data set 'mine' has no split 'val'"),
        (["year"], ["test"], r"no samples of \['year'\] in \['test'\]"),
    ],
)
def test_an_impossible_selection_is_explained(manifest, tasks, splits, message):
    with pytest.raises(UserError, match=message):
        manifest.select(tasks=tasks, splits=splits)


def test_what_is_written_is_read_back_equal(manifest, tmp_path):
    manifest.write_jsonl(tmp_path / "deep" / "folder")
    assert Manifest.read_jsonl(tmp_path / "deep" / "folder") == manifest


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path):
    odd = sample(question="one\u2028two\u0085three?")
    Manifest("mine", {"v1": Video.model_validate(VIDEO)}, (odd,)).write_jsonl(tmp_path)
    assert Manifest.read_jsonl(tmp_path).samples == (odd,)


def without(record, key):
    return {name: value for name, value in record.items() if name != key}


@pytest.mark.parametrize(
    ("videos", "samples", "message"),
    [
        ([VIDEO, '{"id": "v2",'], [SAMPLE], "videos.jsonl:2:13: broken JSON"),
        ([VIDEO], [SAMPLE, "", "[1]"], "samples.jsonl:3: must be an object"),
        ([VIDEO], ['{"id": "a", "id": "b"}'], "samples.jsonl:1: key 'id' appears twice"),
        ([VIDEO], ["[" * 200_000], "samples.jsonl:1: broken JSON"),
        ([without(VIDEO, "duration_s")], [SAMPLE], "videos.jsonl:1: missing key 'duration_s'"),
        ([without(VIDEO, "path") | {"pth": "x"}], [SAMPLE], "videos.jsonl:1: unknown key 'pth'; allowed: id, path"),
        ([VIDEO], [SAMPLE | {"anser": "x"}], "Did you mean 'answer'?"),
        ([VIDEO, VIDEO], [SAMPLE], "videos.jsonl:2: video id 'v1' appears twice"),
        ([VIDEO], [SAMPLE, SAMPLE], "samples.jsonl:2: sample id 'scene:v1_0' appears twice"),
        ([VIDEO | {"duration_s": -3}], [SAMPLE], "videos.jsonl:1: duration_s: Input should be greater than 0; got -3"),
        ([VIDEO | {"duration_s": 1e12}], [SAMPLE], "duration_s: Input should be less than or equal to 1000000; got 1"),
        ([VIDEO | {"duration_s": "130"}], [SAMPLE], "videos.jsonl:1: duration_s: Input should be a valid number"),
        (['{"id": "v1", "path": "p", "duration_s": NaN}'], [SAMPLE], "videos.jsonl:1: duration_s: "),
        ([VIDEO | {"id": "../v1"}], [SAMPLE], "videos.jsonl:1: id: video id cannot be used as a name; got '../v1'"),
        ([VIDEO | {"path": "a/../../b"}], [SAMPLE], "videos.jsonl:1: path: a relative path must stay below"),
        ([VIDEO], [SAMPLE | {"video": "v11"}], "samples.jsonl:1: sample 'scene:v1_0' names a video that is not listed"),
        ([VIDEO], [SAMPLE | {"answer": "attic"}], "samples.jsonl:1: answer 'attic' is not among the candidates: off"),
        ([VIDEO], [SAMPLE | {"split": "dev"}], "samples.jsonl:1: split: Input should be 'train', 'val' or 'test'"),
        ([VIDEO], [SAMPLE | {"end_s": 131.0}], "samples.jsonl:1: sample 'scene:v1_0' ends at 131.0 s, but video 'v1'"),
        ([VIDEO], [SAMPLE | {"start_s": 100.0}], "samples.jsonl:1: end_s 99.0 is before start_s 100.0"),
        ([VIDEO], [without(SAMPLE, "end_s")], "samples.jsonl:1: give either start_s, end_s, num_frames and index_fps"),
        ([VIDEO], [SAMPLE | {"times_s": [1.0]}], "samples.jsonl:1: give either start_s, end_s, num_frames"),
        (
            [VIDEO],
            [without(without(SAMPLE, "start_s"), "end_s") | {"jitter": True}],
            "samples.jsonl:1: give either start_s, end_s, num_frames and index_fps, or only times_s",
        ),
        ([VIDEO], [SAMPLE | {"prompt": "no hole"}], "samples.jsonl:1: prompt 'no hole' has no '{}'"),
        ([VIDEO], [SAMPLE | {"num_frames": 0}], "samples.jsonl:1: num_frames: Input should be greater than or equal"),
        ([VIDEO], [SAMPLE | {"task": "a/b"}], "samples.jsonl:1: task: task cannot be used as a name"),
    ],
)
def test_every_mistake_is_one_line_with_file_and_line_number(tmp_path, videos, samples, message):
    write(tmp_path, videos, samples)
    line = error_of(tmp_path)
    assert message in line
    assert line.startswith(str(tmp_path))


def test_explicit_times_have_no_jitter(tmp_path):
    bare = {key: value for key, value in SAMPLE.items() if key not in ("start_s", "end_s", "num_frames", "index_fps")}
    write(tmp_path, [VIDEO], [bare | {"times_s": [1.0], "jitter": True}])
    assert "samples.jsonl:1: jitter needs start_s, end_s, num_frames and index_fps" in error_of(tmp_path)


def test_unsorted_times_are_refused(tmp_path):
    bare = {key: value for key, value in SAMPLE.items() if key not in ("start_s", "end_s", "num_frames", "index_fps")}
    write(tmp_path, [VIDEO], [bare | {"times_s": [2.0, 1.0]}])
    assert "samples.jsonl:1: times_s must be sorted and not negative" in error_of(tmp_path)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    assert error_of(tmp_path) == f"{tmp_path / 'dataset.json'}: file not found"
    write(tmp_path, [VIDEO], [SAMPLE])
    (tmp_path / "videos.jsonl").write_bytes(b'{"id": "\xff"}')
    assert error_of(tmp_path) == f"{tmp_path / 'videos.jsonl'}: not UTF-8 text (byte 8)"


def test_a_very_long_value_is_cut_in_the_message(tmp_path):
    write(tmp_path, [VIDEO], [SAMPLE | {"num_frames": "x" * 10_000}])
    assert len(error_of(tmp_path)) < 400 + len(str(tmp_path))
