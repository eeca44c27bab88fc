"""A run that looks trained: real files of the tiny preset, random features in its cache, random weights in its
checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.runs.models import build_for_training, write_loading
from pipeline.runs.run_folder import RunFolder
from pipeline.settings import locations
from pipeline.settings.config import PipelineConfig, resolve
from stages.cache import FeatureCache
from stages.data.frame_plan import plan_frames
from stages.data.synthetic import generate
from stages.frozen.identity import fingerprint, settle_precision
from stages.networks.checkpoint import Checkpoints, Position

WIDTH, PATCHES = 96, 65


def small_set(folder: Path) -> Path:
    """Four synthetic videos a split, under `folder`/data."""
    generate(folder / "data", seed=1, videos_per_split={"train": 4, "val": 4, "test": 4}, workers=1)
    return folder


def finished_config(folder: Path) -> PipelineConfig:
    """The tiny preset on `small_set`, with cache and run in the same folder."""
    options = {
        "data.videos": str(folder / "data" / "videos"),
        "data.annotations": str(folder / "data" / "annotations"),
        "cache.root": str(folder / "cache"),
    }
    return resolve(preset="tiny", options=options, overrides=[f"run.folder={folder}", "run.name=run"]).config


def fill_cache(root: Path, config: PipelineConfig, failed: frozenset[str] = frozenset()) -> FeatureCache:
    """A cache of random features of every planned video, but for those that `failed`."""
    cache = FeatureCache.create_or_open(root, fingerprint(config, settle_precision(config.extract)))
    random = np.random.default_rng(0)
    with cache.ledger.writer() as ledger:
        for video, times in plan_frames(locations.manifest_of(config)).times_s.items():
            if video in failed:
                ledger.failed(video, reason="broken on purpose", attempts=1)
                continue
            features = random.standard_normal((len(times), PATCHES, WIDTH)).astype(np.float16)
            targets = random.standard_normal((len(times), WIDTH)).astype(np.float32)
            record = cache.write_video(video, times_s=times, features=features, targets=targets)
            ledger.done(video, checksum=record.checksum, attempts=1)
    return cache


def finished_run(config: PipelineConfig, cache: FeatureCache) -> Path:
    """The run's folder, with one checkpoint after 8 steps of 1 epoch."""
    loaded = build_for_training(config, cache, locations.manifest_of(config, ["train"]).samples[0])
    path = locations.run_folder(config)
    write_loading(path, loaded.loading)
    RunFolder.create(path, config, {"fingerprint": cache.fingerprint.digest})
    torch.manual_seed(0)
    for parameter in loaded.model.trained_parameters().values():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    Checkpoints(path).save(loaded.model.trained_tensors(), {}, Position(1, 8), keep=1)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the module's own: its tests write into it."""
    return small_set(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def config(folder: Path) -> PipelineConfig:
    """See `finished_config`."""
    return finished_config(folder)


@pytest.fixture(scope="module")
def cache(folder: Path, config: PipelineConfig) -> FeatureCache:
    """See `fill_cache`."""
    return fill_cache(folder / "cache", config)


@pytest.fixture(scope="module")
def run(config: PipelineConfig, cache: FeatureCache) -> Path:
    """See `finished_run`."""
    return finished_run(config, cache)
