"""The file of the claims study's trainings: written, read, joined, and the result computed from it alone."""

import json
import re
from dataclasses import replace

import pytest

from experiments.claims.__main__ import draw_plots, result_of
from experiments.claims.collect import collect
from experiments.claims.comparisons import verdict_of
from experiments.claims.curves import method_gates
from experiments.claims.plan import CONSTANT, NONE, PLANS, REFERENCE
from experiments.claims.tables import markdown
from experiments.claims.trainings import (
    Distillation,
    MemberSettings,
    Sample,
    Training,
    Trainings,
    Work,
    joined,
    read_trainings,
    write_trainings,
)
from stages.data.synthetic.plan import LABELS
from stages.errors import UserError

FIRST = PLANS["claims"]
VIDEOS = 6
SAMPLES = tuple(
    Sample(id=f"{task}:{video}", video=f"video-{video}", task=task, gold=labels[0])
    for task, labels in LABELS.items()
    for video in range(VIDEOS)
)
TEACHER = {"source": "dit", "block": 8, "random_seed": None}
WORK = Work(dataset="synthetic", preset="tiny", train_samples=7, settings={"teacher": TEACHER, "train": {"lr": 1}})
MEMBERS = {
    NONE: MemberSettings(label="none", settings={"alignment.kd_weight": 0.0}),
    REFERENCE: MemberSettings(label="method", settings={"alignment.kd_weight": 0.1, "teacher.block": 8}),
    "block-2": MemberSettings(label="block 2", settings={"alignment.kd_weight": 0.1, "teacher.block": 2}),
    CONSTANT: MemberSettings(label="constant", settings={"alignment.kd_weight": 0.05}),
}


@pytest.fixture
def two_seeds(monkeypatch):
    monkeypatch.setitem(PLANS, "claims", replace(FIRST, seeds=(0, 1)))


def training(member, seed, *, right="10", fingerprint="f", gate=0.75):
    return Training(
        member=member,
        seed=seed,
        fingerprint=fingerprint,
        validation=0.5 + seed / 100,
        distillation=None if member == NONE else Distillation(mean_gate=gate, cosine=0.9, target_to_mean=0.8),
        right=(right * len(SAMPLES))[: len(SAMPLES)],
    )


def trainings(*rows):
    return Trainings(plan="claims", work=WORK, members=MEMBERS, samples=SAMPLES, trainings=rows)


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


