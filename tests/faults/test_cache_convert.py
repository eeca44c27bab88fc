"""Conversions that are killed, interrupted or run out of disk: nothing that looks whole, and the next one cleans up."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stages.cache import FeatureCache, Fingerprint
from stages.cache.convert import convert
from stages.errors import UserError
from tests.small_disk import small_disk_at

KINDS = ["zarr", "webdataset", "hdf5"]
NUM_VIDEOS = 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    made = FeatureCache.create_or_open(
        tmp_path_factory.mktemp("source") / "cache", Fingerprint(fields={"storage": "float16"})
    )
    random = np.random.default_rng(0)
    for number in range(NUM_VIDEOS):
        made.write_video(
            f"v{number:02d}",
            times_s=np.arange(20.0),
            features=random.standard_normal((20, 40, 64)).astype(np.float16),
            targets=random.standard_normal((20, 8)).astype(np.float32),
        )
    return made


def start(cache, target, kind):
    """`pipeline cache convert`, once it has written something."""
    command = [sys.executable, "-m", "pipeline", "cache", "convert", str(cache.root), str(target), "--to", kind]
    process = subprocess.Popen(
        [*command, "--shard-gb", "0.0003"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not any(
        path.is_file() and path.stat().st_size for path in [*target.parent.glob(".*"), *target.parent.rglob(".*/**/*")]
    ):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    return process


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_conversion_leaves_no_target_and_the_next_removes_its_leftover(cache, tmp_path, kind):
    target = tmp_path / "export"
    process = start(cache, target, kind)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not target.exists()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".export.convert-")
    with pytest.raises(UserError):
        FeatureCache.open(target)
    convert(cache, target, kind, shard_bytes=10**6, on_video=lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert all(result.ok for result in FeatureCache.open(target).verify_all())


def test_an_interrupted_conversion_leaves_nothing_at_all(cache, tmp_path):
    process = start(cache, tmp_path / "export", "webdataset")
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130, said
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_still_runs_is_not_cleaned_up_by_another(cache, tmp_path):
    process = start(cache, tmp_path / "export", "webdataset")
    process.send_signal(signal.SIGSTOP)
    convert(cache, tmp_path / "export", "hdf5", shard_bytes=10**6, on_video=lambda: None)
    process.send_signal(signal.SIGCONT)
    said = process.communicate()[1]
    assert (process.returncode, "the target exists" in said) == (2, True), said
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert FeatureCache.open(tmp_path / "export").store.kind == "hdf5"


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "5m") as folder:
        yield folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small_is_known_before_anything_is_written(cache, small_disk, kind):
    (small_disk / "filler").write_bytes(bytes(3 * 2**20))
    with pytest.raises(UserError, match=r"the disk is too small: 0\.00\d GB are to be written, 0\.00\d GB are free"):
        convert(cache, small_disk / "export", kind, shard_bytes=10**6, on_video=lambda: None)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(cache, small_disk, kind):
    def fill():
        free = os.statvfs(small_disk)
        with (small_disk / "filler").open("ab") as filler:
            filler.write(bytes(free.f_bavail * free.f_bsize - 50_000 if free.f_bavail * free.f_bsize > 50_000 else 0))

    with pytest.raises(UserError, match="the disk is full"):
        convert(cache, small_disk / "export", kind, shard_bytes=10**6, on_video=fill)
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
