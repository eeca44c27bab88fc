"""Videos that are cut at their end: what lies before the damage is extracted, trained on, evaluated and counted."""

import json
import shutil

import numpy as np
import pytest

from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.extract.extraction import Extraction
from stages.extract.worker import ExtractionJob, ExtractionWorker, VideoTask
from stages.frozen.identity import fingerprint, settle_precision
from tests.cached import records_of
from tests.faults.extract_corpus import run_here
from tests.video_files import write_video

CARD = """
name: films
title: Three films
annotations: {format: jsonl, file: samples.jsonl}
tasks: {scene: {labels: [office, school]}, ending: {labels: [office, school]}}
frame_rule: {kind: uniform, num_frames: 4, index_fps: 24}
"""
# Frames from 0 to 2 s lie before the damage, the last of those up to 4 s behind it, and those at the end all.
EARLY, LATE, END = (0.0, 2.0), (1.0, 4.0), (3.93, 3.99)
WHOLE, DAMAGED = ("whole", "val", "test"), ("cut", "spared", "tail")


def write_cut_avi(path):
    """An AVI of MPEG-4 as XVID marks it, four seconds long, which ends in the middle of its last packet."""
    write_video(path, "mpeg4", count=96, height=64, width=64, options={"vtag": "XVID"})
    data = path.read_bytes()
    last_packet = data.rfind(b"00dc", 0, data.rfind(b"idx1"))
    path.write_bytes(data[: last_packet + 100])


