"""The extraction worker as a plain object, without Ray."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.extract.worker import ExtractionJob, ExtractionWorker, VideoTask
from stages.frozen.identity import fingerprint, settle_precision
from tests.cached import records_of
from tests.film_server import serving
from tests.video_files import RATE_FPS, write_video

TIMES = np.array([0.0, 0.5, 1.0])


def start_worker(root, *settings, **keywords):
    config = resolve(preset="tiny", overrides=["extract.decode_workers=1", *settings]).config
    extract = settle_precision(config.extract)
    cache = FeatureCache.create_or_open(root, fingerprint(config, extract))
    return cache, ExtractionWorker(ExtractionJob(config.encoder, config.teacher, extract, str(root)), **keywords)


def test_a_worker_extracts_adds_and_reports_without_ray(world, tmp_path):
    cache, worker = start_worker(tmp_path / "cache")
    path = str(next(world.videos.glob("*.mp4")))
    try:
        first = worker.process(VideoTask("v", path, TIMES[:2]))
        added = worker.process(VideoTask("v", path, TIMES[2:]))
        gone = worker.process(VideoTask("gone", path + ".not", TIMES))
        late = worker.process(VideoTask("late", path, np.array([9999.0])))
    finally:
        worker.close()
    assert first.frames == 2
    assert added.checksum is not None
    assert cache.cached_times_s("v").tolist() == TIMES.tolist()
    assert gone.reason is not None
    assert gone.reason.startswith("missing")
    assert late.reason is not None
    assert late.reason.startswith("out_of_range")
    assert cache.video_ids() == ["v"]


def test_a_fresh_task_replaces_a_damaged_record(world, tmp_path):
    cache, worker = start_worker(tmp_path / "cache")
    path = str(next(world.videos.glob("*.mp4")))
    try:
        assert worker.process(VideoTask("v", path, TIMES)).checksum is not None
        (tmp_path / "cache" / "commits" / "v.json").write_text("{broken")
        assert set(cache.ledger.status({"v": TIMES}).damaged) == {"v"}
        assert worker.process(VideoTask("v", path, TIMES, fresh=True)).checksum is not None
    finally:
        worker.close()
    assert cache.verify("v").ok
    assert cache.ledger.status({"v": TIMES}).done == {"v"}


def test_a_raw_stream_goes_by_the_clock_of_its_data_set(tmp_path):
    cache, worker = start_worker(tmp_path / "cache")
    path = write_video(tmp_path / "bare.h264", options={"g": "24"})
    try:
        without = worker.process(VideoTask("v", str(path), TIMES))
        worker.job = replace(worker.job, clock_fps=RATE_FPS)
        assert worker.process(VideoTask("v", str(path), TIMES)).checksum is not None
    finally:
        worker.close()
    assert without.reason.startswith("unreadable: the frames carry no usable timestamps")
    assert cache.cached_times_s("v").tolist() == TIMES.tolist()


def passes_of(worker):
    """Counts the passes of a worker's networks; a list that grows by one with each."""
    passes = []
    worker.networks.encoder.register_forward_hook(lambda *_: passes.append(1))
    return passes


def test_what_shares_a_pass_changes_no_bit(world, tmp_path, monkeypatch):
    """Twelve clips one after the other, each with passes of its own, and then many at once, whose frames mix."""
    # However slow the machine is: frames wait for those that are still being decoded.
    monkeypatch.setattr("stages.extract.packing._LINGER_S", 60.0)
    _, worker = start_worker(tmp_path / "alone")
    _, packed = start_worker(tmp_path / "packed")
    tasks = [
        VideoTask(path.stem, str(path), np.arange(0.0, 1.0 + number % 3, 0.5))
        for number, path in enumerate(sorted(world.videos.glob("*.mp4"))[:12])
    ]
    passes = passes_of(worker), passes_of(packed)
    try:
        alone = [worker.process(task) for task in tasks]
        assert packed.networks.batch_frames == 8
        with ThreadPoolExecutor(len(tasks)) as threads:
            together = list(threads.map(packed.process, tasks))
    finally:
        worker.close()
        packed.close()
    assert [row.checksum for row in together] == [row.checksum for row in alone]
    assert None not in [row.checksum for row in alone]
    frames = sum(len(task.times_s) for task in tasks)
    assert [sum(row.frames for row in rows) for rows in (alone, together)] == [frames, frames]
    assert len(passes[0]) == len(tasks)
    assert frames / 8 <= len(passes[1]) < len(tasks), "no pass held frames of several videos"


