"""The file of the claims study's trainings: written, read, joined, and the result computed from it alone."""

import json

import pytest

from benchmarks.claims.__main__ import draw_plots, result_of
from benchmarks.claims.collect import collect
from benchmarks.claims.curves import method_gates
from benchmarks.claims.plan import NONE, REFERENCE
from benchmarks.claims.tables import markdown
from benchmarks.claims.trainings import (
    MemberSettings,
    Sample,
    Training,
    Trainings,
    Work,
    joined,
    read_trainings,
    write_trainings,
)
from stages.errors import UserError
from stages.synthetic.plan import LABELS

VIDEOS = 6
SAMPLES = tuple(
    Sample(id=f"{task}:{video}", video=f"video-{video}", task=task, gold=labels[0])
    for task, labels in LABELS.items()
    for video in range(VIDEOS)
)
WORK = Work(dataset="synthetic", preset="tiny", train_samples=7, floors=dict.fromkeys(LABELS, 0.25), settings={})
MEMBERS = {
    NONE: MemberSettings(label="none", settings={"alignment.kd_weight": 0.0}),
    REFERENCE: MemberSettings(label="method", settings={"alignment.kd_weight": 0.1}),
}


def training(member, seed, *, right="10", fingerprint="f", gate=0.75):
    return Training(
        member=member,
        seed=seed,
        fingerprint=fingerprint,
        validation=0.5 + seed / 100,
        mean_gate=None if member == NONE else gate,
        right=(right * len(SAMPLES))[: len(SAMPLES)],
    )


def trainings(*rows):
    return Trainings(work=WORK, members=MEMBERS, samples=SAMPLES, trainings=rows)


def whole():
    return trainings(
        training(NONE, 0), training(NONE, 1), training(REFERENCE, 0, right="110"), training(REFERENCE, 1, gate=0.25)
    )


def test_what_is_written_is_read_and_stands_a_line_each(tmp_path):
    write_trainings(tmp_path / "file.json", whole())
    assert read_trainings(tmp_path / "file.json") == whole()
    lines = (tmp_path / "file.json").read_text(encoding="utf-8").splitlines()
    assert sum('"right"' in line for line in lines) == 4
    assert sum('"gold"' in line for line in lines) == len(SAMPLES)


def test_the_answers_are_in_the_order_of_the_samples():
    answers = whole().answered()[REFERENCE].answers[0]
    assert [one.sample for one in answers] == [one.id for one in SAMPLES]
    assert [one.correct for one in answers[:4]] == [True, True, False, True]
    assert whole().answered()[NONE].validation == 0.505


def test_parts_of_a_study_are_joined_in_the_order_of_members_and_seeds():
    first = trainings(training(REFERENCE, 1, gate=0.25), training(NONE, 1))
    second = trainings(training(NONE, 0), training(REFERENCE, 0, right="110"), training(NONE, 1))
    assert joined(first, second) == whole()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (trainings(training(NONE, 0, right="01")), "none, seed 0, has come out in two ways"),
        (trainings(training(NONE, 2, fingerprint="g")), "trainings of none learned from different caches; got 'g'"),
        (whole().model_copy(update={"samples": SAMPLES[:-1]}), "not of one study: their samples differ"),
        (
            whole().model_copy(update={"work": WORK.model_copy(update={"train_samples": 8})}),
            "not of one study: their work differ",
        ),
        (
            whole().model_copy(update={"members": {NONE: MemberSettings(label="none", settings={"train.lr": 1})}}),
            "none has other settings",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(other, said):
    with pytest.raises(UserError, match=said):
        joined(whole(), other)


def test_a_training_with_too_few_answers_is_refused(tmp_path):
    short = whole().trainings[0].model_copy(update={"right": "101"})
    write_trainings(tmp_path / "file.json", trainings(short))
    with pytest.raises(UserError, match=r"none, seed 0, has answers to another number of samples; got 3; allowed: 42"):
        read_trainings(tmp_path / "file.json")


def test_the_methods_gates_are_those_of_its_own_trainings():
    assert method_gates(whole()) == [0.75, 0.25]
    with pytest.raises(UserError, match=r"no training of 'lambda-0\.1'"):
        method_gates(trainings(training(NONE, 0)))


def test_the_result_comes_from_the_file_alone(tmp_path):
    study, content = result_of(whole(), resamples=200, seed=0)
    assert content["work"]["seeds"] == [0, 1]
    assert content["members"][REFERENCE]["accuracy"]["all"]["by_seed"] == {0: pytest.approx(2 / 3), 1: 0.5}
    assert content["members"][REFERENCE]["less_none"]["all"]["difference"] == pytest.approx(1 / 12)
    assert [row["name"] for row in content["tests"] if row["run"]] == ["H1", "H2"]
    json.dumps(content)
    assert "| H1 | distillation helps (lambda-0.1 less none, all) | +8.3 |" in markdown(content, ["fine", "all"])
    assert all(path.stat().st_size for path in draw_plots(study, tmp_path))


def test_a_folder_without_the_studies_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the studies is there"):
        collect(tmp_path)
