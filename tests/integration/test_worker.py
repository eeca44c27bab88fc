"""The extraction worker as a plain object, without Ray."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.extraction import fingerprint, settle_precision
from stages.worker import ExtractionJob, ExtractionWorker, VideoTask

TIMES = np.array([0.0, 0.5, 1.0])


def start_worker(root):
    config = resolve(preset="tiny", overrides=["extract.decode_workers=1"]).config
    extract = settle_precision(config.extract)
    cache = FeatureCache.create_or_open(root, fingerprint(config, extract))
    return cache, ExtractionWorker(ExtractionJob(config.encoder, config.teacher, extract, str(root)))


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


def test_what_shares_a_pass_changes_no_bit(world, tmp_path):
    """Twelve clips one after the other, each with passes of its own, and then many at once, whose frames mix."""
    _, worker = start_worker(tmp_path / "alone")
    _, packed = start_worker(tmp_path / "packed")
    tasks = [
        VideoTask(path.stem, str(path), np.arange(0.0, 1.0 + number % 3, 0.5))
        for number, path in enumerate(sorted(world.videos.glob("*.mp4"))[:12])
    ]
    try:
        alone = [worker.process(task) for task in tasks]
        assert packed.networks.batch_frames == 8
        with ThreadPoolExecutor(len(tasks)) as threads:
            together = list(threads.map(packed.process, tasks))
        computed = [row.networks_s for row in alone], [row.networks_s for row in together]
    finally:
        worker.close()
        packed.close()
    assert [row.checksum for row in together] == [row.checksum for row in alone]
    assert None not in [row.checksum for row in alone]
    frames = sum(len(task.times_s) for task in tasks)
    assert [sum(row.frames for row in rows) for rows in (alone, together)] == [frames, frames]
    assert sum(computed[1]) < sum(computed[0]), "full passes take no less time than half-empty ones"


def test_a_video_that_an_earlier_worker_has_committed_is_not_written_again(world, tmp_path):
    cache, worker = start_worker(tmp_path / "cache")
    path = str(next(world.videos.glob("*.mp4")))
    try:
        first = worker.process(VideoTask("v", path, TIMES))
        (before,) = cache.commits()
        again = worker.process(VideoTask("v", "gone since.mp4", TIMES, again=True))
        more = worker.process(VideoTask("v", path, np.array([1.5]), again=True))
    finally:
        worker.close()
    assert (again.checksum, again.frames) == (first.checksum, len(TIMES))
    (after,) = cache.commits()
    assert more.checksum == after.checksum != before.checksum


LIMITED_MEMORY = """
    import resource, sys
    import numpy as np
    from pathlib import Path
    from pipeline.config import resolve
    from stages.extraction import settle_precision
    from stages.worker import ExtractionJob, FrozenPair
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
    assert "too little memory: going on with 2048 frames per pass" in done.stderr
