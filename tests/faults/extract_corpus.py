"""A corpus for the extraction's fault tests, its tasks, and a cache of it that nobody disturbed."""

import os
import shutil

import pytest
import torch

from pipeline.settings import locations
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.extract.extraction import Extraction
from stages.extract.worker import ExtractionJob, ExtractionWorker
from stages.frozen.identity import fingerprint, settle_precision
from stages.process_tree import command_line, descendants
from tests.cached import records_of

VIDEOS_PER_SPLIT = {"train": 4, "val": 4, "test": 4}
VIDEOS = sum(VIDEOS_PER_SPLIT.values())

# Passes of two frames: the moments at which a kill may fall are many. One decode child: it starts twice as fast as two.
SETTINGS = ("extract.batch_size=2", "extract.decode_workers=1")

# Of all kills that EXTRACT_KILLS asks for, and how many there are without it.
_SHARES = {"driver": (0.3, 1), "actor": (0.35, 1), "child": (0.35, 4)}


def num_kills(kind):
    """How often a driver, a model actor or a decode child is killed; `EXTRACT_KILLS=20` makes it 20 in total."""
    share, usual = _SHARES[kind]
    total = int(os.environ.get("EXTRACT_KILLS", "0"))
    return round(share * total) if total else usual


def prepare(folder, cache="cache", *settings, **flags):
    """What `pipeline extract` does before it starts Ray."""
    options = {
        "data.dataset": "synthetic",
        "data.videos": str(folder / "data" / "videos"),
        "data.annotations": str(folder / "data" / "annotations"),
    }
    config = resolve(preset="tiny", options=options, overrides=[*SETTINGS, *settings]).config
    manifest = locations.manifest_of(config, with_videos=True)
    extract = settle_precision(config.extract)
    made = FeatureCache.create_or_open(folder / cache, fingerprint(config, extract))
    job = ExtractionJob(config.encoder, config.teacher, extract, str(folder / cache))
    videos = locations.videos_root(config)
    flags = {"retry_failed": False, **flags}
    return Extraction(manifest, plan_frames(manifest), made, job, videos=videos, **flags)


def run_here(extraction, before_video=lambda _count: None, threads=None, on_progress=lambda _progress: None):
    """Run an extraction in this process, video by video; `before_video` is told how many have ended.

    With as many threads as an actor on a node with so many cores has: the last bits depend on them.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    worker = ExtractionWorker(extraction.job)

    def process_all(tasks):
        for count, task in enumerate(tasks):
            before_video(count)
            yield worker.process(task), 1

    try:
        return extraction.run(process_all, lambda _outcome, progress: on_progress(progress))
    finally:
        worker.close()
        torch.set_num_threads(usual)


def checksums(cache):
    """The checksum of each committed video's content: equal where every bit is."""
    return {record.video: record.checksum for record in records_of(FeatureCache.open(cache))}


def problems(cache):
    """What `pipeline cache verify` complains of; leftovers of a kill are swept by the next run."""
    return [result for result in FeatureCache.open(cache).verify_all() if not result.ok]


def committed(folder):
    """Each commit record's bytes: they name a revision, so they change when a video is written again."""
    commits = folder / "cache" / "commits"
    return {path.stem: path.read_bytes() for path in commits.glob("*.json")} if commits.is_dir() else {}


def named(pid, words):
    """The descendants of `pid` whose command line holds `words`."""
    found = []
    for child in descendants(pid):
        try:
            line = command_line(child)
        except OSError:
            continue
        if words in line:
            found.append(child)
    return found


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """The videos, and `whole`: their undisturbed cache."""
    from stages.data.synthetic import generate

    folder = tmp_path_factory.mktemp("source")
    generate(folder / "data", seed=3, videos_per_split=VIDEOS_PER_SPLIT, workers=1)
    assert run_here(prepare(folder, "whole")).done == VIDEOS
    return folder


@pytest.fixture
def corpus(source, tmp_path):
    """The same videos in a folder of the test's own."""
    shutil.copytree(source / "data", tmp_path / "data")
    return tmp_path
