"""Exports of a cache: equal to it bit for bit, read in the same way, never written, and there and back again."""

import json
import multiprocessing
import os
import shutil
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from stages.cache import DamagedCacheError, FeatureCache, Fingerprint, MissingFramesError
from stages.cache.convert import convert
from stages.data.manifest import Sample
from stages.errors import UserError
from tests.cached import records_of

KINDS = ["webdataset", "hdf5"]
# "a.b" and "a.c" would be one sample of WebDataset if their dots were not escaped.
IDS = ["-dash", "a.b", "a.c", "plain", "y" * 200]
PLANNED = {**{video: np.arange(12) / 25 for video in IDS}, "failed": np.arange(3.0), "new": np.arange(3.0)}


def fill(root, storage="float16"):
    cache = FeatureCache.create_or_open(root, Fingerprint(fields={"storage": storage, "layer": 2}))
    with cache.ledger.writer() as ledger:
        for number, video in enumerate(IDS):
            random = np.random.default_rng(number)
            num_frames = 12 + 5 * number
            record = cache.write_video(
                video,
                times_s=np.arange(num_frames) / 25,
                features=random.standard_normal((num_frames, 3, 4)).astype(np.float32),
                targets=random.standard_normal((num_frames, 5)).astype(np.float32),
            )
            if video != "plain":  # this one's event was lost to a kill
                ledger.done(video, checksum=record.checksum, attempts=1)
        ledger.failed("failed", reason="no such file", attempts=2)
    return cache


def export(cache, target, kind, shard_bytes=10**9):
    convert(cache, target, kind, shard_bytes=shard_bytes, on_video=lambda: None)
    return FeatureCache.open(target)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("source") / "cache")


@pytest.fixture(scope="module", params=KINDS)
def exported(request, cache, tmp_path_factory):
    """An export that no test changes; three or four videos a shard."""
    return export(cache, tmp_path_factory.mktemp(request.param) / "export", request.param, shard_bytes=6000)


def committed_files(root):
    """Everything that counts in a cache; the lock is no part of it."""
    folders = ("videos", "commits", "ledger")
    files = {path for folder in folders for path in (root / folder).rglob("*") if path.is_file()}
    return {str(path.relative_to(root)): path.read_bytes() for path in files | {root / "fingerprint.json"}}


# --- equal


def test_an_export_gives_the_same_videos_times_frames_and_fingerprint(cache, exported):
    assert exported.fingerprint == cache.fingerprint
    assert exported.video_ids() == cache.video_ids() == sorted(IDS)
    mine, theirs = ([record.model_dump_json() for record in records_of(one)] for one in (cache, exported))
    assert theirs == mine
    for video in IDS:
        times_s = cache.cached_times_s(video)
        np.testing.assert_array_equal(exported.cached_times_s(video), times_s)
        for asked in (times_s, times_s[[7, 7, 2, 3, 4, 11, 0]], times_s[[5]], times_s[:0]):
            mine, theirs = cache.read(video, asked), exported.read(video, asked)
            for name in ("times_s", "features", "targets"):
                np.testing.assert_array_equal(getattr(theirs, name), getattr(mine, name))
        assert exported.read(video, times_s, features=False).features is None


def test_the_ledger_of_an_export_gives_each_video_the_same_state(cache, exported):
    mine, theirs = cache.ledger.status(PLANNED), exported.ledger.status(PLANNED)
    assert (theirs.done, theirs.failed, theirs.pending) == (mine.done, mine.failed, mine.pending)
    assert (set(mine.failed), mine.pending, theirs.unlisted) == ({"failed"}, {"new"}, {"plain"})


@pytest.mark.parametrize("storage", ["float16", "float32", "bfloat16", "int8"])
def test_a_cache_that_was_exported_and_taken_back_has_the_same_files(tmp_path, storage):
    first = last = fill(tmp_path / "cache", storage)
    for kind in ("hdf5", "webdataset", "hdf5", "zarr"):
        back = last = export(last, tmp_path / f"{len(list(tmp_path.iterdir()))}", kind)
    assert committed_files(back.root) == committed_files(first.root)
    assert all(result.ok for result in back.verify_all())
    record = back.write_video(
        "another",
        times_s=np.arange(2.0),
        features=np.ones((2, 3, 4), np.float32),
        targets=np.ones((2, 5), np.float32),
    )
    assert record.fingerprint == first.fingerprint.digest


