"""Scores on the published annotation files, where they are: the floors and counts that anyone can repeat from them."""

from collections import Counter
from pathlib import Path

import pytest

from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.evaluate.comparison import compare
from stages.evaluate.scoring import Prediction, answer_type_of, labels_of, majority_answers, score

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# Task: test windows, floor and train floor in percent (docs/paper-numbers.md).
LVU = {
    "relationship": (91, 46.2, 46.2),
    "way_speaking": (473, 28.1, 28.1),
    "scene": (218, 23.4, 23.4),
    "director": (268, 38.1, 4.9),
    "genre": (1291, 31.5, 31.5),
    "writer": (432, 36.1, 9.5),
    "year": (337, 20.5, 14.5),
}


def manifest_of(dataset, folder):
    annotations = DATA / folder / "annotation"
    if not annotations.is_dir():
        pytest.skip("the published annotation files are not here")
    return locations.manifest_of(
        resolve(options={"data.dataset": dataset, "data.annotations": str(annotations)}).config
    )


def answered(samples, answer_of):
    return [
        Prediction(
            one.id,
            one.video,
            one.task,
            one.prompt.replace("{}", one.question),
            one.answer,
            (answer_of(one),),
            (-1.0,),
            answer_type_of(one),
        )
        for one in samples
    ]


def test_the_floors_of_lvu_are_those_of_its_label_counts():
    manifest = manifest_of("lvu", "lvu")
    majority = majority_answers(one for one in manifest.samples if one.split == "train")
    test = [one for one in manifest.samples if one.split == "test"]
    blind = answered(test, lambda one: majority[one.task])
    found = score(
        blind,
        split="test",
        method="generate",
        labels=labels_of(test),
        train_majority=majority,
        resamples=200,
        seed=0,
    )
    shown = {task: (one.n, round(100 * one.floor, 1), round(100 * one.train_floor, 1)) for task, one in found.items()}
    assert shown == LVU
    for one in found.values():
        assert one.top1 == one.train_floor
        # One label everywhere: right in all windows of its class, wrong in all others.
        assert one.macro == pytest.approx(1 / sum(entry.n > 0 for entry in one.classes))
        assert one.no_label == 0.0
        assert one.videos.n == one.num_videos
        assert not one.beats_floor
    relationship = found["relationship"]
    assert [entry.n for entry in relationship.classes] == [42, 0, 36, 13]
    assert relationship.num_videos == 41
    assert relationship.videos.correct_majority == 21
    # Windows of a video are right or wrong together here, so the interval over 41 videos is wider than over 91 windows.
    wilson, videos = (end - start for start, end in (relationship.ci95, relationship.ci95_videos))
    assert videos > wilson
    truth = answered(test, lambda one: one.answer)
    better = compare(blind, truth, seed=0, resamples=50)["relationship"]
    assert (better.only_first, better.only_second) == (0, 91 - 42)


def test_the_answer_types_of_msvd_qa_are_counted():
    manifest = manifest_of("msvd_qa", "msvd_qa")
    test = [one for one in manifest.samples if one.split == "test"]
    # What the annotation says is what the first word says.
    bare = [one.model_copy(update={"answer_type": None}) for one in test]
    assert [answer_type_of(one) for one in bare] == [answer_type_of(one) for one in test]
    man = score(
        answered(test, lambda _: "man"),
        split="test",
        method="generate",
        labels=labels_of(test),
        train_majority={},
        resamples=200,
        seed=0,
    )["qa"]
    types = {kind: one.n for kind, one in man.answer_types.items()}
    assert types == {"what": 8149, "who": 4552, "how": 370, "when": 58, "where": 28}
    assert (man.n, man.num_videos, man.correct) == (13157, 504, 1852)
    assert man.floor == man.top1
    assert man.train_floor is None
    assert man.videos is None
    assert sum(one.correct for one in man.answer_types.values()) == Counter(one.answer for one in test)["man"]