def test_a_video_that_an_earlier_worker_has_committed_is_not_written_again(world, tmp_path):
    cache, worker = start_worker(tmp_path / "cache")
    path = str(next(world.videos.glob("*.mp4")))
    try:
        first = worker.process(VideoTask("v", path, TIMES))
        (before,) = records_of(cache)
        again = worker.process(VideoTask("v", "gone since.mp4", TIMES, again=True))
        more = worker.process(VideoTask("v", path, np.array([1.5]), again=True))
    finally:
        worker.close()
    assert (again.checksum, again.frames) == (first.checksum, len(TIMES))
    (after,) = records_of(cache)
    assert more.checksum == after.checksum != before.checksum


def test_a_long_video_is_extracted_part_after_part_to_the_same_bits(world, tmp_path):
    whole, at_once = start_worker(tmp_path / "whole")
    parted, in_parts = start_worker(tmp_path / "parts", part_bytes=3 * 50_000)  # three frames
    limited, too_small = start_worker(tmp_path / "small", "extract.video_gb=1e-6", part_bytes=3 * 50_000)
    path = str(next(world.videos.glob("*.mp4")))
    task = VideoTask("v", path, np.arange(0.0, 2.0, 0.25))
    try:
        assert 1 <= in_parts._part_frames < len(task.times_s) <= at_once._part_frames
        assert in_parts.process(task).checksum == at_once.process(task).checksum is not None
        refused = too_small.process(task)
        late = in_parts.process(VideoTask("late", path, np.append(task.times_s, 9999.0)))
    finally:
        for worker in (at_once, in_parts, too_small):
            worker.close()
    assert refused.reason.startswith("features: video 'v': its 8 frames ask for ")
    assert refused.reason.endswith("extract.video_gb allows 1e-06")
    assert late.reason.startswith("out_of_range: asked for the frame at 9999.000 s")
    assert (whole.video_ids(), parted.video_ids(), limited.video_ids()) == (["v"], ["v"], [])


def test_a_video_at_an_address_is_extracted_to_the_same_bits_and_its_failure_names_the_address(world, tmp_path):
    pytest.importorskip("aiohttp")
    path = next(world.videos.glob("*.mp4"))
    (tmp_path / "text.mp4").write_text("no video\n" * 50)
    (tmp_path / "scratch").mkdir()
    cache, worker = start_worker(tmp_path / "cache", f"extract.scratch={tmp_path / 'scratch'}", "extract.deadline_s=5")
    films = {"whole.mp4": path, "half.mp4": path, "stalled.mp4": path, "text.mp4": tmp_path / "text.mp4"}
    with serving(films) as address:
        try:
            done = {
                name: worker.process(VideoTask(name, source, TIMES))
                for name, source in [("local", str(path)), *((name, f"{address}/{name}?secret") for name in films)]
            }
        finally:
            worker.close()
    local, fetched = (cache.read(name, TIMES) for name in ("local", "whole.mp4"))
    assert np.array_equal(local.features, fetched.features)
    assert np.array_equal(local.targets, fetched.targets)
    assert done["half.mp4"].reason.startswith(f"unreachable: {address}/half.mp4 after ")
    assert done["stalled.mp4"].reason == "timeout: fetching took longer than 5 s; the child was ended"
    assert done["text.mp4"].reason.startswith("unreadable: Invalid data")
    assert cache.video_ids() == ["local", "whole.mp4"]
    assert list((tmp_path / "scratch").iterdir()) == []


LIMITED_MEMORY = """
    import resource, sys
    import numpy as np
    from pathlib import Path
    from pipeline.settings.config import resolve
    from stages.frozen.identity import settle_precision
    from stages.extract.worker import ExtractionJob, FrozenPair
    config = resolve(preset="tiny").config
    pair = FrozenPair(ExtractionJob(config.encoder, config.teacher, settle_precision(config.extract), ""))
    numbers = np.random.default_rng(0)
    views = [numbers.integers(0, 256, (9, *size, 3), dtype=np.uint8) for size in pair.sizes_px]
    features, targets = pair.encode(*views)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 2**29, mapped + 2**29))
    pair.batch_frames = 4096
    again = pair.encode(*views)
    assert np.allclose(again[0], features, atol=1e-4) and np.allclose(again[1], targets, atol=1e-4)
    print(pair.batch_frames)
"""


def test_too_little_memory_halves_the_pass_and_goes_on():
    program = [sys.executable, "-c", textwrap.dedent(LIMITED_MEMORY)]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert 1 <= int(done.stdout) < 4096
    assert "too little memory: going on with 2,048 frames per pass" in done.stderr
