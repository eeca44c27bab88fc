"""What a user may get wrong: each mistake ends in one clear line and a failing status, and changes no file.

The commands run in this process, through the entry point that the shell calls; their caches hold random arrays.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer

from pipeline import locations
from pipeline.cli import app, main
from pipeline.config import resolve
from pipeline.run_folder import RunFolder
from stages.cache import FeatureCache
from stages.frame_plan import plan_frames
from stages.synthetic import generate
from tests.small_disk import small_disk_at

TASKS = "relationship, way_speaking, scene, director, genre, writer, year, all"


@dataclass(frozen=True)
class Made:
    """Twelve synthetic videos, a full cache of them, one that lacks two videos, and a run that was never trained."""

    folder: Path

    @property
    def videos(self):
        return self.folder / "data" / "videos"

    @property
    def annotations(self):
        return self.folder / "data" / "annotations"

    @property
    def cache(self):
        return self.folder / "cache"

    @property
    def run(self):
        return self.folder / "runs" / "taken"

    def options(self, **changed):
        options = {
            "preset": "tiny",
            "videos": self.videos,
            "annotations": self.annotations,
            "cache": self.cache,
            "set": f"run.folder={self.folder / 'runs'}",
        }
        return [str(part) for name, value in {**options, **changed}.items() for part in (f"--{name}", value)]

    def config(self, cache):
        options = {"data.videos": self.videos, "data.annotations": self.annotations, "cache.root": cache}
        overrides = [f"run.folder={self.folder / 'runs'}", "run.name=taken"]
        return resolve(
            preset="tiny", options={key: str(value) for key, value in options.items()}, overrides=overrides
        ).config


def fill_cache(root, config, *, leave_out=()):
    """What extraction would leave behind, with random numbers in place of features."""
    from stages.extraction import fingerprint, settle_precision

    cache = FeatureCache.create_or_open(root, fingerprint(config, settle_precision(config.extract)))
    random = np.random.default_rng(0)
    times = plan_frames(locations.manifest_of(config)).times_s
    with cache.ledger.writer() as ledger:
        for video in sorted(set(times) - set(leave_out)):
            frames = len(times[video])
            record = cache.write_video(
                video,
                times_s=times[video],
                features=random.standard_normal((frames, 65, 96)).astype(np.float16),
                targets=random.standard_normal((frames, 112)).astype(np.float32),
            )
            ledger.done(video, checksum=record.checksum, attempts=1)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    world = Made(tmp_path_factory.mktemp("wrong-inputs"))
    generate(world.folder / "data", seed=1, videos_per_split={"train": 4, "val": 4, "test": 4}, workers=1)
    fill_cache(world.cache, world.config(world.cache))
    fill_cache(world.folder / "half", world.config(world.folder / "half"), leave_out=["train_0001", "train_0003"])
    stamp = {"fingerprint": FeatureCache.open(world.cache).fingerprint.digest}
    RunFolder.create(world.run, world.config(world.cache), stamp)
    return world


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(made, tmp_path, monkeypatch, capfd):
    """Run a command that must fail; its only line without the leading "error: "."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        before = files_below(made.folder) | files_below(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        assert ended.value.code == 2
        assert said.out == ""
        assert "Traceback" not in said.err
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1, said.err
        assert files_below(made.folder) | files_below(tmp_path) == before, "something was written"
        return said.err.removeprefix("error: ").removesuffix("\n")

    return run


# --- settings


@pytest.mark.parametrize("command", ["extract", "train"])
@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (
            ["--preset", "tinny"],
            "unknown preset; got 'tinny'; allowed: diff-lmm-7b, ma-lmm-7b, tiny. Did you mean tiny?",
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
    assert refused(command, *made.options(), *wrong) == line


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
            "bundled:tiny-dit: teacher.tower_block is 2, but a dit teacher does not read it; leave it at None",
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


# --- data


def test_a_missing_videos_folder(made, refused):
    assert refused("extract", *made.options(videos="/nowhere/videos")) == (
        "/nowhere/videos: videos folder not found. The card 'synthetic' says under 'download' how to get it"
    )


@pytest.mark.parametrize("command", ["extract", "train"])
def test_a_missing_annotations_folder(made, refused, command):
    assert refused(command, *made.options(annotations="/nowhere/annotations")) == (
        "/nowhere/annotations: annotations folder not found. The card 'synthetic' says under 'download' how to get it"
    )


@pytest.mark.parametrize("command", ["extract", "train"])
def test_a_broken_line_in_an_annotation_file(made, refused, tmp_path, command):
    lines = (made.annotations / "train.json").read_text().split("\n")
    lines[2] = lines[2].replace(":", "", 1)
    (tmp_path / "train.json").write_text("\n".join(lines))
    said = refused(command, *made.options(annotations=tmp_path))
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/train\.json:3:\d+: broken JSON: Expecting ':' delimiter", said)


def test_a_label_that_does_not_exist(made, refused, tmp_path):
    text = (made.annotations / "train.json").read_text()
    (tmp_path / "train.json").write_text(re.sub(r'"scene": "\w+"', '"scene": "offise"', text, count=1))
    said = refused("extract", *made.options(annotations=tmp_path))
    assert re.fullmatch(
        rf"{re.escape(str(tmp_path))}/train\.json:\d+, video '\w+': unknown label of task 'scene'; got 'offise'; "
        r"allowed: office, hotel, prison, restaurant\. Did you mean 'office'\?",
        said,
    )


def test_a_broken_line_in_a_list_of_own_samples(made, refused, tmp_path):
    (tmp_path / "own.yaml").write_text(
        "name: own\ntitle: own\nannotations: {format: jsonl, file: samples.jsonl}\nvideos: {pattern: '{id}.mp4'}\n"
        "text: caption\ntasks: {scene: {prompt: '{}', labels: [office, hotel]}}\n"
        "frame_rule: {kind: uniform, num_frames: 4, index_fps: 10}\n"
    )
    good = {"video": "v", "duration_s": 9, "task": "scene", "question": "where?", "answer": "hotel", "split": "train"}
    path = tmp_path / "samples.jsonl"
    options = made.options(annotations=tmp_path, dataset=tmp_path / "own.yaml")

    path.write_text(f"{json.dumps(good)}\n{{broken\n")
    assert refused("train", *options).startswith(f"{path}:2:2: broken JSON: ")
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps({**good, 'task': 'scen'})}\n")
    said = refused("train", *options)
    assert said == f"{path}:3: unknown task; got 'scen'; allowed: scene. Did you mean 'scene'?"


