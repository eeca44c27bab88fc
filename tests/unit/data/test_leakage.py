"""Training several tasks together must not show a video on which one of them is tested."""

from pathlib import Path

import pytest

from stages.data.cards import build_manifest, load_card
from stages.data.leakage import find_leaks, leakage_sentence, refuse_leakage
from stages.data.manifest import Manifest, Sample, Video
from stages.errors import UserError

LVU = Path(__file__).resolve().parents[4] / "shared" / "data" / "lvu" / "annotation"


def manifest(*asked):
    """Samples from (task, video, split)."""
    videos = {name: Video(id=name, path=f"{name}.mp4", duration_s=9.0) for _, name, _ in asked}
    samples = tuple(
        Sample(id=f"{task}:{name}", video=name, task=task, question="?", answer="a", split=split, times_s=(1.0,))
        for task, name, split in asked
    )
    return Manifest("mine", videos, samples)


def test_a_training_video_of_one_task_that_another_is_tested_on_is_refused():
    mixed = manifest(("a", "v1", "train"), ("a", "v2", "test"), ("b", "v1", "test"), ("b", "v2", "val"))
    with pytest.raises(UserError) as error:
        refuse_leakage(mixed, ["a", "b"], allow=False)
    assert "training on 2 tasks together would show 1 video that is in a test split (b 1). Train one task" in str(
        error.value
    )
    assert "data.allow_leakage=true" in str(error.value)


def test_the_splits_of_a_single_task_may_not_overlap_either():
    mixed = manifest(("a", "v1", "train"), ("a", "v2", "train"), ("a", "v3", "test"))
    assert refuse_leakage(mixed, ["a"], allow=False) == {}
    again = Sample(id="again", video="v1", task="a", question="?", answer="a", split="test", times_s=(2.0,))
    mixed = Manifest("mine", mixed.videos, (*mixed.samples, again))
    with pytest.raises(UserError, match=r"training would show 1 video that is in a test split \(a 1\)\. Give each"):
        refuse_leakage(mixed, ["a"], allow=False)


def test_what_is_allowed_is_counted_for_the_record():
    mixed = manifest(("a", "v1", "train"), ("b", "v1", "test"), ("c", "v1", "test"), ("c", "v3", "train"))
    leaks = refuse_leakage(mixed, ["a", "b", "c"], allow=True)
    assert leaks == {"b": 1, "c": 1}
    assert leakage_sentence(leaks).endswith("by task: b 1, c 1")


def test_one_task_alone_and_tasks_that_share_nothing_are_fine():
    mixed = manifest(("a", "v1", "train"), ("b", "v1", "test"), ("b", "v1", "val"), ("c", "v9", "test"))
    assert refuse_leakage(mixed, ["a"], allow=False) == {}
    assert refuse_leakage(mixed, ["b"], allow=False) == {}
    assert refuse_leakage(mixed, ["a", "c"], allow=False) == {}


@pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
def test_all_of_lvu_together_would_show_the_known_204_videos():
    lvu = build_manifest(load_card("lvu"), annotations=LVU, videos=None)
    leaks = find_leaks(lvu, lvu.tasks)
    assert len(set().union(*leaks.values())) == 204
    assert all(find_leaks(lvu, [task]) == {} for task in lvu.tasks)