def test_verify_and_info_of_an_export_say_what_those_of_the_cache_say(cache, exported):
    assert all(result.ok for result in exported.verify_all())
    mine, theirs = cache.info(), exported.info()
    assert (theirs.num_videos, theirs.num_frames, theirs.num_bytes) == (
        mine.num_videos,
        mine.num_frames,
        mine.num_bytes,
    )
    assert (theirs.num_orphans, theirs.damaged) == (0, ())
    assert theirs.stored_bytes > theirs.num_bytes
    assert (mine.kind, theirs.kind) == ("zarr", exported.store.kind)


def test_a_missing_frame_or_video_of_an_export_names_the_command(exported):
    with pytest.raises(MissingFramesError, match=r"no cached frame within .*Run `pipeline extract"):
        exported.read("plain", [0.01])
    with pytest.raises(MissingFramesError, match="video 'w' is not in this cache"):
        exported.read("w", [0.0])


# --- formats


def test_the_shards_are_a_webdataset_of_plain_numpy_arrays(cache, tmp_path):
    export(cache, tmp_path / "export", "webdataset", shard_bytes=6000)
    shards = sorted(str(path) for path in (tmp_path / "export" / "shards").iterdir())
    assert len(shards) > 1
    import webdataset  # it brings torch, which the worker processes below need not wait for

    samples = {s["__key__"]: s for s in webdataset.WebDataset(shards, shardshuffle=False).decode()}
    assert set(samples) == {video.replace(".", "%2E") for video in IDS}
    for video in IDS:
        sample, whole = samples[video.replace(".", "%2E")], cache.read(video, cache.cached_times_s(video))
        assert sample["record.json"]["video"] == video
        for name in ("times_s", "features", "targets"):
            np.testing.assert_array_equal(sample[f"{name}.npy"], getattr(whole, name))


def test_shards_stay_below_the_size_that_was_asked_for(cache, tmp_path):
    sizes = {}
    for bound in (1, 8000, 10**9):
        export(cache, tmp_path / str(bound), "webdataset", shard_bytes=bound)
        sizes[bound] = [path.stat().st_size for path in (tmp_path / str(bound) / "shards").iterdir()]
    assert len(sizes[1]) == len(IDS)
    assert 1 < len(sizes[8000]) < len(IDS)
    assert len(sizes[10**9]) == 1


def test_the_hdf5_file_holds_plain_contiguous_datasets(cache, tmp_path):
    export(cache, tmp_path / "export.h5", "hdf5")
    with h5py.File(tmp_path / "export.h5") as file:
        assert sorted(file["videos"]) == sorted(IDS)
        for video in IDS:
            whole = cache.read(video, cache.cached_times_s(video))
            for name in ("times_s", "features", "targets"):
                dataset = file["videos"][video][name]
                assert dataset.chunks is None
                np.testing.assert_array_equal(dataset[:], getattr(whole, name))


# --- Stage 2


def read_in_another_process(cache):
    return cache.read("a.b", cache.cached_times_s("a.b")).features


def test_an_opened_export_can_be_handed_to_a_worker_and_is_opened_there(exported):
    mine = read_in_another_process(exported)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read_in_another_process, (exported,)), mine)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read_in_another_process, (exported,)), mine)


def test_stage_2_reads_windows_out_of_an_export(cache, exported):
    from stages.batches.windows import WindowDataset

    times_s = tuple(cache.cached_times_s("plain")[[3, 4, 9]])
    sample = Sample(id="s", video="plain", task="t", question="?", answer="a", split="train", times_s=times_s)
    mine, theirs = (WindowDataset(one, [sample], tolerance_s=0.0, with_targets=True)[0] for one in (cache, exported))
    assert theirs.features.equal(mine.features)
    assert theirs.targets.equal(mine.targets)


