"""What a study may change, which trainings it needs, and its statistics over seeds."""

from dataclasses import replace

import pytest

from pipeline.reporting.paper import published_tables
from pipeline.settings.config import dump_yaml, resolve, settings_of
from pipeline.studies.ablate import _shared
from pipeline.studies.members import differences, load_study, plan_study, shipped_studies
from stages.errors import UserError
from stages.evaluate.scoring import Prediction
from stages.studies.study import ALL_TASKS, compare_seeds, over_seeds, pooled

BOOKKEEPING = {"train.seed", "run.folder", "run.name"}
STUDY = """\
name: own
title: A study for this test
reproduces: null
varies: [train.lr]
base: slow
members:
  - {name: slow, settings: {train.lr: 0.001}}
  - {name: fast, settings: {train.lr: 0.01}}
"""


def base_of(preset, tmp_path, *overrides):
    return resolve(preset=preset, overrides=[f"run.folder={tmp_path / 'runs'}", *overrides])


@pytest.fixture
def own(tmp_path):
    def write(text=STUDY):
        path = tmp_path / "own.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# --- the shipped studies


def test_these_studies_are_shipped():
    assert shipped_studies() == ["lambda", "levels", "memory", "teacher", "weighting"]


@pytest.mark.parametrize("preset", ["diff-lmm-7b", "tiny"])
@pytest.mark.parametrize("name", shipped_studies())
def test_members_differ_from_the_base_configuration_in_the_named_keys_alone(name, preset, tmp_path):
    base = base_of(preset, tmp_path)
    planned = plan_study(name, base, 2)
    changed = set()
    for one in planned.trainings:
        mine = {key for key, _was, _now in differences(base.config, one.config)}
        if "teacher.kind" in mine:  # with the settings that the other kind has
            mine -= {key for key in mine if key.startswith("teacher.") and key not in planned.study.varies}
        assert mine - BOOKKEEPING - {"cache.root"} <= set(planned.study.varies), one.member.name
        # Another cache is allowed where the teacher is another, and nowhere else.
        assert ("cache.root" in mine) == (one.config.teacher != base.config.teacher)
        changed |= mine
    assert set(planned.study.varies) - {"teacher.source"} <= changed


@pytest.mark.parametrize("preset", ["diff-lmm-7b", "tiny"])
def test_the_members_have_the_values_of_the_paper(preset, tmp_path):
    def values(name, key):
        planned = plan_study(name, base_of(preset, tmp_path), 1)
        return {one.member.name: settings_of(one.config)[key] for one in planned.trainings}

    assert list(values("lambda", "alignment.kd_weight").values()) == [0, 0.1, 0.5, 1, 2, 5, 10]
    assert list(values("weighting", "alignment.weighting").values()) == ["adaptive", "average", "half", "one"]
    levels, last = values("levels", "alignment.levels"), 13 if preset == "diff-lmm-7b" else 5
    assert levels["all"] == tuple(range(1, last + 1))
    assert levels["last"] == (last,)
    assert sorted(levels["lower"] + levels["higher"]) == list(levels["all"])
    assert values("levels", "alignment.kd_weight")["none"] == 0
    kinds, blocks = values("teacher", "teacher.kind"), values("teacher", "teacher.block")
    assert {name: blocks[name] for name, kind in kinds.items() if kind != "dit"}.keys() >= {"tower"}
    assert {blocks[name] for name, kind in kinds.items() if kind != "dit"} == {None}, "a DiT's block is no tower's"
    if preset == "diff-lmm-7b":
        assert (levels["lower"], levels["higher"]) == ((1, 2, 3, 4, 5, 6, 7), (8, 9, 10, 11, 12, 13))


@pytest.mark.parametrize("name", shipped_studies())
def test_what_a_study_says_of_the_paper_is_in_the_papers_tables(name):
    study, _ = load_study(name)
    published = {table.id: table for table in published_tables()}
    assert study.reproduces is None or study.reproduces in published
    for member in study.members:
        if member.paper is not None:
            rows = {row.label: row for row in published[member.paper.table].rows}
            row = rows[member.paper.row]
            expected = resolve(overrides=[f"{key}={value}" for key, value in (row.settings or {}).items()]).config
            mine = resolve(overrides=[f"{key}={value}" for key, value in member.settings.items()]).config
            assert mine.alignment == expected.alignment, "the row is of another model"
            assert published[member.paper.table].columns[0].task == "relationship"


