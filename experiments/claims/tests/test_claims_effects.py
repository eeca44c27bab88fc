"""The statistics of the claims study: by hand, on effects of known size, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.claims.comparisons import Study, comparisons_of
from experiments.claims.curves import best_validation, distillation_of
from experiments.claims.effects import (
    ALL,
    FINE_LESS_COARSE,
    GROUPS,
    Draws,
    Resampled,
    draw,
    effect_of,
    gains_of,
    holm,
    resampled,
    without_rounding,
)
from experiments.claims.plan import LAMBDAS, NONE, PLANS, REFERENCE, best_interior
from experiments.claims.trainings import Distillation, MemberAnswers
from stages.data.synthetic.plan import LABELS
from stages.errors import UserError
from stages.evaluate.scoring import Prediction
from stages.records import read_yaml

FIRST = PLANS["claims"]
PLACES = {"alpha": 2, "beta": 1}  # windows of each video


def answers(right, *, task="scene", windows=None):
    """Predictions of one training: `right` has for each video one 0 or 1 a window."""
    return [
        Prediction(
            f"{video}-{task}-{window}", video, task, "what?", "yes", ("yes" if right[video][window] else "no",), (-0.5,)
        )
        for video, number in (windows or PLACES).items()
        for window in range(number)
    ]


def the_example(task="scene"):
    """Two seeds and two videos. Gains: seed 0 alpha +2 of 2, beta 0 of 1; seed 1 alpha 0 of 2, beta -1 of 1."""
    base = {
        0: answers({"alpha": [0, 0], "beta": [1]}, task=task),
        1: answers({"alpha": [1, 0], "beta": [1]}, task=task),
    }
    other = {
        0: answers({"alpha": [1, 1], "beta": [1]}, task=task),
        1: answers({"alpha": [0, 1], "beta": [0]}, task=task),
    }
    return base, other


def made(num_seeds, num_videos, tasks, gain, *, seed=0, windows=1):
    """Members that are right half the time; the second is besides that right with probability `gain[task]`."""
    random = np.random.default_rng(seed)
    videos = {f"v{index:03d}": windows for index in range(num_videos)}
    pair = ({}, {})
    for number in range(num_seeds):
        for one in pair:
            one[number] = []
        for task in tasks:
            first = {video: random.random(windows) < 0.5 for video in videos}
            second = {video: hits | (random.random(windows) < gain[task]) for video, hits in first.items()}
            pair[0][number] += answers(first, task=task, windows=videos)
            pair[1][number] += answers(second, task=task, windows=videos)
    return pair


def effects_of(base, other, *, resamples=2000, seed=0):
    gains = gains_of(base, other)
    draws = draw(len(gains.seeds), len(gains.videos), resamples=resamples, seed=seed)
    return {name: effect_of(one) for name, one in resampled(gains, draws).items()}


# --- the numbers


def test_the_gains_of_two_seeds_and_two_videos_by_hand():
    gains = gains_of(*the_example())
    assert (gains.seeds, gains.videos) == ((0, 1), ("alpha", "beta"))
    assert gains.sums["scene"].tolist() == [[2, 0], [0, -1]]
    assert gains.counts["scene"].tolist() == [2, 1]


def test_every_resample_of_the_example_by_hand():
    # Seeds (0,0), (0,1), (1,1) by videos (alpha, alpha), (alpha, beta), (beta, beta).
    seeds = np.array([[2, 0], [1, 1], [0, 2]], dtype=float)
    videos = np.array([[2, 0], [1, 1], [0, 2]], dtype=float)
    every = Draws(np.repeat(seeds, 3, axis=0), np.tile(videos, (3, 1)))
    found = resampled(gains_of(*the_example()), every)["scene"]
    # A drawn video counts with all its windows: (alpha, beta) has three a seed, (alpha, alpha) four.
    by_hand = [8 / 8, 4 / 6, 0 / 4, 4 / 8, 1 / 6, -2 / 4, 0 / 8, -2 / 6, -4 / 4]
    assert found.values == pytest.approx(by_hand, abs=1e-15)
    assert found.value == 1 / 6


def test_the_interval_of_the_example_reaches_both_extremes():
    # Each extreme, one seed twice and one video twice, is 1 in 16 of all draws and so beyond the 2.5 % on its side.
    one = effects_of(*the_example(), resamples=10_000)["scene"]
    assert (one.difference, one.ci95) == (1 / 6, (-1.0, 1.0))


def test_p_by_hand():
    # Of nine resamples two are not above 0: 2 * (2 + 1) / (9 + 1).
    assert effect_of(Resampled(0.4, np.array([-0.1, 0.0, *[0.5] * 7]))).p == 6 / 10
    assert effect_of(Resampled(0.4, np.full(9, 0.4))).p == 2 / 10
    assert effect_of(Resampled(-0.4, np.full(9, -0.4))).p == 2 / 10
    assert effect_of(Resampled(0.0, np.zeros(9))).p == 1.0


def test_holm_by_hand():
    # 3 x 0.01; 2 x 0.04, though 0.05 alone comes to less; then never below what was before.
    assert holm({"c": 0.05, "a": 0.01, "b": 0.04}) == pytest.approx({"c": 0.08, "a": 0.03, "b": 0.08})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_tasks_of_a_group_weigh_the_same_and_the_groups_are_compared():
    tasks = [task for group in GROUPS.values() for task in group]
    won = {"director": 1, "writer": 1, "scene": 1, "relationship": 1}
    base = {seed: [] for seed in range(2)}
    other = {seed: [] for seed in range(2)}
    for task in tasks:
        windows = {"alpha": 3, "beta": 2} if task == "writer" else PLACES
        for seed in base:
            base[seed] += answers({"alpha": [0] * 3, "beta": [0] * 2}, task=task, windows=windows)
            hit = won.get(task, 0)
            other[seed] += answers({"alpha": [hit] * 3, "beta": [hit] * 2}, task=task, windows=windows)
    found = effects_of(base, other)
    assert found["fine"].difference == pytest.approx(2 / 3)
    assert found["coarse"].difference == pytest.approx(1 / 3)
    assert found["over time"].difference == 1.0
    assert found[ALL].difference == pytest.approx(4 / 7)
    assert found[FINE_LESS_COARSE].difference == pytest.approx(1 / 3)
    assert found[FINE_LESS_COARSE].ci95 == pytest.approx((1 / 3, 1 / 3))  # paired: every resample says the same


def test_groups_whose_tasks_were_not_asked_are_left_out():
    assert set(effects_of(*the_example())) == {"scene", ALL}


# --- behaviour


def test_an_effect_of_known_size_is_found_and_its_interval_covers_it():
    # Right half the time, then every second mistake is mended: 0.25 in scene, nothing in genre.
    found = effects_of(*made(5, 120, ["scene", "genre"], {"scene": 0.5, "genre": 0.0}))
    assert found["scene"].ci95[0] < 0.25 < found["scene"].ci95[1]
    assert found["scene"].ci95[0] > 0.15
    assert found["scene"].p == 2 / 2001
    assert found["genre"].ci95 == (0.0, 0.0)
    assert found["genre"].p == 1.0
    assert found[ALL].ci95[0] < 0.125 < found[ALL].ci95[1]


def test_intervals_cover_as_often_as_they_say_or_more():
    covered = 0
    for number in range(60):
        found = effects_of(*made(5, 30, ["scene"], {"scene": 0.5}, seed=number, windows=2), resamples=400)
        covered += found["scene"].ci95[0] <= 0.25 <= found["scene"].ci95[1]
    assert covered >= 54  # 57 expected at 95 %


def test_intervals_of_five_seeds_cover_too_seldom_where_only_trainings_differ():
    """What PLAN.md warns of: five seeds show too little of how much others would differ."""
    random, covered = np.random.default_rng(0), 0
    windows = {"alpha": 20, "beta": 20}
    for number in range(100):
        hits = {seed: int(np.clip(random.normal(10, 3), 0, 20)) for seed in range(5)}
        base = {seed: answers(dict.fromkeys(windows, [0] * 20), windows=windows) for seed in hits}
        other = {
            seed: answers(dict.fromkeys(windows, [1] * right + [0] * (20 - right)), windows=windows)
            for seed, right in hits.items()
        }
        low, high = effects_of(base, other, resamples=400, seed=number)["scene"].ci95
        covered += low <= 0.475 <= high  # the mean of 10 with its fraction cut off
    assert 70 <= covered < 92


def test_seeds_that_disagree_widen_the_interval():
    base, _ = made(4, 60, ["scene"], {"scene": 0.0})
    wrong = [replace(row, answers=("no",)) for row in base[0]]
    right = [replace(row, answers=("yes",)) for row in base[0]]
    steady = {seed: (right if index % 2 else wrong) for index, seed in enumerate(base)}
    one = effects_of(dict.fromkeys(base, base[0]), steady)["scene"]
    assert one.ci95[1] - one.ci95[0] > 0.8
    same = effects_of(dict.fromkeys(base, base[0]), dict.fromkeys(base, right))["scene"]
    assert same.ci95[1] - same.ci95[0] < 0.3


def test_the_order_of_seeds_and_of_rows_changes_nothing():
    base, other = made(3, 20, ["scene", "genre"], {"scene": 0.3, "genre": 0.1})
    turned = {seed: base[seed][::-1] for seed in (2, 0, 1)}
    assert effects_of(turned, {seed: other[seed] for seed in (1, 2, 0)}) == effects_of(base, other)


def test_the_same_seed_draws_the_same_and_another_one_does_not():
    first, again, other = (draw(3, 10, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert (first.videos == again.videos).all()
    assert (first.videos != other.videos).any()
    assert (first.seeds.sum(axis=1) == 3).all()
    assert (first.videos.sum(axis=1) == 10).all()


# --- what is refused


def test_other_seeds_are_refused():
    base, other = the_example()
    with pytest.raises(UserError, match="different seeds"):
        gains_of(base, {0: other[0]})
    with pytest.raises(UserError, match="different seeds"):
        gains_of(base, {0: other[0], 2: other[1]})


def test_other_samples_are_refused():
    base, other = the_example()
    with pytest.raises(UserError, match=r"seed 1: different samples were answered, 1 only by the first"):
        gains_of(base, {0: other[0], 1: other[1][1:]})
    with pytest.raises(UserError, match="seeds 1 and 0 of the first"):
        gains_of({0: base[0], 1: base[1][1:]}, {0: other[0], 1: other[1][1:]})


def test_another_right_answer_under_one_id_is_refused():
    base, other = the_example()
    with pytest.raises(UserError, match="another video, task or right answer"):
        gains_of(base, {0: other[0], 1: [replace(row, gold="no") for row in other[1]]})


def test_a_task_that_lacks_a_video_is_refused():
    base, other = ({seed: [*rows, *answers({"alpha": [1]}, task="genre", windows={"alpha": 1})]
                    for seed, rows in one.items()} for one in the_example())  # fmt: skip
    with pytest.raises(UserError, match="task 'genre' has no sample of 1 of 2 videos"):
        gains_of(base, other)


@pytest.mark.parametrize("sizes", [(1, 5, 10), (5, 1, 10), (5, 5, 0)])
def test_nothing_is_drawn_from_too_little(sizes):
    with pytest.raises(UserError, match="too few"):
        draw(sizes[0], sizes[1], resamples=sizes[2], seed=0)


# --- the plan and the runs


def test_the_groups_are_the_synthetic_sets_tasks():
    assert sorted(task for group in GROUPS.values() for task in group) == sorted(LABELS)


def study_file(name):
    return read_yaml(Path(__file__).parents[1] / f"{name}.yaml")


def named_in(plan):
    return {name for test in plan.tests for name in (test.base, test.member)}.union(*plan.sections.values())


def test_the_plans_members_are_those_of_the_study_files():
    main, weighting = study_file("claims"), study_file("weighting")
    assert (main["name"], weighting["name"]) == FIRST.studies
    members = {one["name"]: one["settings"] for study in (main, weighting) for one in study["members"]}
    assert {one["name"]: one["settings"] for one in main["members"]}[REFERENCE] == weighting["members"][0]["settings"]
    assert named_in(FIRST) - {"best lambda"} | set(LAMBDAS) == set(members)
    assert {name: members[name]["alignment.kd_weight"] for name in LAMBDAS} == LAMBDAS
    for name in set(members) - {NONE, REFERENCE, "constant"}:  # one change each
        changed = [key for key, value in members[name].items() if members[REFERENCE].get(key) != value]
        # Another kind of teacher comes with its own source and block.
        assert len(changed) == 1 or (name == "tower" and {key.split(".")[0] for key in changed} == {"teacher"}), name


def test_the_second_runs_members_are_those_of_its_study_file_and_as_in_the_first():
    again, plan = study_file("again"), PLANS["claims-again"]
    assert (again["name"],) == plan.studies
    first = {one["name"]: one["settings"] for one in study_file("claims")["members"]}
    members = {one["name"]: one["settings"] for one in again["members"]}
    assert named_in(plan) == set(members)
    shuffled = members.pop("shuffled-1")
    assert shuffled == {**members["lambda-1"], "train.targets": "shuffled"}
    assert members == {name: first[name] for name in members}


def test_the_best_lambda_is_an_interior_one_and_of_equals_the_smallest():
    validation = {NONE: 0.9, "lambda-0.03": 0.5, "lambda-0.1": 0.6, "lambda-0.3": 0.6, "lambda-1": 0.4, "lambda-3": 1.0}
    assert best_interior(validation) == "lambda-0.1"


def a_study(gain, *, tasks=tuple(LABELS)):
    """Members by name, each right where `none` is and besides with its own probability."""
    members = {}
    for name, own in gain.items():
        base, other = made(3, 40, tasks, dict.fromkeys(tasks, own))
        members[name] = MemberAnswers(name, {}, base if name == NONE else other, {}, {})
    return Study(members, resamples=999, seed=0)


def harmed(by_seed, *, tasks):
    """The same answers, all of them wrong in some tasks."""
    return {
        seed: [replace(row, answers=("no",)) if row.task in tasks else row for row in rows]
        for seed, rows in by_seed.items()
    }


def test_comparisons_that_were_not_run_count_in_their_family():
    rows = {row["name"]: row for row in comparisons_of(a_study({NONE: 0.0, REFERENCE: 0.5, "shuffled": 0.0}), FIRST)}
    # The least p is 2 / 1000. Five tests are primary: with H1 and H6a both there, Holm takes 5 times the least of all.
    assert rows["H1"]["p"] == rows["H6a"]["p"] == 2 / 1000
    assert rows["H1"]["p_holm"] == rows["H6a"]["p_holm"] == 5 * 2 / 1000
    assert rows["H6a"]["difference"] == rows["H1"]["difference"]
    assert (rows["H6d"]["difference"], rows["H6d"]["p"], rows["H6d"]["p_holm"]) == (0.0, 1.0, 1.0)
    assert not rows["H6b"]["run"]
    assert rows["H6b"]["p_holm"] is None
    assert not rows["H3a"]["run"]


def test_what_a_supported_claim_lacks_is_said_beside_it():
    again = PLANS["claims-again"]
    study = a_study({NONE: 0.0, REFERENCE: 0.5, "lambda-1": 0.5, "shuffled-1": 0.0})
    assert {row["name"]: row["reading"] for row in comparisons_of(study, again)} == dict.fromkeys(
        ("R1", "R2", "R3", "R4")
    )
    worse = MemberAnswers("shuffled-1", {}, harmed(study.members[NONE].answers, tasks=LABELS), {}, {})
    members = {**study.members, "lambda-1": study.members[NONE], "shuffled-1": worse}
    rows = {row["name"]: row for row in comparisons_of(Study(members, resamples=999, seed=0), again)}
    assert (rows["R2"]["verdict"], rows["R4"]["verdict"]) == ("undecided", "supported")
    assert rows["R4"]["reading"] == "is better, not helps more: R2 is not supported"


def test_fine_tasks_that_are_harmed_less_are_not_helped():
    study = a_study({NONE: 0.0, REFERENCE: 0.0})
    harm = MemberAnswers(REFERENCE, {}, harmed(study.members[NONE].answers, tasks=GROUPS["coarse"]), {}, {})
    study = Study({NONE: study.members[NONE], REFERENCE: harm}, resamples=999, seed=0)
    row = next(row for row in comparisons_of(study, FIRST) if row["name"] == "H2")
    assert (row["verdict"], row["reading"]) == ("supported", "harms fine tasks less: they are not shown to gain")


def test_a_seed_without_a_difference_has_exactly_none():
    study = a_study({NONE: 0.0, REFERENCE: 0.3})
    for values in study.by_seed(REFERENCE, REFERENCE).values():
        assert values == [0.0, 0.0, 0.0]
    assert without_rounding(np.array([-5e-19, 1e-3])).tolist() == [0.0, 1e-3]


def test_runs_that_were_not_asked_all_tasks_are_refused():
    with pytest.raises(UserError, match="H2 needs the tasks of fine - coarse"):
        comparisons_of(a_study({NONE: 0.0, REFERENCE: 0.5}, tasks=("scene", "genre")), FIRST)


def test_a_study_without_the_baseline_is_refused():
    with pytest.raises(UserError, match="not trained: none"):
        a_study({REFERENCE: 0.5})


MEAN = {"target_to_mean": 0.75}


def levels(name, fourth, fifth):
    return {f"{name}/4": fourth, f"{name}/5": fifth}


def write_metrics(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def test_the_gate_is_over_all_steps_and_the_cosines_over_the_last_epoch_and_validation_does_not_count(tmp_path):
    run = write_metrics(
        tmp_path / "run",
        [
            {"split": "train", "step": 0, "epoch": 0, **levels("weight", 0.5, 0.25), **levels("cosine", 0, 0), **MEAN},
            {"split": "val", "step": 1, "top1": 0.5, "cosine/4": 0.0},
            {
                "split": "train",
                "step": 1,
                "epoch": 1,
                **levels("weight", 1.0, 0.75),
                **levels("cosine", 0, 0.5),
                **MEAN,
            },
            {"split": "train", "step": 2, "epoch": 1, **levels("weight", 0.0, 0.5), **levels("cosine", 1, 0.5), **MEAN},
            {"split": "val", "step": 3, "top1": 0.25},
        ],
    )
    assert distillation_of(run) == Distillation(mean_gate=0.5, cosine=0.5, target_to_mean=0.75)
    assert best_validation(run) == 0.5


def test_a_run_without_distillation_has_none(tmp_path):
    run = write_metrics(tmp_path / "run", [{"split": "train", "step": 0, "epoch": 0, "loss": 1.0}])
    with pytest.raises(UserError, match="without distillation"):
        distillation_of(run)
    with pytest.raises(UserError, match="no row of split 'val'"):
        best_validation(run)
