"""Caches that are missing, of other settings, not finished, or no caches."""

import re
import shlex

import pytest
import typer

from pipeline.cli import app
from pipeline.settings.config import resolve


@pytest.mark.parametrize("command", ["extract", "train"])
def test_a_cache_made_with_another_teacher_block(made, refused, command):
    more = " (and 1 more fields)" if command == "extract" else ""
    assert refused(command, *made.options(), "--set", "teacher.block=3") == (
        f"{made.cache}: this cache was made with another teacher.block{more}; got 8; allowed: 3. "
        "Give another --cache directory, or the preset that this cache was made with"
    )


def test_a_cache_made_with_another_storage_type(made, refused):
    said = refused("extract", *made.options(), "--set", "extract.storage=float32")
    assert said.startswith(f"{made.cache}: this cache was made with another storage; got 'float16'; allowed: 'float32'")


@pytest.mark.parametrize("changed", [[], ["--set", "teacher.block=3", "--set", "extract.storage=float32"]])
def test_no_cache_at_all_names_the_command_that_makes_the_right_one(made, refused, tmp_path, changed):
    """The quoted command is parsed as the shell and the command line would, and asks for what the training needs."""
    root = tmp_path / "a cache"
    said = refused("train", *made.options(cache=root, task="scene"), *changed)
    found = re.fullmatch(
        rf"{re.escape(str(root))}: no feature cache here \(there is no fingerprint\.json\)\. "
        r"Run `(.*)` first, or give the --cache directory it wrote to",
        said,
    )
    program, command, *arguments = shlex.split(found[1])
    assert (program, command) == ("pipeline", "extract")
    given = typer.main.get_command(app).commands["extract"].make_context("extract", arguments).params
    assert given["cache"] == str(root)
    assert given["task"] == "scene"
    assert given["videos"] == str(made.videos)
    asked = resolve(
        preset=given["preset"], options={"data.dataset": given["dataset"]}, overrides=given["overrides"] or []
    ).config
    assert asked.teacher.block == (3 if changed else 8)
    assert asked.extract.storage == ("float32" if changed else "float16")


@pytest.mark.parametrize("command", [("extract",), ("plan", "--no-calibrate")], ids=["extract", "plan"])
def test_a_folder_that_is_no_cache(command, made, refused, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(*command, *made.options(cache=tmp_path)) == (
        f"{tmp_path}: this directory is not a feature cache (no fingerprint.json) and not empty; got 'notes.txt'. "
        "Give an empty or new --cache directory"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", [("extract",), ("plan", "--no-calibrate")], ids=["extract", "plan"])
@pytest.mark.parametrize("below", ["file", "file/cache"])
def test_a_file_in_place_of_a_cache_or_above_it(command, below, made, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused(*command, *made.options(cache=tmp_path / below)) == (
        f"{tmp_path / 'file'}: the cache must be a directory, this is a file. Give another --cache"
    )


def test_a_place_where_the_system_lets_nobody_make_a_folder(made, refused):
    assert refused("extract", *made.options(cache="/proc/cache")) == (
        "/proc/cache: no cache can be made here: the system reports 'No such file or directory'. "
        "Give another --cache directory"
    )


@pytest.mark.parametrize("workers", [(), ("--processes", "2")], ids=["one process", "several"])
def test_training_while_videos_are_pending(made, refused, workers):
    half = made.folder / "half"
    assert refused("train", *made.options(cache=half, name="new"), *workers) == (
        f"{half}: 2 of 4 videos are not extracted, the first is 'train_0001'. "
        f"Run `pipeline extract --dataset synthetic --preset tiny --videos {made.videos} "
        f"--annotations {made.annotations} --cache {half}`"
    )