# --- which trainings there are


def test_equal_settings_are_trained_once_over_all_studies(tmp_path):
    base = base_of("tiny", tmp_path)
    names = ["lambda", "levels", "weighting"]
    studies, trainings = _shared([plan_study(name, base, 3) for name in names])
    assert [len(planned.trainings) for planned in studies] == [21, 15, 12]
    # Without distillation, and the tiny preset's own settings, are each in two or three of them.
    assert len(trainings) == 39
    assert len({one.path for one in trainings.values()}) == 39
    paths = {one.digest: one.path for planned in studies for one in planned.trainings}
    assert paths == {digest: one.path for digest, one in trainings.items()}


def test_a_training_of_an_earlier_study_is_found(tmp_path):
    base = base_of("tiny", tmp_path)
    earlier = plan_study("weighting", base, 1)
    one = earlier.trainings[0]
    one.path.mkdir(parents=True)
    (one.path / "config.yaml").write_text(dump_yaml(one.config), encoding="utf-8")
    (earlier.folder / "study.json").write_text("{}", encoding="utf-8")
    higher = next(other for other in plan_study("levels", base, 1).trainings if other.member.name == "higher")
    assert higher.digest == one.digest
    assert higher.path == one.path


def test_seeds_are_the_same_in_every_member_and_every_run_has_its_folder(own, tmp_path):
    planned = plan_study(own(), base_of("tiny", tmp_path, "train.seed=7"), 3)
    assert [(one.member.name, one.seed) for one in planned.trainings] == [
        (name, seed) for name in ("slow", "fast") for seed in (7, 8, 9)
    ]
    assert [one.config.train.seed for one in planned.trainings] == [7, 8, 9, 7, 8, 9]
    assert planned.trainings[4].path == tmp_path / "runs" / "own" / "fast-seed8"
    assert len({one.digest for one in planned.trainings}) == 6


def test_members_with_other_features_have_a_cache_of_their_own_and_share_it(tmp_path):
    planned = plan_study("teacher", base_of("tiny", tmp_path, "cache.root=here"), 2)
    roots = {one.member.name: set() for one in planned.trainings}
    for one in planned.trainings:
        roots[one.member.name].add(one.config.cache.root)
    assert all(len(found) == 1 for found in roots.values())
    assert roots["block-8"] == {"here"}
    assert len(set.union(*roots.values())) == len(roots)


def test_a_folder_of_another_configuration_is_refused(own, tmp_path):
    one = plan_study(own(), base_of("tiny", tmp_path), 1).trainings[0]
    one.path.mkdir(parents=True)
    (one.path / "config.yaml").write_text(dump_yaml(one.config), encoding="utf-8")
    plan_study(own(), base_of("tiny", tmp_path, "train.loader_workers=1"), 1)
    with pytest.raises(UserError, match=r"slow-seed42: a run of another configuration has this name: train\.epochs is"):
        plan_study(own(), base_of("tiny", tmp_path, "train.epochs=1"), 1)


# --- mistakes