# --- read-only


def test_nothing_writes_into_an_export(exported):
    frame = {"features": np.ones((1, 3, 4), np.float16), "targets": np.ones((1, 5), np.float32)}
    attempts = [
        lambda: exported.write_video("w", times_s=np.zeros(1), **frame),
        lambda: FeatureCache.create_or_open(exported.root, exported.fingerprint),
        lambda: exported.ledger.writer(),
        lambda: exported.sweep(),
        lambda: exported.requeue(["plain"]),
    ]
    for attempt in attempts:
        with pytest.raises(UserError, match=rf"this is a {exported.store.kind} export of a cache, .* read-only"):
            attempt()


# --- the target


@pytest.mark.parametrize("kind", ["zarr", *KINDS])
def test_a_target_that_is_not_empty_is_refused_and_left_alone(cache, tmp_path, kind):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "folder", tmp_path / "file"):
        with pytest.raises(UserError, match="the target exists and is not empty"):
            export(cache, target, kind)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "thesis.tex"]


def test_a_target_inside_the_source_is_refused(cache):
    before = sorted(cache.root.rglob("*"))
    with pytest.raises(UserError, match="the target is inside the source"):
        export(cache, cache.root / "export", "webdataset")
    assert sorted(cache.root.rglob("*")) == before


@pytest.mark.parametrize("kind", ["zarr", *KINDS])
def test_an_empty_folder_is_taken_as_the_target(cache, tmp_path, kind):
    (tmp_path / "empty").mkdir()
    assert export(cache, tmp_path / "empty", kind).video_ids() == sorted(IDS)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("kind", ["zarr", *KINDS])
