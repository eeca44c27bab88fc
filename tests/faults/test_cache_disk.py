"""Disks that refuse to be written: one clear error, nothing half committed, nothing left lying about."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from stages.cache import FeatureCache, Fingerprint
from stages.errors import UserError
from tests.small_disk import small_disk_at


def make(root):
    return FeatureCache.create_or_open(root, Fingerprint(fields={"storage": "float16"}))


def content(num_frames):
    return {
        "times_s": np.arange(float(num_frames)),
        "features": np.ones((num_frames, 3, 4), np.float16),
        "targets": np.ones((num_frames, 5), np.float32),
    }


LIMITED_WRITE = """
    import resource, sys
    import numpy as np
    from stages.cache import FeatureCache
    from stages.errors import UserError
    cache = FeatureCache.open(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        cache.write_video("v", times_s=np.arange(40.0), features=np.ones((40, 20, 100), np.float16),
                          targets=np.ones((40, 5), np.float32))
    except UserError as error:
        print(error)
"""


def test_a_write_that_the_system_cuts_off_commits_nothing_and_cleans_up(tmp_path):
    cache = make(tmp_path / "cache")
    program = [sys.executable, "-c", textwrap.dedent(LIMITED_WRITE), str(cache.root)]
    said = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    assert f"{cache.root}: the file-size limit of this process is reached" in said
    assert f"needs {40 * (20 * 100 * 2 + 5 * 4 + 8):,} bytes and nothing was committed" in said
    assert cache.video_ids() == []
    assert [path for path in cache.root.rglob("*") if path.is_file()] == [cache.root / "fingerprint.json"]


@pytest.fixture
def small_disk(tmp_path):
    with small_disk_at(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk_keeps_the_old_revision_and_frees_what_was_written(small_disk):
    cache = make(small_disk)
    cache.write_video("v", **content(20))
    big = {**content(20), "features": np.ones((20, 100, 100), np.float16)}
    for name in ("v", "w"):
        with pytest.raises(UserError, match=r"the disk is full; writing here needs 400,\d{3} bytes"):
            cache.write_video(name, **big)
    assert cache.video_ids() == ["v"]
    assert cache.verify("v").ok
    assert list((cache.root / "tmp").iterdir()) == []
    cache.write_video("w", **content(20))


def test_a_ledger_on_a_full_disk_ends_in_a_whole_line(small_disk):
    cache = make(small_disk)
    with cache.ledger.writer("run") as writer:
        writer.failed("v", reason="first", attempts=1)
        (small_disk / "filler").write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize))
        with pytest.raises(UserError, match="the disk is full"):
            writer.failed("w", reason="x" * 10_000, attempts=1)
    log = cache.ledger.read()
    assert list(log.latest) == ["v"]
    assert log.torn == ()


def test_a_read_only_disk_is_one_clear_error_and_can_still_be_read(small_disk):
    cache = make(small_disk)
    written = content(5)
    cache.write_video("v", **written)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match="the file system is read-only"):
        cache.write_video("w", **written)
    with pytest.raises(UserError, match="the file system is read-only"):
        make(small_disk / "another")
    with pytest.raises(UserError, match="the file system is read-only"):
        cache.ledger.writer("run").failed("w", reason="x", attempts=1)
    np.testing.assert_array_equal(FeatureCache.open(small_disk).read("v", [0.0]).targets, written["targets"][:1])
