"""`pipeline plan`: exact before anything runs, and equal to what an extraction then stores."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline.cli import main
from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.extract.worker import ExtractionJob, ExtractionWorker, VideoTask
from stages.frozen.identity import fingerprint, settle_precision
from stages.weights.repository import BUNDLED

LVU = Path(__file__).resolve().parents[3] / "shared" / "data" / "lvu" / "annotation"
PUBLISHED_FRAME_BYTES = 257 * 1408 * 2 + 1152 * 4 + 8

CARD = """\
name: own
title: One long video
annotations: {format: jsonl, file: samples.jsonl}
tasks: {scene: {labels: [office, street]}}
frame_rule: {kind: uniform, num_frames: %d, index_fps: 10}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a command in this process, in a folder without data: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["pipeline", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        said = capfd.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


@pytest.fixture
def plan(command):
    def run(*arguments):
        code, out, err = command("plan", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def without_videos(world, **changed):
    options = world.options(**changed)
    at = options.index("--videos")
    return options[:at] + options[at + 2 :]


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# --- counts and bytes


def test_a_finished_cache_holds_exactly_what_is_planned(world, plan):
    planned = plan(*world.options(), "--no-calibrate")
    stored = FeatureCache.open(world.cache).info()
    assert (planned["videos"], planned["frames"]) == (stored.num_videos, stored.num_frames)
    assert planned["videos"] == planned["videos_found"] == 24
    assert planned["bytes"]["float16"] == stored.stored_bytes
    assert planned["bytes_by_backend"]["zarr"] == planned["bytes"]
    assert planned["bytes_by_backend"]["hdf5"]["float16"] == stored.num_bytes
    assert planned["cache"] == {"root": str(world.cache), "done": 24, "failed": 0, "pending": 0}
    assert (planned["left"]["videos"], planned["left"]["frames"]) == (0, 0)
    assert set(planned["left"]["bytes"].values()) == {0}
    assert (planned["storage"], planned["frame"]["tokens"]) == ("float16", 65)


def test_samples_are_those_of_the_annotations(world, plan):
    manifest = locations.manifest_of(
        resolve(preset="tiny", options={"data.annotations": str(world.folder / "data" / "annotations")}).config
    )
    every, one = (plan(*world.options(task=task), "--no-calibrate") for task in ("all", "scene"))
    assert every["samples"] == len(manifest.samples) == 7 * one["samples"]
    assert every["windows"] == one["windows"] == one["samples"]
    assert every["frames"] == one["frames"] == plan_frames(manifest).num_frames


@pytest.fixture(scope="module")
def half_done(world, tmp_path_factory):
    """A cache of three videos, one of them with its first two frames only, made by the real worker."""
    options = {"data.videos": world.videos, "data.annotations": world.folder / "data" / "annotations"}
    config = resolve(
        preset="tiny",
        options={key: str(value) for key, value in options.items()},
        overrides=["extract.decode_workers=1"],
    ).config
    root = tmp_path_factory.mktemp("half") / "cache"
    extract = settle_precision(config.extract)
    FeatureCache.create_or_open(root, fingerprint(config, extract))
    worker = ExtractionWorker(ExtractionJob(config.encoder, config.teacher, extract, str(root)))
    times = plan_frames(locations.manifest_of(config)).times_s
    try:
        for video, count in zip(sorted(times)[:3], (2, None, None), strict=True):
            task = VideoTask(video, str(world.videos / f"{video}.mp4"), times[video][:count])
            assert worker.process(task).checksum is not None
    finally:
        worker.close()
    return root


def test_what_is_left_and_what_is_there_make_the_whole(world, plan, half_done):
    planned = plan(*world.options(cache=half_done), "--no-calibrate")
    stored = FeatureCache.open(half_done).info()
    assert planned["cache"] == {"root": str(half_done), "done": 2, "failed": 0, "pending": 22}
    assert planned["left"]["videos"] == 22
    assert planned["left"]["frames"] == planned["frames"] - stored.num_frames
    assert planned["left"]["bytes"]["float16"] == planned["bytes"]["float16"] - stored.stored_bytes
    assert planned["disk"]["needed_bytes"] == planned["left"]["bytes"]["float16"]
    assert planned["disk"]["enough"]


@pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
def test_lvu_is_planned_from_its_annotations_alone(plan, tmp_path):
    planned = plan("--dataset", "lvu", "--annotations", LVU, "--cache", tmp_path / "cache")
    assert (planned["videos"], planned["frames"]) == (8198, 1_052_940)
    assert (planned["samples"], planned["windows"]) == (15612 + 3601 + 3110, 21_054)
    # Nearly all videos have a whole number of chunks.
    assert planned["bytes_by_backend"]["hdf5"]["float16"] == 1_052_940 * PUBLISHED_FRAME_BYTES
    assert 1 <= planned["bytes"]["float16"] / (1_052_940 * PUBLISHED_FRAME_BYTES) < 1.01
    assert (planned["seconds"], planned["decode_s"], planned["calibration"]) == (None, None, None)
    assert planned["not_calibrated"] == "none of the planned videos is on this machine"


# --- times


def test_times_are_measured_on_the_real_thing_and_nothing_stays_behind(world, plan, half_done, tmp_path):
    before = files_below(half_done.parent) | files_below(world.folder)
    planned = plan(*world.options(cache=half_done), "--calibrate-s", "2", "--set", "extract.decode_workers=2")
    assert files_below(half_done.parent) | files_below(world.folder) == before
    assert list(tmp_path.iterdir()) == []
    measured = planned["calibration"]
    assert measured["decode_children"] == 2
    assert measured["failed"] == {}
    assert 1 <= measured["videos"] <= 24
    assert all(measured[stage]["frames"] >= 1 for stage in ("decode", "networks", "write"))
    for part in (planned, planned["left"]):
        seconds = part["seconds"]
        assert part["decode_s"] == pytest.approx(part["frames"] * measured["decode"]["seconds_per_frame"])
        assert seconds["decode"] == pytest.approx(part["decode_s"] / 2)
        assert 0 < max(seconds["decode"], seconds["networks"], seconds["write"]) <= seconds["total"]
        assert part["hours"] == pytest.approx(seconds["total"] / 3600)
        assert (part["gpu_hours"] is None) == (not measured["is_gpu"])
    assert planned["left"]["seconds"]["total"] < planned["seconds"]["total"]


def test_files_that_are_no_videos_leave_the_times_unknown_and_the_counts_known(world, command, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for path in world.videos.glob("test_*.mp4"):
        (videos / path.name).write_text("no video")
    code, out, err = command(
        "plan", *world.options(videos=videos, cache=tmp_path / "cache"), "--calibrate-s", "0.01", "--json"
    )
    planned = json.loads(out)
    assert (code, planned["videos"], planned["videos_found"], planned["calibration"]) == (0, 24, 4, None)
    assert planned["not_calibrated"].startswith("no video could be decoded; the first: unreadable")
    assert "times: unknown" in err
    assert not (tmp_path / "cache").exists()


def test_videos_that_cannot_be_decoded_are_named_and_the_others_are_measured(world, plan, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    good, *bad = sorted(path.name for path in world.videos.glob("test_*.mp4"))
    shutil.copy(world.videos / good, videos)
    for name in bad:
        (videos / name).write_text("no video")
    options = world.options(videos=videos, cache=tmp_path / "cache")
    measured = plan(*options, "--calibrate-s", "20", "--set", "extract.decode_workers=4")["calibration"]
    assert set(measured["failed"]) == {name.removesuffix(".mp4") for name in bad}
    assert all(reason.startswith("unreadable") for reason in measured["failed"].values())
    # One video gives one piece a round, and the last rounds are those that count.
    assert (measured["videos"], measured["decode_children"]) == (1, 4)
    assert {measured[stage]["frames"] for stage in ("decode", "networks", "write")} == {measured["decode"]["frames"]}


# --- the hub

# Whoever looks for an address or opens a connection is noted, and gets no further.
GUARD = """\
import socket, sys
asked = []
def refuse(*arguments, **keywords):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.connect_ex = refuse
from pipeline.cli import main
sys.argv = ["pipeline", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not asked, asked
    raise
"""


def plan_under_guard(hub, *arguments):
    """Run `pipeline plan` with this folder as the hub's, free to ask the network; returns its JSON and its text."""
    free = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", GUARD, "plan", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=hub,
        env={**free, "HF_HOME": str(hub)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_without_weights_no_connection_is_tried_and_the_download_is_named(world, tmp_path):
    published = ["--preset", "diff-lmm-7b", "--dataset", "synthetic", *world.options()[2:6]]
    planned, told = plan_under_guard(tmp_path, *published)
    assert planned["videos_found"] == 24
    downloads = {"Salesforce/instructblip-vicuna-7b": 31_654_906_880, "facebook/DiT-XL-2-256": 3_333_921_308}
    assert planned["downloads"] == downloads
    assert "facebook/DiT-XL-2-256 (3.3 GB), Salesforce/instructblip-vicuna-7b (31.7 GB); plan fetches nothing" in told
    assert planned["not_calibrated"].startswith("weights are not on this machine: Salesforce/instructblip-vicuna-7b:")
    assert planned["calibration"] is None
    assert sum("weights are not on this machine" in line for line in told.splitlines()) == 1
    assert planned["frame"] == {
        "tokens": 257,
        "width": 1408,
        "teacher_width": 1152,
        "assumed": ["Salesforce/instructblip-vicuna-7b", "facebook/DiT-XL-2-256"],
    }


def test_weights_that_were_downloaded_are_measured_without_asking_the_hub(world, tmp_path):
    settings = []
    for setting, name in (("encoder", "tiny-instructblip"), ("teacher", "tiny-dit")):
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(BUNDLED / name, repository / "snapshots" / "0")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        settings += ["--set", f"{setting}.source=someone/{name}"]
    measured = ["--calibrate-s", "0.5", "--set", "extract.decode_workers=1", "--cache", tmp_path / "cache"]
    planned, _ = plan_under_guard(tmp_path, *world.options()[:6], *settings, *measured)
    assert (planned["downloads"], planned["not_calibrated"]) == ({}, None)
    assert planned["calibration"]["networks"]["frames"] >= 1


# --- training

# Windows of MA-LMM's annotations in batches of 64, the last incomplete one dropped, for 20 epochs.
LVU_STEPS = {"relationship": 80, "way_speaking": 660, "scene": 360, "director": 540, "genre": 2000, "writer": 660}
LVU_STEPS["year"] = 520
COSTS = Path(__file__).parents[2] / "docs" / "costs.md"
PUBLISHED_TRAINED = 202_620_737


def test_all_of_table_1_is_planned_without_annotations_weights_or_videos_and_the_docs_show_it(command, monkeypatch):
    for module in ("pipeline.planning.training_answer", "pipeline.commands.plan"):
        monkeypatch.setattr(f"{module}.this_gpu", lambda: None)
    code, out, told = command("plan", "--dataset", "lvu", "--json")
    planned = json.loads(out)
    training = planned["training"]
    assert code == 0
    assert planned["no_extraction"] == "annotations folder not found: data/lvu/annotations"
    assert {task["task"]: task["steps"] for task in training["tasks"]} == LVU_STEPS
    assert training["counted_by_card"] == ["train", "val", "test"]
    assert training["assumed"] == ["Salesforce/instructblip-vicuna-7b"]
    assert sum(part["parameters"] for part in training["parts"] if part["is_trained"]) == PUBLISHED_TRAINED
    relationship, a100 = training["tasks"][0], training["gpus"][3]
    assert relationship["multiply_adds"]["train"] == 80 * training["multiply_adds_per_step"]
    seconds = 2 * sum(relationship["multiply_adds"].values()) / (0.4 * a100["peak"])
    assert relationship["hours_by_arithmetic"]["A100"] == pytest.approx(seconds / 3600)
    assert (training["measured"], relationship["hours_measured"]) == (None, None)
    # What needs more than 16 GB has no hours there; the answer names the share and what was not measured.
    assert relationship["hours_by_arithmetic"]["RTX A4000"] is training["gpus"][0]["fit"] is None
    assert "at 40% of the GPU's peak (assumed)" in told
    assert "hours on this machine: not measured" in told
    rows = [" | ".join(map(str.strip, line[1:-1].split("│"))) for line in told.splitlines() if line.startswith("│")]
    assert len(rows) == 5 + 6 + 7 + 1  # parts, GPUs, tasks and their sum
    assert [row for row in rows if f"| {row} |" not in COSTS.read_text(encoding="utf-8")] == []


@pytest.mark.skipif(not LVU.is_dir(), reason="the LVU annotations are not here")
def test_the_annotations_give_the_counts_that_the_card_gives(plan, tmp_path):
    planned = plan("--dataset", "lvu", "--annotations", LVU, "--cache", tmp_path / "cache", "--no-calibrate")
    training = planned["training"]
    assert {task["task"]: task["steps"] for task in training["tasks"]} == LVU_STEPS
    assert training["counted_by_card"] == []
    assert training["extraction"]["frames"] == 1_052_940
    assert planned["no_extraction"] is None


def test_a_step_is_measured_on_request_and_nothing_stays_behind(world, plan, tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    settings = ["--calibrate-s", "0.2", "--measure-step", "--set", "extract.decode_workers=1"]
    training = plan(*world.options(task="scene", cache=tmp_path / "cache"), *settings)["training"]
    measured, (task,) = training["measured"], training["tasks"]
    assert (training["not_measured"], training["assumed"], training["tokens_assumed"]) == (None, [], False)
    assert (measured["device"], measured["clips"]) == ("CPU", 1)
    assert measured["seconds"] > 0
    steps = measured["seconds"] * sum(task["multiply_adds"].values()) / measured["multiply_adds"]
    assert task["hours_measured"] == pytest.approx(steps / 3600)
    assert list((tmp_path / "scratch").iterdir()) == []
    assert not (tmp_path / "cache").exists()


def test_an_unknown_language_model_leaves_the_training_unknown_and_the_extraction_planned(world, command):
    code, out, told = command(
        "plan", *world.options(), "--no-calibrate", "--set", "language.source=someone/unknown", "--json"
    )
    planned = json.loads(out)
    assert (code, planned["videos"], planned["training"]) == (0, 24, None)
    assert planned["no_training"].startswith("checkpoint: neither on this machine nor a published checkpoint")
    assert "training: unknown: checkpoint: neither on this machine" in told


def test_a_plan_that_is_stopped_speaks_of_nothing_committed(world, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", "plan", *world.options(), "--calibrate-s", "60"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    assert any("measuring this machine" in line for line in process.stderr)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.splitlines()[-1]) == (75, "stopped by SIGTERM; run the same command again")


# --- dry run


def test_a_dry_run_is_the_plan_of_the_extraction_and_extracts_nothing(world, command, tmp_path):
    options = [*without_videos(world, cache=tmp_path / "cache"), "--json"]
    planned, dry = command("plan", *options), command("extract", *options, "--dry-run")
    assert planned[0] == dry[0] == 0
    first, second = json.loads(planned[1]), json.loads(dry[1])
    # Other programs write on this disk, too.
    assert abs(first["disk"].pop("free_bytes") - second["disk"].pop("free_bytes")) < 10e9
    assert [first.pop(key) is None for key in ("training", "no_training", "no_extraction")] == [False, True, True]
    assert first == second
    line = json.loads(command("extract", *options[:-1], "--dry-run", "--json-lines")[1].splitlines()[-1])
    assert (line["event"], line["bytes"]) == ("plan", first["bytes"])
    assert first["cache"]["pending"] == 24
    assert not (tmp_path / "cache").exists()


def test_no_ray_is_loaded(world):
    arguments = ["pipeline", "plan", *world.options(), "--no-calibrate"]
    code = (
        f"import sys\nfrom pipeline.cli import main\nsys.argv = {arguments!r}\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'stages.extract.worker' in sys.modules\nassert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "24 videos" in done.stdout


# --- the disk


def test_a_disk_that_is_too_small_is_said_with_both_numbers(command, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    frames = int(1.5 * free / PUBLISHED_FRAME_BYTES)
    (tmp_path / "own.yaml").write_text(CARD % frames)
    sample = {"video": "v", "path": "v.mp4", "duration_s": float(frames), "task": "scene", "question": "?"}
    (tmp_path / "samples.jsonl").write_text(json.dumps({**sample, "answer": "office", "split": "train"}))
    code, out, err = command("plan", "--dataset", "own.yaml", "--annotations", tmp_path, "--json")
    disk, line = json.loads(out)["disk"], next(line for line in err.splitlines() if "WARNING" in line)
    assert code == 0
    assert not disk["enough"]
    assert disk["needed_bytes"] >= frames * PUBLISHED_FRAME_BYTES > disk["free_bytes"]
    assert f"the disk is too small: {disk['free_bytes']:,} bytes free at {tmp_path}" in line
    assert f"{disk['needed_bytes']:,} bytes needed as float16" in line
    assert "--set extract.storage=int8" in line
    assert json.loads(out)["no_training"].startswith(
        f"qformer.max_frames: a clip of this data set has {frames:,} frames"
    )


# --- wrong input


def test_what_extract_refuses_plan_refuses(world, command, tmp_path):
    def refused(*arguments):
        code, out, err = command("plan", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    assert "annotations folder not found" in refused(*world.options(annotations=tmp_path / "none"))
    assert "data set 'synthetic' has no task 'scenes'" in refused(*world.options(task="scenes"))
    assert "videos folder not found" in refused(*world.options(videos=tmp_path / "none"))
    assert "--calibrate-s: not a time to measure for; got 0.0" in refused(*world.options(), "--calibrate-s", "0")
    other = refused(*world.options(), "--no-calibrate", "--set", "extract.storage=float32")
    assert "this cache was made with another storage" in other
    block = refused(*world.options(), "--no-calibrate", "--set", "teacher.block=11")
    assert "teacher.block is 11, but the DiT has 10 blocks" in block
    assert list(tmp_path.iterdir()) == []