def said(name, tmp_path, *overrides):
    with pytest.raises(UserError) as caught:
        plan_study(name, base_of("tiny", tmp_path, *overrides), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_study_names_the_nearest(tmp_path):
    assert "unknown study; got 'lamda'; allowed: lambda, levels, memory" in said("lamda", tmp_path)
    assert "Did you mean 'lambda'?" in said("lamda", tmp_path)
    assert "absent.yaml: file not found" in said(str(tmp_path / "absent.yaml"), tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("train.lr", "train.lrr", "member slow: unknown configuration key; got 'train.lrr'. Did you mean train.lr?"),
        ("0.001", "-1", "member slow: train.lr: Input should be greater than 0; got -1"),
        (
            "settings: {train.lr: 0.01}",
            "settings: {train.lr: 0.001}",
            "members 'slow' and 'fast' have the same settings",
        ),
        ("name: fast", "name: slow", "two members have the same name; got 'slow'"),
        ("base: slow", "base: slo", "base is no member; got 'slo'; allowed: slow, fast. Did you mean 'slow'?"),
        ("settings: {train.lr: 0.01}", "settings: {}", "members.1.settings: Dictionary should have at least 1 item"),
        ("settings: {train.lr: 0.01}", "setings: {train.lr: 1}", "unknown key 'members.1.setings'"),
        (
            "{train.lr: 0.01}",
            "{train.lr: 0.01, train.epochs: 3}",
            "'fast' sets train.epochs, which the study does not say",
        ),
        ("varies: [train.lr]", "varies: [train.lr, train.epochs]", "varies: no member sets train.epochs"),
        ("name: fast", "name: ../fast", "member name cannot be used as a name; got '../fast'"),
        ("name: own", "name: a/b", "study name cannot be used as a name; got 'a/b'"),
        ("title: A", "title: [A", "broken YAML"),
        ("  - {name: fast, settings: {train.lr: 0.01}}\n", "", "a study needs two members or more; got 1"),
        (STUDY, "", "must be an object of keys and values"),
        ("null", "figure-99", "reproduces: there is no such name; got 'figure-99'; allowed: table-1, "),
        ("0.01}", "0.01}, paper: {table: table-1, row: us}", "members.fast.paper.row: there is no such name; got 'us'"),
        ("0.01}", "0.01}, paper: {table: nine, row: us}", "members.fast.paper.table: there is no such name"),
        ("0.01}", "0.01}, presets: {tinny: null}", "members.fast.presets: there is no such name; got 'tinny'"),
        ("0.01}", "0.01}, presets: {tiny: null}", "all members but its base are left out with preset tiny"),
        ("train.lr", "train.seed", "varies: a study cannot vary train.seed: --seeds sets how many there are"),
        (
            "train.lr",
            "train.loader_workers",
            "a study cannot vary train.loader_workers: it changes nothing that is learned",
        ),
        ("train.lr", "data.task", "a study cannot vary data.task: members are compared on the same samples"),
    ],
)
def test_a_wrong_study_is_one_line_with_its_file(own, tmp_path, old, new, expected):
    assert old in STUDY
    path = own(STUDY.replace(old, new))
    line = said(path, tmp_path)
    assert line.startswith(path)
    assert expected in line


def test_a_setting_that_every_member_sets_cannot_be_given(own, tmp_path):
    assert "every member of study own sets train.lr itself" in said(own(), tmp_path, "train.lr=1")
    # Only one member of this study sets lambda, so that it may be another for the rest.
    plan_study("levels", base_of("tiny", tmp_path, "alignment.kd_weight=0.5"), 1)


# --- statistics


def row(sample, video, *, correct, task="scene"):
    return Prediction(sample, video, task, "what?", "yes", ("yes" if correct else "no",), (0.0,))


def test_spread_over_seeds_is_the_sample_standard_deviation():
    assert (over_seeds([0.25]).mean, over_seeds([0.25]).std) == (0.25, None)
    found = over_seeds([0.2, 0.4, 0.6])
    assert found.mean == pytest.approx(0.4)
    assert found.std == pytest.approx(0.2)


def test_several_tasks_are_pooled_beside_themselves():
    rows = [row("a", "v", correct=True), row("b", "v", correct=False, task="year")]
    assert [one.task for one in pooled(rows)] == ["scene", "year", ALL_TASKS, ALL_TASKS]
    assert pooled(rows[:1]) == rows[:1]


def test_members_are_compared_over_the_seeds_that_both_have():
    right = [row("a", "v", correct=True), row("b", "w", correct=True)]
    half = [right[0], replace(right[1], answers=("no",))]
    found = compare_seeds({1: half, 2: half, 3: right}, {2: right, 1: half}, seed=0, resamples=500)["scene"]
    assert (found.n, found.num_videos) == (4, 2)
    assert (found.top1_first, found.top1_second, found.difference) == (0.5, 0.75, 0.25)
    assert (found.only_first, found.only_second) == (0, 1)
    # A video is drawn with all its seeds: v never changes, w gains one of two.
    assert found.ci95 == (0.0, 0.5)