def line(video, split, between, task="scene"):
    start_s, end_s = between
    answer = "office" if video in WHOLE else "school"
    asked = {"task": task, "question": "where?", "answer": answer, "split": split}
    return {"video": video, "duration_s": 4.0, "start_s": start_s, "end_s": end_s, **asked}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Three whole videos, one that is needed before its damage only, and two of which some samples need more."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "videos").mkdir()
    for name in WHOLE:
        write_video(folder / "videos" / f"{name}.mp4", count=96, height=64, width=64)
    for name in DAMAGED:
        write_cut_avi(folder / "videos" / f"{name}.avi")
    (folder / "films.yaml").write_text(CARD)
    lines = [line("whole", "train", LATE), line("val", "val", LATE), line("test", "test", LATE)]
    lines += [line("spared", "train", EARLY)]
    lines += [
        line(video, split, seen) for video, split in (("cut", "train"), ("tail", "test")) for seen in (EARLY, LATE)
    ]
    lines += [line(video, "train", END, "ending") for video in ("cut", "whole")]
    (folder / "samples.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return folder


def options(folder, *more):
    named = {"dataset": folder / "films.yaml", "videos": folder / "videos", "annotations": folder}
    pairs = {**named, "preset": "tiny", "task": "scene", "cache": folder / "cache"}.items()
    return [*(part for name, value in pairs for part in (f"--{name}", value)), *more]


def config_of(folder, *settings):
    given = {
        "data.dataset": str(folder / "films.yaml"),
        "data.videos": str(folder / "videos"),
        "data.annotations": str(folder),
        "data.task": "scene",
        "cache.root": str(folder / "cache"),
    }
    return resolve(preset="tiny", options=given, overrides=["extract.decode_workers=1", *settings]).config


def prepare(folder, *settings, **flags):
    """What `pipeline extract` does before it starts Ray."""
    config = config_of(folder, *settings)
    manifest = locations.manifest_of(config, with_videos=True)
    extract = settle_precision(config.extract)
    cache = FeatureCache.create_or_open(folder / "cache", fingerprint(config, extract))
    job = ExtractionJob(config.encoder, config.teacher, extract, str(folder / "cache"))
    flags = {"retry_failed": False, **flags}
    return Extraction(manifest, plan_frames(manifest), cache, job, videos=folder / "videos", **flags)


@pytest.fixture(scope="module")
def extracted(films):
    summary = run_here(prepare(films))
    return films, summary


def test_what_lies_before_the_damage_is_done_with_a_remark(extracted, pipeline):
    folder, summary = extracted
    assert (summary.done, summary.failed, summary.pending) == (6, {}, 0)
    assert set(summary.remarks) == set(DAMAGED)
    cache = FeatureCache.open(folder / "cache")
    records = {record.video: record for record in records_of(cache)}
    assert records["whole"].remark is None
    assert "1 of 96 video packets are corrupt" in records["spared"].remark
    assert records["spared"].source.whole_before_s is None
    assert 3.9 < records["cut"].source.whole_before_s < 3.92
    planned = plan_frames(locations.manifest_of(config_of(folder))).times_s["cut"]
    assert cache.cached_times_s("cut").tolist() == planned[:-1].tolist()
    assert planned[-1] == 95 / 24
    assert summary.frames_lost == 2
    assert prepare(folder).todo == []
    said, _ = pipeline("extract", *options(folder))
    assert "6 of 6 videos done, 0 failed, 0 pending" in said
    assert "damaged video files, used as far as they are whole: 3 (cut: " in said
    assert "planned frames lost with them: 2" in said


def test_the_frames_before_the_damage_are_those_of_the_whole_file(extracted, tmp_path):
    folder, _ = extracted
    again = tmp_path / "again"
    again.mkdir()
    for name in ("films.yaml", "samples.jsonl"):
        shutil.copy(folder / name, again)
    shutil.copytree(folder / "videos", again / "videos")
    write_video(again / "videos" / "cut.avi", "mpeg4", count=96, height=64, width=64, options={"vtag": "XVID"})
    assert run_here(prepare(again)).frames_lost == 1
    times_s = FeatureCache.open(folder / "cache").cached_times_s("cut")
    cut, whole = (FeatureCache.open(one / "cache").read("cut", times_s) for one in (folder, again))
    np.testing.assert_array_equal(cut.features, whole.features)
    np.testing.assert_array_equal(cut.targets, whole.targets)


def test_info_verify_and_doctor_count_damaged_files(extracted, pipeline):
    folder, _ = extracted
    counted = "damaged video files, used as far as they are whole: 3 (cut: "
    out, _ = pipeline("cache", "info", folder / "cache", "--json")
    assert set(json.loads(out)["remarks"]) == set(DAMAGED)
    for command in (("cache", "info", folder / "cache"), ("cache", "verify", folder / "cache")):
        assert counted in "".join(pipeline(*command))
    out, _ = pipeline("doctor", *options(folder), "--json")
    found = next(one for one in json.loads(out) if one["item"] == "damaged files")
    assert (found["status"], found["names"]) == ("problem", [*DAMAGED])
    assert found["detail"].endswith("samples that ask for frames behind the damage: 2")
    assert "--refresh-changed" in found["fix"]


def test_samples_behind_the_damage_are_left_out_by_name_and_counted(extracted, tmp_path, pipeline):
    folder, _ = extracted
    samples = locations.manifest_of(config_of(folder)).samples
    late = {one.video: one.id for one in samples if one.start_s == LATE[0]}
    runs = ("--set", f"run.folder={tmp_path}", "--name", "run", "--set", "train.epochs=1")
    _, said = pipeline("train", *options(folder), *runs)
    left_out = "samples left out that ask for frames behind a file's damage: 1 ("
    assert f"3 training and 1 validation sample; {left_out}{late['cut']})" in said
    stamp = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (stamp["videos_damaged"], stamp["samples_missing"]) == (["cut", "spared"], [late["cut"]])
    assert stamp["videos_missing"] == []
    _, said = pipeline("evaluate", "--run", tmp_path / "run")
    assert f"{left_out}{late['tail']})" in said
    data = json.loads((tmp_path / "run" / "evaluation.json").read_text())["data"]
    assert (data["samples"], data["samples_left_out"], data["videos_left_out"]) == (2, 1, [])
    assert (data["videos_damaged"], data["samples_beyond_damage"]) == (["tail"], [late["tail"]])
    pipeline("report", tmp_path / "run", "--output", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for doing, videos, video in (("trained", "2 (cut, spared)", "cut"), ("scored on test", "1 (tail)", "tail")):
        assert f"{doing} with damaged video files, used as far as they are whole: {videos}; samples left out" in page
        assert f"that ask for frames behind the damage: 1 ({late[video]})" in page


def test_refuse_keeps_the_rule_that_a_damaged_file_has_failed(films, tmp_path):
    folder = shutil.copytree(films, tmp_path / "films", ignore=shutil.ignore_patterns("cache"))
    summary = run_here(prepare(folder, "extract.damaged=refuse"))
    assert (summary.done, set(summary.failed), summary.remarks) == (3, set(DAMAGED), {})
    assert all(reason.startswith("unreadable: ") for reason in summary.failed.values())
    used = run_here(prepare(folder, retry_failed=True))
    assert (used.done, used.failed, set(used.remarks)) == (6, {}, set(DAMAGED))


def test_a_task_that_needs_only_frames_behind_the_damage_finds_nothing_to_do_twice(extracted, tmp_path):
    folder = shutil.copytree(extracted[0], tmp_path / "films")
    ending = prepare(folder, "data.task=ending")
    assert ending.todo == ["whole"], "what a damaged file cannot give is not asked for again"
    # And where nobody has looked behind the damage before:
    (folder / "cache" / "commits" / "cut.json").unlink()
    (folder / "samples.jsonl").write_text(
        "".join(f"{json.dumps(one)}\n" for one in (line("cut", "train", EARLY), line("cut", "test", END, "ending")))
    )
    assert run_here(prepare(folder)).remarks.keys() == {"cut"}
    before = records_of(FeatureCache.open(folder / "cache"))[0]
    assert before.source.whole_before_s is None
    summary = run_here(prepare(folder, "data.task=ending"))
    after = records_of(FeatureCache.open(folder / "cache"))[0]
    assert (summary.done, summary.failed, summary.frames_lost) == (1, {}, len(plan_of_ending(folder)))
    assert (after.checksum, after.group) == (before.checksum, before.group)
    assert after.source.whole_before_s is not None
    assert prepare(folder, "data.task=ending").todo == []


def plan_of_ending(folder):
    return prepare(folder, "data.task=ending").plan.times_s["cut"]


def test_a_video_of_which_nothing_can_be_had_has_failed(films, tmp_path):
    folder = shutil.copytree(films, tmp_path / "films", ignore=shutil.ignore_patterns("cache"))
    summary = run_here(prepare(folder, "data.task=ending"))
    assert (summary.done, set(summary.failed)) == (1, {"cut"})
    assert summary.failed["cut"].startswith("unreadable: ")
    assert prepare(folder, "data.task=ending").todo == []


def test_a_damaged_video_that_is_decoded_part_after_part_ends_where_its_damage_begins(films, tmp_path):
    extraction = prepare(shutil.copytree(films, tmp_path / "films", ignore=shutil.ignore_patterns("cache")))
    task = VideoTask("v", str(films / "videos" / "cut.avi"), np.arange(0.0, 3.99, 0.19))
    worker = ExtractionWorker(extraction.job, part_bytes=3 * 50_000)
    try:
        assert worker._part_frames < 10
        parted = worker.process(task)
        record = extraction.cache.cached_times_s("v")
        mended = worker.process(VideoTask("w", task.path, task.times_s[task.times_s < 3.9]))
    finally:
        worker.close()
    assert parted.frames == mended.frames == len(record) == np.sum(task.times_s < 3.9)
    assert "of 96 video packets are corrupt" in parted.remark
    times_s = record.tolist()
    one, other = (extraction.cache.read(video, times_s) for video in ("v", "w"))
    np.testing.assert_array_equal(one.features, other.features)
