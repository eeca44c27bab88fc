"""Scores against an example worked out by hand and the paper's own fractions."""

import pytest

from stages.data.manifest import Sample
from stages.evaluate.metrics import wilson_interval
from stages.evaluate.scoring import (
    NO_LABEL,
    ClassScore,
    Confusion,
    Prediction,
    TypeScore,
    answer_type_of,
    labels_of,
    majority_answers,
    score,
)

SETTINGS = {"split": "test", "method": "generate", "labels": {}, "train_majority": {}, "resamples": 10_000, "seed": 0}


def scored(rows, task="t", **changed):
    return score(rows, **{**SETTINGS, **changed})[task]


def row(video, gold, *answers, surety=-1.0, task="t", **more):
    """A prediction whose second answer is less likely by one, and so on."""
    scores = tuple(surety - index for index in range(len(answers)))
    return Prediction(f"{video}{surety}", video, task, "what?", gold, answers, scores, **more)


# --- an example by hand

LABELS = ("friend", "couple", "rival", "boss")
# Ten windows of four videos. The last column says whether the right answer is among the five beams.
BY_HAND = [
    row("A", "friend", "friend", "x", "y", "z", "w", surety=-0.1),  # right, yes
    row("A", "friend", "couple", "friend", "x", "y", "z", surety=-0.2),  # wrong, yes
    row("B", "couple", "friend", "rival", "x", "y", "z", surety=-0.4),  # wrong, no
    row("B", "couple", "couple", "friend", "x", "y", "z", surety=-0.9),  # right, yes
    row("B", "couple", "rival", "x", "y", "z", "couple", surety=-0.1),  # wrong, yes
    row("C", "friend", "pals", "x", "y", "z", "w", surety=-0.5),  # wrong and no label, no
    row("D", "rival", "rival", "x", "y", "z", "w", surety=-0.6),  # right, yes
    row("D", "rival", "rival", "x", "y", "z", "w", surety=-0.7),  # right, yes
    row("D", "rival", "rival", "x", "y", "z", "w", surety=-0.8),  # right, yes
    row("D", "rival", "friend", "x", "y", "z", "w", surety=-0.1),  # wrong, no
]


@pytest.fixture(scope="module")
def by_hand():
    return scored(BY_HAND, labels={"t": LABELS}, train_majority={"t": "couple"})


def test_counts_and_shares_are_those_worked_out_by_hand(by_hand):
    assert (by_hand.split, by_hand.method) == ("test", "generate")
    assert (by_hand.n, by_hand.num_videos, by_hand.correct) == (10, 4, 5)
    assert by_hand.top1 == 5 / 10
    assert by_hand.top5 == 7 / 10
    assert by_hand.floor == 4 / 10  # rival, 4 of 10
    assert by_hand.train_floor == 3 / 10  # couple, 3 of 10
    assert by_hand.no_label == 1 / 10  # pals
    # Recalls 1/3, 1/3 and 3/4; nobody is a boss.
    assert by_hand.macro == pytest.approx(17 / 36)


def test_the_intervals_are_those_worked_out_by_hand(by_hand):
    # Wilson, z2 = 3.841459: centre 1/2, half 1.959964 * sqrt(1/40 + z2/400) / (1 + z2/10) = 0.263407.
    assert by_hand.ci95 == pytest.approx((0.236593, 0.763407), abs=1e-6)
    # Four videos with 1/2, 1/3, 0/1 and 3/4 right are drawn in 256 ways. From below: CCCC 0 (1 way), CCCB 1/6 (4),
    # CCCA 1/5 (4): the 2.5 % or 6.4 ways end at 1/5. From above: DDDD 3/4 (1), DDDA 10/14 (4), DDDC 9/13 (4).
    assert by_hand.ci95_videos == (1 / 5, 9 / 13)


def test_classes_and_confusion_are_those_worked_out_by_hand(by_hand):
    third, quarters = wilson_interval(1, 3), wilson_interval(3, 4)
    assert by_hand.classes == (
        ClassScore(label="friend", n=3, correct=1, recall=1 / 3, ci95=third),
        ClassScore(label="couple", n=3, correct=1, recall=1 / 3, ci95=third),
        ClassScore(label="rival", n=4, correct=3, recall=3 / 4, ci95=quarters),
        ClassScore(label="boss", n=0, correct=0, recall=None, ci95=None),
    )
    counts = ((1, 1, 0, 0, 1), (1, 1, 1, 0, 0), (1, 0, 3, 0, 0), (0, 0, 0, 0, 0))
    assert by_hand.confusion == Confusion(labels=LABELS, other=NO_LABEL, counts=counts)


