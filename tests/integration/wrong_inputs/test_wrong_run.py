"""Runs that are missing, taken, of something else or damaged."""

import pytest

from pipeline.runs.run_folder import RunFolder


@pytest.mark.parametrize(
    "arguments", [["evaluate"], ["predict", "{video}", "--question", "where?"]], ids=["evaluate", "predict"]
)
def test_a_run_without_a_checkpoint(made, refused, arguments):
    video = made.videos / "test_0000.mp4"
    assert refused(*(part.format(video=video) for part in arguments), "--run", made.run) == (
        f"{made.run}: the run has no checkpoint. Train it first: pipeline train"
    )


@pytest.mark.parametrize(
    "arguments", [["evaluate", "--run"], ["predict", "v.mp4", "--question", "where?", "--run"], ["report"]]
)
def test_a_folder_that_is_no_run(made, refused, arguments):
    assert refused(*arguments, made.folder) == (
        f"{made.folder}: not a run: there is no config.yaml. Train one first: pipeline train"
    )


def test_a_run_of_another_cache(made, refused, tmp_path):
    other = tmp_path / "other"
    RunFolder.create(other, made.config(made.cache), {"fingerprint": "0" * 64})
    assert refused("evaluate", "--run", other).startswith(f"{other}: fingerprint changed since the run began")


def test_an_unknown_split(made, refused):
    assert refused("evaluate", "--run", made.run, "--split", "tset") == (
        "data set 'synthetic' has no split 'tset'; allowed: train, val, test. Did you mean 'test'?"
    )


def test_a_run_name_that_is_taken(made, refused):
    assert refused("train", *made.options(name="taken")) == (
        f"{made.run}: a run of this name is there already. Add --resume to go on with it, or give another --name"
    )


def test_resuming_with_other_settings(made, refused):
    assert refused("train", *made.options(name="taken"), "--resume", "--set", "train.seed=7") == (
        f"{made.run}: --resume keeps the run's own settings, but the command differs in train.seed (42, now 7). "
        "Leave it out, or give another --name for a new run"
    )


def test_resuming_a_run_that_does_not_exist(made, refused):
    assert refused("train", *made.options(name="never"), "--resume") == (
        f"{made.folder / 'runs' / 'never'}: not a run: there is no config.yaml. Train one first: pipeline train"
    )


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", ".hidden"])
def test_a_run_name_that_is_no_name(made, refused, name):
    assert refused("train", *made.options(name=name)) == (
        f"run.name: run name cannot be used as a name; got {name!r}; "
        "allowed: 1 to 200 of A-Z a-z 0-9 . _ -, not starting with a dot"
    )


def test_a_damaged_configuration_of_a_run(refused, tmp_path):
    (tmp_path / "config.yaml").write_text("train: {epochs: none}\n")
    assert refused("evaluate", "--run", tmp_path) == (
        f"{tmp_path}/config.yaml: train.epochs: Input should be a valid integer, unable to parse string as an integer; "
        "got 'none'"
    )
