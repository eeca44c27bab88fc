"""The extraction worker as a plain object, without Ray."""

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