def test_videos_vote_as_worked_out_by_hand(by_hand):
    videos = by_hand.videos
    # A: friend and couple once each, friend is surer: right. B: three answers once each, rival is surest: wrong.
    # C: pals: wrong. D: rival three times, though friend is surer: right.
    assert (videos.n, videos.correct_majority, videos.top1_majority) == (4, 2, 0.5)
    # centre 1/2, half 1.959964 * sqrt(1/16 + z2/64) / (1 + z2/4) = 0.349961.
    assert videos.ci95_majority == pytest.approx((0.150039, 0.849961), abs=1e-6)
    assert (videos.correct_likelihood, videos.top1_likelihood, videos.ci95_likelihood) == (None, None, None)


def test_a_vote_that_is_even_in_sum_too_goes_to_the_first_given():
    rows = [row("A", "b", "b", surety=-2.0), row("A", "b", "a", surety=-1.0), row("A", "b", "a", surety=-3.0)]
    even = [rows[0], row("A", "b", "a", surety=-2.0)]
    assert scored(rows).videos.correct_majority == 0
    assert scored(even).videos.correct_majority == 1
    assert scored(even[::-1]).videos.correct_majority == 0


def test_likelihoods_are_averaged_over_a_videos_windows():
    # a: -1 and -3, mean -2; b: -2 and -1.5, mean -1.75; c: mean -3. So b, although a wins the vote, one to one, by its
    # -1 over b's -1.5.
    windows = ((-1.0, -2.0, -4.0), (-3.0, -1.5, -2.0))
    labels = ("a", "b", "c")

    def ranked(index, values):
        order = sorted(range(3), key=lambda k: -values[k])
        answers, scores = tuple(labels[k] for k in order), tuple(values[k] for k in order)
        return Prediction(f"s{index}", "A", "t", "what?", "b", answers, scores)

    one = scored([ranked(*item) for item in enumerate(windows)], method="rank", labels={"t": labels})
    assert one.videos.correct_majority == 0
    assert (one.videos.correct_likelihood, one.videos.top1_likelihood) == (1, 1.0)
    assert one.videos.ci95_likelihood == wilson_interval(1, 1)
    assert one.no_label == 0.0


def test_of_equally_likely_candidates_the_first_label_is_taken():
    rows = [Prediction("s", "A", "t", "what?", "b", ("b", "a"), (-1.0, -1.0))]
    assert scored(rows, method="rank", labels={"t": ("a", "b")}).videos.correct_likelihood == 0
    assert scored(rows, method="rank", labels={"t": ("b", "a")}).videos.correct_likelihood == 1


# --- what has no meaning is None


def test_five_candidates_or_fewer_have_no_top_5():
    five, six = ("a", "b", "c", "d", "e"), ("a", "b", "c", "d", "e", "f")
    assert scored([row("A", "e", *five)], method="rank", labels={"t": five}).top5 is None
    assert scored([row("A", "e", *six)], method="rank", labels={"t": six}).top5 == 1.0
    assert scored([row("A", "f", *six)], method="rank", labels={"t": six}).top5 == 0.0


def test_fewer_than_five_beams_have_no_top_5_and_more_are_not_counted():
    assert scored([row("A", "a", "a", "b", "c", "d")]).top5 is None
    assert scored([row("A", "e", "a", "b", "c", "d", "e")]).top5 == 1.0
    assert scored([row("A", "f", "a", "b", "c", "d", "e", "f")]).top5 == 0.0


def test_open_answers_have_no_classes():
    one = scored([row("A", "man", "man"), row("B", "cat", "dog")], labels={"t": None})
    assert (one.macro, one.classes, one.confusion, one.no_label, one.train_floor) == (None, (), None, None, None)
    assert one.top1 == 0.5


def test_a_video_with_several_questions_or_right_answers_has_no_vote():
    asked = [Prediction(f"s{i}", "A", "t", question, "man", ("man",), (-1.0,)) for i, question in enumerate("ab")]
    assert scored(asked).videos is None
    assert scored([row("A", "man", "man"), row("A", "cat", "cat")]).videos is None
    assert scored(asked[:1]).videos.n == 1


def test_a_single_video_has_no_interval_over_videos():
    one = scored([row("A", "a", "a"), row("A", "a", "b")])
    assert (one.num_videos, one.ci95_videos) == (1, None)
    assert not one.beats_floor