# --- the cache


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
        "/proc/cache: no cache can be made here: the system says 'No such file or directory'. "
        "Give another --cache directory"
    )


@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["one process", "several"])
def test_training_while_videos_are_pending(made, refused, workers):
    half = made.folder / "half"
    assert refused("train", *made.options(cache=half, name="new"), *workers) == (
        f"{half}: 2 of 4 videos are not extracted, the first is 'train_0001'. "
        f"Run `pipeline extract --dataset synthetic --preset tiny --videos {made.videos} "
        f"--annotations {made.annotations} --cache {half}`"
    )


# --- runs


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
        "Give the options of the first call, or another --name for a new run"
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


# --- prediction


def test_predicting_a_file_that_is_not_there(made, refused):
    assert refused("predict", "/nowhere/v.mp4", "--question", "where?", "--run", made.run) == (
        "/nowhere/v.mp4: cannot be decoded (missing): no such file: /nowhere/v.mp4"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.mp4", "(unreadable): Invalid data found when processing input"),
        ("notes.txt", "(refused): not a self-contained video file (playlists and picture files are not followed)"),
    ],
)
def test_predicting_a_text_file(made, refused, tmp_path, name, reason):
    (tmp_path / name).write_text("no video at all\n" * 100)
    said = refused("predict", tmp_path / name, "--question", "where?", "--run", made.run)
    assert said.startswith(f"{tmp_path / name}: cannot be decoded {reason}")


@pytest.mark.parametrize(("start", "shown"), [("99", "99.0"), ("-1", "-1.0"), ("nan", "nan")])
def test_predicting_beyond_the_video(made, refused, start, shown):
    video = made.videos / "test_0000.mp4"
    said = refused("predict", video, "--question", "where?", "--run", made.run, f"--start={start}")
    assert re.fullmatch(
        rf"--start: the window begins outside the video; got {re.escape(shown)}; allowed: 0 to \d+\.\d\d", said
    )


# --- disks and folders that refuse to be written


def test_a_run_below_a_file(made, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert refused("train", *made.options(set=f"run.folder={tmp_path / 'file'}", name="new")) == (
        f"{tmp_path / 'file' / 'new'}: a part of this path is a file, not a directory. "
        "Mend this or name another folder, then run it again"
    )


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "512k") as folder:
        yield folder


def test_a_read_only_folder_for_runs(made, refused, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert refused("train", *made.options(set=f"run.folder={small_disk}", name="new")) == (
        f"{small_disk / 'new'}: the file system is read-only. Mend this or name another folder, then run it again"
    )


def test_a_disk_that_fills_up_during_training(made, small_disk, monkeypatch, capfd):
    """A checkpoint does not fit; the run can be gone on with when there is space."""
    arguments = [*made.options(set=f"run.folder={small_disk}", name="new", task="scene"), "--set", "train.epochs=1"]
    monkeypatch.setattr(sys, "argv", ["pipeline", "train", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith(f"error: {small_disk}/new/checkpoints: the checkpoint cannot be written: ")
    assert said.endswith("Free space there, then go on with --resume\n")
    assert list((small_disk / "new" / "checkpoints").iterdir()) == []

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    monkeypatch.setattr(sys, "argv", ["pipeline", "train", *arguments, "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


@pytest.mark.slow
def test_a_disk_that_fills_up_during_extraction(made, small_disk):
    """Through Ray, in a process of its own: what is committed stays and is whole."""
    cache = small_disk / "cache"
    command = [sys.executable, "-m", "pipeline", "extract", *made.options(cache=cache)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--set", "extract.decode_workers=1"], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(r"the disk is full; writing here needs [\d,]+ bytes and nothing was committed\. Free space", line)
    assert str(cache) in line
    opened = FeatureCache.open(cache)
    status = opened.ledger.status(plan_frames(locations.manifest_of(made.config(cache))).times_s)
    assert status.done
    assert status.pending
    assert status.failed == {}, "a full disk is no fault of a video"
    assert all(opened.verify(video).ok for video in status.done)