def test_a_damaged_video_stops_the_conversion_and_leaves_nothing(tmp_path, kind):
    cache = fill(tmp_path / "cache")
    group = next((cache.root / "videos").glob("plain.*"))
    chunk = group / "features" / "c.1.0.0"
    data = bytearray(chunk.read_bytes())
    data[5] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedCacheError, match=r"video 'plain' is damaged .*rows 10 to 19.* nothing was converted"):
        export(cache, tmp_path / "export", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_videos_that_were_never_committed_and_leftovers_are_not_exported(tmp_path):
    cache = fill(tmp_path / "cache")
    shutil.copytree(next((cache.root / "videos").glob("plain.*")), cache.root / "videos" / "orphan.00c0ffee")
    (cache.root / "tmp" / "left").mkdir(parents=True)
    back = export(cache, tmp_path / "copy", "zarr")
    assert back.video_ids() == sorted(IDS)
    assert len(list((back.root / "videos").iterdir())) == len(IDS)
    assert not (back.root / "tmp").exists()


# --- exports of somebody else


def rename_video_in_index(root, name):
    index = json.loads((root / "index.json").read_text())
    index["videos"][name] = index["videos"].pop("plain")
    (root / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", ".hidden", ""])
def test_an_id_of_a_foreign_export_never_becomes_a_path(cache, tmp_path, name):
    export(cache, tmp_path / "shards", "webdataset")
    rename_video_in_index(tmp_path / "shards", name)
    with pytest.raises(UserError, match="video id cannot be used as a name"):
        export(FeatureCache.open(tmp_path / "shards"), tmp_path / "back", "zarr")
    export(cache, tmp_path / "file.h5", "hdf5")
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        index = json.dumps({"format_version": 1, "videos": [name]}).encode()
        del file["index.json"]
        file["index.json"] = np.frombuffer(index, np.uint8)
    with pytest.raises(UserError, match="video id cannot be used as a name"):
        export(FeatureCache.open(tmp_path / "file.h5"), tmp_path / "back", "zarr")
    assert not (tmp_path / "back").exists()


def test_a_record_whose_arrays_have_paths_for_names_is_not_believed(cache, tmp_path):
    export(cache, tmp_path / "file.h5", "hdf5")
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        path = "videos/plain/record.json"
        record = json.loads(bytes(file[path][:]))
        record["arrays"]["../../evil"] = record["arrays"]["targets"]
        del file[path]
        file[path] = np.frombuffer(json.dumps(record).encode(), np.uint8)
    with pytest.raises(DamagedCacheError, match="cannot be named so"):
        FeatureCache.open(tmp_path / "file.h5").read("plain", [0.0])


def test_links_of_a_foreign_file_to_other_files_are_not_followed(cache, tmp_path):
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["targets"] = np.zeros((27, 5), np.float32)
    export(cache, tmp_path / "file.h5", "hdf5")
    with h5py.File(tmp_path / "file.h5", "r+") as file:
        del file["videos/plain/targets"]
        file["videos/plain/targets"] = h5py.ExternalLink(str(secret), "targets")
    opened = FeatureCache.open(tmp_path / "file.h5")
    with pytest.raises(DamagedCacheError, match="videos/plain/targets is gone"):
        opened.read("plain", [0.0])
    assert not opened.verify("plain").ok


# --- damage


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


def place_of(root, video, member):
    entry = json.loads((root / "index.json").read_text())["videos"][video]
    return root / "shards" / f"{entry['shard']:06d}.tar", *entry["members"][member]


def flip_in_shard(root):
    path, offset, size = place_of(root, "plain", "features.npy")
    flip(path, offset + size - 7)
    return "plain", "features: chunk 2 (rows 20 to 26) has CRC-32C"


def flip_in_tar_header(root):
    path, offset, _ = place_of(root, "plain", "targets.npy")
    flip(path, offset - 512 + 3)
    return "plain", "targets.npy is not in shard"


def flip_in_npy_header(root):
    path, offset, _ = place_of(root, "plain", "times_s.npy")
    flip(path, offset + 22)
    return "plain", "times_s.npy: its header does not fit the commit record"


def flip_in_member_record(root):
    path, offset, size = place_of(root, "plain", "record.json")
    flip(path, offset + size // 2)
    return "plain", "broken commit record"


def cut_shard(root):
    path, offset, _ = place_of(root, "y" * 200, "features.npy")
    with path.open("r+b") as file:
        file.truncate(offset + 100)
    return "y" * 200, ""


def drop_from_index(root):
    index = json.loads((root / "index.json").read_text())
    del index["videos"]["a.b"]
    (root / "index.json").write_text(json.dumps(index))
    return "a.b", "the ledger lists it as done, but nothing is committed"


@pytest.mark.parametrize(
    "damage",
    [flip_in_shard, flip_in_tar_header, flip_in_npy_header, flip_in_member_record, cut_shard, drop_from_index],
)
def test_verify_finds_each_damage_of_shards(cache, tmp_path, damage):
    export(cache, tmp_path / "export", "webdataset", shard_bytes=6000)
    video, expected = damage(tmp_path / "export")
    bad = {result.video: result for result in FeatureCache.open(tmp_path / "export").verify_all() if not result.ok}
    assert video in bad
    assert expected in bad[video].problems[0]
    assert {name for name, result in bad.items() if not result.orphan} == {video}


def test_only_the_videos_behind_the_cut_of_a_shard_are_named(cache, tmp_path):
    exported = export(cache, tmp_path / "export", "webdataset")
    ends = {video: place_of(exported.root, video, "record.json")[1] for video in exported.video_ids()}
    *before, last = sorted(ends, key=ends.get)
    path, offset, _ = place_of(exported.root, last, "targets.npy")
    os.truncate(path, offset + 10)
    found = {result.video: result.ok for result in FeatureCache.open(exported.root).verify_all() if not result.orphan}
    assert found == {**dict.fromkeys(before, True), last: False}


def test_verify_finds_shards_and_members_that_the_index_does_not_name(cache, tmp_path):
    exported = export(cache, tmp_path / "export", "webdataset")
    shutil.copy(tmp_path / "export" / "shards" / "000000.tar", tmp_path / "export" / "shards" / "000001.tar")
    drop_from_index(tmp_path / "export")
    orphans = {result.video: result for result in FeatureCache.open(exported.root).verify_all() if result.orphan}
    assert orphans["shards/000001.tar"].problems == ("the index does not name it",)
    assert "a%2Eb." in orphans["shards/000000.tar"].problems[0]
    assert FeatureCache.open(exported.root).info().num_orphans == 5


def test_a_shard_that_is_gone_is_an_error_on_read_and_named_by_verify(cache, tmp_path):
    exported = export(cache, tmp_path / "export", "webdataset")
    (tmp_path / "export" / "shards" / "000000.tar").unlink()
    with pytest.raises(DamagedCacheError, match=r"000000\.tar: this file is gone"):
        exported.read("plain", [0.0])
    problems = {result.video: result.problems for result in exported.verify_all() if not result.ok}
    assert set(problems) == {*IDS, "shards/000000.tar"}


def test_shards_without_their_index_are_no_cache_to_be_filled(cache, tmp_path):
    export(cache, tmp_path / "export", "webdataset")
    (tmp_path / "export" / "index.json").unlink()
    with pytest.raises(DamagedCacheError, match="the index of this export is gone"):
        FeatureCache.open(tmp_path / "export").video_ids()
    with pytest.raises(UserError, match="read-only"):
        FeatureCache.create_or_open(tmp_path / "export", cache.fingerprint)


def flip_in_file(path):
    with h5py.File(path) as file:
        offset = file["videos/plain/features"].id.get_offset()
    flip(path, offset + 3 * 4 * 2 * 20 + 1)
    return "plain", "features: chunk 2 (rows 20 to 26) has CRC-32C"


def drop_dataset(path):
    with h5py.File(path, "r+") as file:
        del file["videos/plain/targets"]
    return "plain", "targets"


def drop_group(path):
    with h5py.File(path, "r+") as file:
        del file["videos/plain"]
    return "plain", "there is no commit record"


def change_shape(path):
    with h5py.File(path, "r+") as file:
        del file["videos/plain/targets"]
        file["videos/plain/targets"] = np.zeros((27, 6), np.float32)
    return "plain", "does not fit the commit record"


@pytest.mark.parametrize("damage", [flip_in_file, drop_dataset, drop_group, change_shape])
def test_verify_finds_each_damage_of_the_hdf5_file(cache, tmp_path, damage):
    export(cache, tmp_path / "export.h5", "hdf5")
    video, expected = damage(tmp_path / "export.h5")
    bad = [result for result in FeatureCache.open(tmp_path / "export.h5").verify_all() if not result.ok]
    assert [result.video for result in bad] == [video]
    assert expected in bad[0].problems[0]


def test_verify_finds_an_orphan_and_a_missing_video_of_the_hdf5_file(cache, tmp_path):
    path = tmp_path / "export.h5"
    export(cache, path, "hdf5")
    with h5py.File(path, "r+") as file:
        file.move("videos/a.b", "videos/stranger")
    bad = {r.video: r for r in FeatureCache.open(path).verify_all() if not r.ok}
    assert (bad["stranger"].orphan, bad["a.b"].orphan) == (True, False)
    assert set(bad) == {"stranger", "a.b"}


@pytest.mark.parametrize("kept", [0.1, 0.6, 0.95])
def test_an_hdf5_file_that_was_cut_short_is_one_clear_error(cache, tmp_path, kept):
    path = tmp_path / "export.h5"
    export(cache, path, "hdf5")
    with path.open("r+b") as file:
        file.truncate(int(path.stat().st_size * kept))
    with pytest.raises(DamagedCacheError, match=r"export\.h5: HDF5 cannot read this file \(.*truncated"):
        FeatureCache.open(path)


def test_a_tar_member_is_where_tarfile_finds_it(cache, tmp_path):
    export(cache, tmp_path / "export", "webdataset")
    path, offset, size = place_of(tmp_path / "export", "y" * 200, "features.npy")
    with tarfile.open(path) as tar:
        member = tar.getmember(f"{'y' * 200}.features.npy")
    assert (member.offset_data, member.size) == (offset, size)
    assert Path(path).stat().st_size % tarfile.BLOCKSIZE == 0
