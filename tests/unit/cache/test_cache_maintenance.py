"""Checking, counting and sweeping a cache: each kind of damage is named, and nothing that is needed is removed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from stages.cache import DamagedCacheError, FeatureCache, Fingerprint
from stages.cache.convert import convert
from stages.cache.files.writers import current_writer
from tests.cached import records_of
from tests.conftest import run_pipeline


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
    record = next(record for record in records_of(cache) if record.video == video)
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


def damage_padding(group):
    path = group / "features" / "c.2.0.0"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return "features: chunk 2 (rows 20 to 24): the padding behind these rows changed"


def damage_keys(group):
    path = group / "targets" / "zarr.json"
    path.write_text(path.read_text().replace('"separator": "."', '"separator": "/"'))
    return "targets: zarr.json has another chunk_key_encoding than the commit record"


def damage_group_metadata(group):
    (group / "zarr.json").write_text("{")
    return "group: zarr.json is broken"


def damage_metadata(group):
    (group / "times_s" / "zarr.json").unlink()
    return "times_s: zarr.json is gone"


def damage_group(group):
    shutil.rmtree(group)
    return f"the group {group.name} is gone"


@pytest.mark.parametrize(
    "damage",
    [
        damage_missing,
        damage_bit,
        damage_cut,
        damage_shape,
        damage_padding,
        damage_keys,
        damage_group_metadata,
        damage_metadata,
        damage_group,
    ],
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
    with pytest.raises(DamagedCacheError, match=r"this file is (gone|cut short)\. Run `pipeline cache verify`"):
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


# --- repair and prune


def planned(*videos):
    return dict.fromkeys(videos, np.arange(25) / 25)


def commit(cache, *videos):
    with cache.ledger.writer() as ledger:
        for video in videos:
            ledger.done(video, checksum=cache.write_video(video, **content(25)).checksum, attempts=1)


def break_record(cache, video):
    (cache.root / "commits" / f"{video}.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [damage_missing, damage_bit, damage_cut, damage_shape, damage_metadata, damage_group, break_record]
)
def test_a_damaged_video_is_put_back_into_the_queue_and_extracting_again_mends_it(cache, damage):
    commit(cache, "good", "bad")
    damage(cache, "bad") if damage is break_record else damage(group_of(cache, "bad"))
    assert cache.requeue(["good", "bad"]) == ("bad",)
    cache.sweep()
    status = cache.ledger.status(planned("good", "bad"))
    assert (status.done, status.pending, status.failed, status.damaged) == ({"good"}, {"bad"}, {}, {})
    assert all(result.ok for result in cache.verify_all())
    assert [path.name.partition(".")[0] for path in (cache.root / "videos").iterdir()] == ["good"]
    commit(cache, "bad")
    assert cache.ledger.status(planned("good", "bad")).done == {"good", "bad"}


def test_a_requeued_video_is_pending_even_if_adding_frames_to_it_had_failed(cache):
    commit(cache, "v")
    with cache.ledger.writer() as ledger:
        ledger.failed("v", reason="timeout", attempts=1)
    damage_bit(group_of(cache, "v"))
    cache.requeue(["v"])
    assert cache.ledger.status(planned("v")).pending == {"v"}
    assert "CRC-32C" in cache.ledger.read().latest["v"].reason


def test_verify_names_a_video_that_the_ledger_lists_and_nobody_finds(cache):
    commit(cache, "here", "gone")
    shutil.rmtree(group_of(cache, "gone"))
    (cache.root / "commits" / "gone.json").unlink()
    bad = [result for result in cache.verify_all() if not result.ok]
    assert [(result.video, result.orphan) for result in bad] == [("gone", False)]
    assert bad[0].problems == ("the ledger lists it as done, but nothing is committed",)


def leave_leftovers(cache):
    orphan = cache.root / "videos" / "v.00c0ffee"
    shutil.copytree(group_of(cache, "v"), orphan)
    dead = cache.root / "tmp" / f"dddd.{2**22 + 1}.1.{current_writer().split('.', 2)[2]}"
    dead.mkdir(parents=True)
    (dead / "half").write_bytes(bytes(1000))
    return sum(path.stat().st_size for path in orphan.rglob("*") if path.is_file()) + 1000


def test_a_dry_run_says_what_and_how_much_and_removes_nothing(cache):
    commit(cache, "v")
    expected = leave_leftovers(cache)
    before = sorted(cache.root.rglob("*"))
    told = cache.sweep(dry_run=True)
    assert (len(told.removed), told.freed_bytes) == (2, expected)
    assert sorted(cache.root.rglob("*")) == before
    assert cache.sweep() == told
    assert cache.sweep(dry_run=True).removed == ()
    assert cache.verify("v").ok


def pipeline_cache(*arguments):
    done = run_pipeline("cache", *arguments)
    assert "Traceback" not in done.stderr
    return done


def test_the_commands_verify_repair_and_prune_go_together(cache):
    commit(cache, "good", "bad", "lost")
    damage_bit(group_of(cache, "bad"))
    shutil.rmtree(group_of(cache, "lost"))
    (cache.root / "commits" / "lost.json").unlink()
    found = pipeline_cache("verify", cache.root)
    assert found.returncode == 3
    assert "video lost: the ledger lists it as done" in found.stdout
    assert " 2/2 " in found.stderr  # videos that are there to be read
    assert "video bad: targets: chunk 2" in found.stdout
    assert f"pipeline cache verify {cache.root} --repair" in found.stdout.replace("\n", " ")
    mended = pipeline_cache("verify", cache.root, "--repair", "--json")
    assert mended.returncode == 0
    assert json.loads(mended.stdout)["requeued"] == ["bad", "lost"]
    assert "1 damaged video and 1 leftover removed" in mended.stderr
    assert "it extracts 2 videos again" in mended.stderr
    assert pipeline_cache("verify", cache.root).returncode == 0
    shutil.copytree(group_of(cache, "good"), cache.root / "videos" / "good.00c0ffee")
    told = json.loads(pipeline_cache("prune", cache.root, "--dry-run", "--json").stdout)
    assert (told["removed"], told["dry_run"]) == (["videos/good.00c0ffee"], True)
    assert json.loads(pipeline_cache("prune", cache.root, "--json").stdout)["freed_bytes"] == told["freed_bytes"] > 0
    assert not (cache.root / "videos" / "good.00c0ffee").exists()


def test_the_command_convert_writes_what_the_commands_info_and_verify_read(cache, tmp_path):
    commit(cache, "a", "b")
    target = tmp_path / "export.h5"
    done = pipeline_cache("convert", cache.root, target, "--to", "hdf5", "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert (said["kind"], said["num_videos"], said["num_frames"]) == ("hdf5", 2, 50)
    assert json.loads(pipeline_cache("info", target, "--json").stdout)["kind"] == "hdf5"
    data = bytearray(target.read_bytes())
    data[-3000] ^= 1
    target.write_bytes(data)
    assert pipeline_cache("verify", target).returncode in (2, 3)
    refused = pipeline_cache("verify", target, "--repair")
    assert (refused.returncode, "exports are read-only" in refused.stderr) == (2, True)


def test_the_command_verify_says_of_a_cut_shard_what_helps(cache, tmp_path):
    commit(cache, "a", "b")
    target = tmp_path / "export"
    convert(cache, target, "webdataset", shard_bytes=10**9, on_video=lambda: None)
    shard = target / "shards" / "000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    found = pipeline_cache("verify", target)
    assert found.returncode == 3
    assert " 2/2 " in found.stderr
    assert f"video b: {shard}: this file is cut short\n" in found.stdout
    assert "part shards/000000.tar: this shard has" in found.stdout
    assert found.stdout.endswith("problems; export the cache again\n")
    with pytest.raises(
        DamagedCacheError, match=r"cut short\. Run `pipeline cache verify`, then export the cache again"
    ):
        FeatureCache.open(target).read("b", [0.0])


def test_a_name_that_no_file_system_takes_is_one_line(tmp_path):
    refused = pipeline_cache("info", tmp_path / ("long" * 100))
    assert refused.returncode == 2
    assert "this name is too long" in refused.stderr
    assert "Traceback" not in refused.stderr
