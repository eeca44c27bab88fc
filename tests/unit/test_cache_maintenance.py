"""Checking, counting and sweeping a cache: each kind of damage is named, and nothing that is needed is removed."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.cache import DamagedCacheError, FeatureCache, Fingerprint
from stages.cache.writers import current_writer


@pytest.fixture
def cache(tmp_path):
    return FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float16"}))


def content(num_frames):
    random = np.random.default_rng(0)
    return {
        "times_s": np.arange(num_frames) / 25,
        "features": random.standard_normal((num_frames, 3, 4)).astype(np.float16),
        "targets": random.standard_normal((num_frames, 5)).astype(np.float32),
    }


def group_of(cache, video) -> Path:
    record = next(record for record in cache.commits() if record.video == video)
    return cache.root / "videos" / record.group


# --- damage


def damage_missing(group):
    (group / "features" / "c.1.0.0").unlink()
    return "features: chunk 1 (rows 10 to 19) is missing"


def damage_bit(group):
    path = group / "targets" / "c.2.0"
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)
    return "targets: chunk 2 (rows 20 to 24) has CRC-32C"


def damage_cut(group):
    os.truncate(group / "features" / "c.0.0.0", 100)
    return "features: chunk 0 (rows 0 to 9) has 100 bytes instead of 240"


def damage_shape(group):
    path = group / "features" / "zarr.json"
    path.write_text(path.read_text().replace("25", "26", 1))
    return "features: zarr.json has another shape than the commit record"


def damage_metadata(group):
    (group / "times_s" / "zarr.json").unlink()
    return "times_s: zarr.json is gone"


def damage_group(group):
    shutil.rmtree(group)
    return f"the group {group.name} is gone"


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_bit, damage_cut, damage_shape, damage_metadata, damage_group]
)
def test_verify_names_each_kind_of_damage_and_only_that(cache, damage):
    cache.write_video("good", **content(25))
    cache.write_video("bad", **content(25))
    expected = damage(group_of(cache, "bad"))
    results = {result.video: result for result in cache.verify_all()}
    assert results["good"].ok
    assert [problem[: len(expected)] for problem in results["bad"].problems] == [expected]


@pytest.mark.parametrize("damage", [damage_missing, damage_cut, damage_group])
def test_reading_damaged_frames_stops_instead_of_returning_fill_values(cache, damage):
    written = content(25)
    cache.write_video("v", **written)
    damage(group_of(cache, "v"))
    with pytest.raises(DamagedCacheError, match=r"this chunk is (gone|cut short)\. Run `pipeline cache verify`"):
        cache.read("v", written["times_s"])


@pytest.mark.parametrize("old_new", [("float16", "float32"), ("0.04", "0.05"), ('"v"', '"w"'), ("{", "")])
def test_a_commit_record_that_was_changed_is_not_believed(cache, old_new):
    cache.write_video("v", **content(5))
    path = cache.root / "commits" / "v.json"
    path.write_text(path.read_text().replace(*old_new, 1))
    with pytest.raises(DamagedCacheError, match=r"v\.json: broken commit record"):
        cache.read("v", [0.0])
    assert not cache.verify("v").ok
    assert cache.info().damaged == ("v",)
    assert cache.sweep().removed == ()
    cache.write_video("v", **content(5))
    assert cache.verify("v").ok


def test_a_commit_record_under_another_name_is_not_believed(cache):
    record = cache.write_video("v", **content(5))
    (cache.root / "commits" / "v.json").rename(cache.root / "commits" / "w.json")
    with pytest.raises(DamagedCacheError, match=r"w\.json: this commit record belongs to video 'v'"):
        cache.read("w", record.times_s)


# --- housekeeping


def test_info_counts_videos_frames_and_bytes(cache):
    cache.write_video("a", **content(25))
    cache.write_video("b", **content(10))
    info = cache.info()
    assert (info.num_videos, info.num_frames, info.num_orphans, info.damaged) == (2, 35, 0, ())
    assert info.num_bytes == 35 * (3 * 4 * 2 + 5 * 4 + 8)
    assert info.stored_bytes == sum(path.stat().st_size for path in (cache.root / "videos").rglob("c.*"))


def test_orphans_are_reported_and_swept_and_committed_groups_stay(cache):
    cache.write_video("v", **content(5))
    orphan = cache.root / "videos" / "v.00c0ffee"
    shutil.copytree(group_of(cache, "v"), orphan)
    results = list(cache.verify_all())
    assert [(result.video, result.ok, result.orphan) for result in results] == [("v", True, False), ("v", False, True)]
    assert cache.info().num_orphans == 1
    assert cache.sweep().removed == ("videos/v.00c0ffee",)
    assert cache.verify("v").ok
    assert not orphan.exists()


def test_the_sweep_spares_attempts_of_running_processes_and_of_other_hosts_until_they_are_old(cache):
    cache.write_video("v", **content(5))
    pid, start, host = current_writer().split(".", 2)
    tmp = cache.root / "tmp"
    mine, other_host = tmp / f"aaaa.{pid}.{start}.{host}", tmp / f"bbbb.{pid}.{start}.elsewhere"
    reused_id, dead, foreign = tmp / f"cccc.{pid}.1.{host}", tmp / f"dddd.{2**22 + 1}.1.{host}", tmp / "notes"
    for folder in (mine, other_host, reused_id, dead, foreign):
        (folder / "group").mkdir(parents=True)
    assert sorted(cache.sweep().removed) == [f"tmp/{reused_id.name}", f"tmp/{dead.name}"]
    for folder in (other_host, foreign):
        for path in (folder / "group", folder):
            os.utime(path, (0, 0))
    assert sorted(cache.sweep().removed) == [f"tmp/{other_host.name}", "tmp/notes"]
    assert [path.name for path in tmp.iterdir()] == [mine.name]


def test_a_group_about_to_be_named_by_a_live_attempt_is_no_orphan(cache):
    record = cache.write_video("v", **content(5))
    attempt = cache.root / "tmp" / f"aaaa.{current_writer()}"
    attempt.mkdir()
    (cache.root / "commits" / "v.json").rename(attempt / "record.json")  # the moment before the last rename
    assert cache.sweep().removed == ()
    assert (cache.root / "videos" / record.group).is_dir()
    shutil.rmtree(attempt)
    assert cache.sweep().removed == (f"videos/{record.group}",)