def changed(**content):
    return Trainings.model_validate({**whole().model_dump(), **content})


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (trainings(training(NONE, 0, right="01")), "none, seed 0, has come out in two ways"),
        (
            trainings(training(NONE, 2, fingerprint="g")),
            "both together: none, seed 2: learned from another cache than none, seed 0",
        ),
        (
            changed(samples=[*SAMPLES[:-1], SAMPLES[-1].model_copy(update={"gold": "x"})]),
            "not of one study: other samples were answered",
        ),
        (changed(plan="claims-again"), "of two runs of the study; got 'claims-again'; allowed: claims"),
        (changed(work={**WORK.model_dump(), "train_samples": 8}), "not of one study: train_samples; got 8; allowed: 7"),
        (
            changed(work={**WORK.model_dump(), "settings": {"teacher": TEACHER, "train": {"lr": 2}}}),
            r"not of one study: settings\.train\.lr; got 2; allowed: 1",
        ),
        (
            changed(
                members={
                    **MEMBERS,
                    NONE: MemberSettings(label="none", settings={"alignment.kd_weight": 0.0, "train.lr": 1}),
                }
            ),
            "none has other settings",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(other, said):
    with pytest.raises(UserError, match=said):
        joined(whole(), other)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([training(NONE, 0).model_copy(update={"right": "101"})], "none, seed 0: 3 answers to 42 samples"),
        ([training(NONE, 0), training(NONE, 0, right="01")], "none, seed 0: is there twice"),
        ([training(NONE, 0).model_copy(update={"member": "other"})], "other, seed 0: there is no such member"),
        (
            [training(NONE, 0), training(REFERENCE, 0, fingerprint="g")],
            "lambda-0.1, seed 0: learned from another cache than none, seed 0",
        ),
        (
            [
                training(NONE, 0).model_copy(
                    update={"distillation": Distillation(mean_gate=1, cosine=1, target_to_mean=1)}
                )
            ],
            "none, seed 0: has a distillation or lacks one, against its alignment.kd_weight",
        ),
        (
            [training(REFERENCE, 0).model_copy(update={"distillation": None})],
            "lambda-0.1, seed 0: has a distillation or",
        ),
        ([training(NONE, 0).model_copy(update={"validation": float("nan")})], "trainings.0.validation"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(tmp_path, rows, said):
    write_trainings(tmp_path / "file.json", whole().model_copy(update={"trainings": tuple(rows)}))
    with pytest.raises(UserError, match=re.escape(said)):
        read_trainings(tmp_path / "file.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"members": {NONE: {"label": "none", "settings": {}}}}, "members.none: settings lack"),
        ({"work": {**WORK.model_dump(), "settings": {}}}, "settings.teacher lacks one of source, block, random_seed"),
    ],
)
def test_a_file_that_lacks_what_the_statistics_need_is_refused(tmp_path, content, said):
    (tmp_path / "file.json").write_text(json.dumps({**whole().model_dump(mode="json"), **content}), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        read_trainings(tmp_path / "file.json")


def test_another_teacher_has_another_cache():
    rows = [training(NONE, 0), training("block-2", 0, fingerprint="g"), training("block-2", 1, fingerprint="g")]
    assert len(trainings(*rows).trainings) == 3
    with pytest.raises(ValueError, match="block-2, seed 1: learned from another cache than block-2, seed 0"):
        trainings(*rows[:2], training("block-2", 1, fingerprint="f"))


@pytest.mark.usefixtures("two_seeds")
def test_the_methods_gates_are_those_of_all_its_trainings():
    assert method_gates(whole()) == [0.75, 0.25]
    with pytest.raises(UserError, match=r"trainings of 'lambda-0\.1' are missing: seeds 0"):
        method_gates(trainings(training(NONE, 0), training(REFERENCE, 1)))


@pytest.mark.usefixtures("two_seeds")
def test_the_result_comes_from_the_file_alone(tmp_path):
    study, content = result_of(whole(), resamples=200, seed=0)
    assert content["work"]["seeds"] == [0, 1]
    assert content["members"][REFERENCE]["accuracy"]["all"]["by_seed"] == {0: pytest.approx(2 / 3), 1: 0.5}
    assert content["members"][REFERENCE]["less_none"]["all"]["difference"] == pytest.approx(1 / 12)
    assert [row["name"] for row in content["tests"] if row["run"]] == ["H1", "H2"]
    assert content["tests"][0]["by_seed"] == [pytest.approx(1 / 6), 0.0]
    assert {row["verdict"] for row in content["tests"]} == {"undecided", "not run"}
    json.dumps(content)
    assert "| H1 | distillation helps (lambda-0.1 less none, all) | +8.3 |" in markdown(content, ["fine", "all"])
    assert "| method | 0.900 | 0.800 | 0.500 |" in markdown(content, ["all"])
    assert all(path.stat().st_size for path in draw_plots(study, FIRST, tmp_path))


def test_a_folder_without_the_studies_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of the studies is there"):
        collect(tmp_path, FIRST)


@pytest.mark.usefixtures("two_seeds")
def test_a_study_that_is_not_complete_has_no_result():
    with pytest.raises(UserError, match=r"block-2 was not trained with the plan's seeds; got \[0\]; allowed: \[0, 1\]"):
        result_of(joined(whole(), trainings(training("block-2", 0, fingerprint="g"))), resamples=50, seed=0)
    few = [sample for sample in SAMPLES if sample.task != "scene"]
    rows = [one.model_copy(update={"right": one.right[: len(few)]}) for one in whole().trainings]
    with pytest.raises(UserError, match="these tasks were not asked: scene"):
        result_of(changed(samples=few, trainings=rows), resamples=50, seed=0)


@pytest.mark.usefixtures("two_seeds")
def test_constant_weights_at_another_effective_weight_are_refused():
    rows = [*whole().trainings, training(CONSTANT, 0), training(CONSTANT, 1)]
    assert result_of(trainings(*rows), resamples=50, seed=0)[1]["members"][CONSTANT]  # 0.1 * (0.75 + 0.25) / 2
    other = {**MEMBERS, CONSTANT: MemberSettings(label="constant", settings={"alignment.kd_weight": 0.1})}
    with pytest.raises(
        UserError, match=r"lambda of constant is not the method's times its mean gate; got 0\.1; allowed: 0\.05"
    ):
        result_of(changed(members=other, trainings=rows), resamples=50, seed=0)


@pytest.mark.parametrize(
    ("ci95", "p_holm", "by_seed", "dissent", "verdict"),
    [
        ((0.1, 0.3), 0.04, [0.1, 0.2], 0, "supported"),
        ((0.1, 0.3), 0.04, [0.0, 0.3], 0, "undecided"),
        ((0.1, 0.3), 0.04, [0.0, 0.3], 1, "supported"),
        ((0.1, 0.3), 0.04, [0.0, 0.3, -0.1], 1, "undecided"),
        ((0.1, 0.3), 0.05, [0.1, 0.2], 1, "undecided"),
        ((0.0, 0.3), 0.04, [0.1, 0.2], 1, "undecided"),
        ((-0.3, -0.1), 0.04, [-0.1, -0.2], 0, "contradicted"),
        ((-0.3, -0.1), 0.04, [0.1, -0.4], 0, "undecided"),
        ((-0.3, -0.1), 0.04, [0.1, -0.4], 1, "contradicted"),
    ],
)
def test_the_plans_verdicts(ci95, p_holm, by_seed, dissent, verdict):
    row = {"run": True, "ci95": ci95, "p_holm": p_holm, "by_seed": by_seed}
    assert verdict_of(row, dissent) == verdict