def test_a_floor_is_beaten_by_both_intervals_or_not_at_all():
    # 20 of 20 windows of ten videos, two answers: the floor is one half.
    rows = [row(f"v{i // 2}", "ab"[i % 4 // 2], "ab"[i % 4 // 2]) for i in range(20)]
    assert scored(rows).beats_floor
    # Three videos of ten windows: two right, so 20 of 30 and a Wilson interval from 0.488, but videos say nothing.
    rows = [row(f"v{i // 10}", f"{i % 3}", f"{i % 3}" if i < 20 else "no") for i in range(30)]
    found = scored(rows)
    assert found.ci95[0] > found.floor == 1 / 3
    assert found.ci95_videos[0] == 0.0
    assert not found.beats_floor


# --- open questions by what they ask for


def test_types_of_answers_are_scored_apart():
    rows = [
        row("A", "man", "man", answer_type="who"),
        row("B", "cat", "dog", answer_type="what"),
        row("C", "cat", "cat", answer_type="what"),
        row("D", "run", "run"),
    ]
    assert scored(rows).answer_types == {
        "who": TypeScore(n=1, correct=1, top1=1.0, ci95=wilson_interval(1, 1)),
        "what": TypeScore(n=2, correct=1, top1=0.5, ci95=wilson_interval(1, 2)),
    }
    assert scored(BY_HAND).answer_types == {}


def sample(answer, *, question="what?", task="t", candidates=None, split="test", **more):
    return Sample(
        id="s", video="v", task=task, question=question, answer=answer, split=split, candidates=candidates,
        times_s=(0.0,), **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("question", "kind"),
    [("who is running?", "who"), ("What is it?", "what"), ("is it a cat?", "other"), ("how", "how"), (" ", "other")],
)
def test_the_first_word_of_an_open_question_is_its_type(question, kind):
    assert answer_type_of(sample("a", question=question)) == kind
    assert answer_type_of(sample("a", question=question, candidates=("a", "b"))) is None
    assert answer_type_of(sample("a", question=question, answer_type="when")) == "when"


def test_labels_are_all_candidates_of_a_task_in_order():
    samples = [
        sample("a", candidates=("a", "b"), task="one"),
        sample("c", candidates=("b", "c"), task="one"),
        sample("x", candidates=("x",), task="half"),
        sample("y", task="half"),
        sample("z", candidates=("z",), task="half"),
    ]
    assert labels_of(samples) == {"one": ("a", "b", "c"), "half": None}


def test_each_tasks_most_frequent_answer_is_its_majority():
    answers = [("one", "b"), ("one", "a"), ("two", "x"), ("one", "a"), ("two", "y")]
    assert majority_answers([sample(answer, task=task) for task, answer in answers]) == {"one": "a", "two": "x"}


# --- the paper's own fractions (docs/paper-numbers.md)


def windows(right, total, gold="g"):
    return [row(f"v{i}", gold, gold if i < right else "other", surety=-float(i)) for i in range(total)]


@pytest.mark.parametrize(
    ("right", "total", "percent", "digits"),
    [
        (63, 91, 69.2, 1), (214, 473, 45.2, 1), (175, 218, 80.3, 1), (192, 268, 71.6, 1), (816, 1291, 63.2, 1),
        (324, 432, 75.0, 1), (165, 337, 48.96, 2),  # Table 1, Diff-LMM
        (53, 91, 58.2, 1), (212, 473, 44.8, 1), (200, 268, 74.6, 1), (304, 432, 70.4, 1), (175, 337, 51.9, 1),  # MA-LMM
    ],
)  # fmt: skip
def test_table_1_is_right_windows_over_all_test_windows(right, total, percent, digits):
    one = scored(windows(right, total), resamples=10)
    assert (one.n, one.correct) == (total, right)
    assert round(100 * one.top1, digits) == percent


def test_table_2_is_recall_of_36_windows():
    # 42 friend, 36 husband wife and 13 boyfriend girlfriend windows; 10 or 24 of the 36 are right.
    labels = ("friend", "ex-boyfriend ex-girlfriend", "husband wife", "boyfriend girlfriend")
    for right, percent in ((10, 27.8), (24, 66.7)):
        rows = windows(38, 42, labels[0]) + windows(right, 36, labels[2]) + windows(1, 13, labels[3])
        one = scored(rows, labels={"t": labels}, resamples=10)
        assert [entry.n for entry in one.classes] == [42, 0, 36, 13]
        assert round(100 * one.classes[2].recall, 1) == percent
    assert one.correct == 63
    assert [round(100 * end, 1) for end in one.ci95] == [59.1, 77.8]
    assert round(100 * one.floor, 1) == 46.2
