"""Settings that do not exist, have no sense, or do not fit the networks."""

import pytest

TASKS = "relationship, way_speaking, scene, director, genre, writer, year, all"


@pytest.mark.parametrize("command", ["extract", "train"])
@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            ["--preset", "tinny"],
            "unknown preset; got 'tinny'; allowed: diff-lmm-7b, ma-lmm-7b, small, tiny. Did you mean tiny?",
        ),
        (
            ["--dataset", "lvuu"],
            "unknown data set; got 'lvuu'; allowed: lvu, msvd_qa, synthetic, or the path of a .yaml card. "
            "Did you mean 'lvu'?",
        ),
        (
            ["--task", "relationshp"],
            f"--task: data set 'synthetic' has no task 'relationshp'; allowed: {TASKS}. Did you mean 'relationship'?",
        ),
        (
            ["--set", "train.lrr=3e-4"],
            "--set train.lrr=3e-4: unknown configuration key; got 'train.lrr'. Did you mean train.lr?",
        ),
        (
            ["--set", "extract.decoder=opencv"],
            "--set extract.decoder=opencv: extract.decoder: Input should be 'pyav', 'decord' or 'torchcodec'; "
            "got 'opencv'",
        ),
        (["--set", "train.lr=-1"], "--set train.lr=-1: train.lr: Input should be greater than 0; got -1"),
        (
            ["--set", "train.lr"],
            "--set: not of the form key=value; got 'train.lr'. Write for example train.lr=3e-4",
        ),
        (["--dataset", "own.yaml"], "own.yaml: file not found"),
    ],
    ids=lambda value: "-".join(value).strip("-") if isinstance(value, list) else "",
)
def test_a_wrong_setting(made, refused, command, wrong, line):
    given = made.options(preset=wrong[1]) if wrong[0] == "--preset" else [*made.options(), *wrong]
    assert refused(command, *given) == line


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("qformer.max_frames=7", "qformer.max_frames: a clip of this data set has 8 frames; got 7; allowed: 8 or more"),
        ("alignment.levels=[3,44]", "configuration: alignment.levels (3, 44): this Q-Former has levels 1...5"),
        (
            "language.source=/nowhere",
            "checkpoint: no such local folder, and the model hub gave no answer; got '/nowhere'; "
            "allowed: a hub id, a local folder, or bundled:NAME. "
            "Fetch it with `hf download` where there is a network, or set the source to its folder",
        ),
        (
            "qformer.source=bundled:tiny-dit",
            "bundled:tiny-dit: file qformer_tokenizer/tokenizer_config.json is missing. "
            "Check that the download is complete",
        ),
        ("train.batch_size=0", "--set train.batch_size=0: train.batch_size: Input should be greater than 0; got 0"),
    ],
)
def test_settings_that_do_not_fit_the_networks_leave_no_run_behind(made, refused, setting, line):
    assert refused("train", *made.options(name="new"), "--set", setting) == line


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        ("teacher.block=11", "bundled:tiny-dit: teacher.block is 11, but the DiT has 10 blocks"),
        (
            "teacher.class_label=17",
            "bundled:tiny-dit: teacher.class_label is 17, but the DiT's classes are 0...16 "
            "(the last is the null class)",
        ),
        (
            "teacher.tower_block=2",
            "--set teacher.tower_block=2: unknown configuration key; got 'teacher.tower_block'. "
            "It is now teacher.block with teacher.kind=tower",
        ),
    ],
)
def test_settings_that_do_not_fit_the_teacher_leave_no_cache_behind(made, refused, tmp_path, setting, line):
    assert refused("extract", *made.options(cache=tmp_path / "new"), "--set", setting) == line


def test_a_network_that_is_no_teacher_leaves_no_cache_behind(made, refused, tmp_path):
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    assert refused("extract", *made.options(cache=tmp_path / "new"), "--set", f"teacher.source={bert}") == (
        f"{bert}: file transformer/config.json is missing. Check that the download is complete"
    )


def test_an_unknown_task_is_said_before_a_missing_cache(made, refused, tmp_path):
    assert "no task 'relationshp'" in refused("train", *made.options(cache=tmp_path / "none", task="relationshp"))
