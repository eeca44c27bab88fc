"""A cache at a URL: in fsspec's memory, on an S3-compatible server, behind a web server that only reads."""

import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from stages.cache import DamagedCacheError, FeatureCache, Fingerprint, MissingFramesError
from stages.cache.convert import convert
from stages.cache.files.lock import CACHE_LOCK
from stages.cache.files.places import CacheUrl, place_of
from stages.cache.files.remote_lock import STALE_AFTER_S
from stages.cache.files.writers import current_writer
from stages.errors import UserError
from tests.cached import records_of
from tests.object_stores import BUCKET, filesystem, s3_server, web_server

FIELDS = {"storage": "float16"}
VIDEOS = ("a", "b", "c")


def content(num_frames, *, seed=0):
    random = np.random.default_rng(seed)
    return {
        "times_s": np.arange(num_frames) / 25,
        "features": random.standard_normal((num_frames, 3, 4)).astype(np.float16),
        "targets": random.standard_normal((num_frames, 5)).astype(np.float32),
    }


def make(root, **changes):
    return FeatureCache.create_or_open(root, Fingerprint(fields={**FIELDS, **changes}))


def fill(cache, videos=VIDEOS):
    with cache.ledger.writer() as run:
        for seed, video in enumerate(videos):
            record = cache.write_video(video, **content(25, seed=seed))
            run.done(video, checksum=record.checksum, attempts=1)
    return cache


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        yield address


_number = iter(range(10_000))


@pytest.fixture(params=["memory", "s3"])
def root(request):
    """A place that nobody has used, on two kinds of store."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return f"{request.param}://{BUCKET}/caches/{next(_number)}"


@pytest.fixture
def s3_root(s3):  # noqa: ARG001  # the server must run
    return f"s3://{BUCKET}/caches/{next(_number)}"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return fill(make(tmp_path_factory.mktemp("served") / "cache"))


def put(root, path, data):
    filesystem().pipe_file(f"{root}/{path}", data)


def group_of(cache, video):
    return f"{cache.root}/videos/{next(r.group for r in records_of(cache) if r.video == video)}"


# --- writing and reading


def test_any_choice_of_frames_is_what_a_cache_on_a_disk_gives(root, local):
    cache = fill(make(root))
    for rows in (range(25), [20], [0, 3, 6, 9, 12], [5, 5, 6], [24, 2, 3, 0], []):
        times_s = content(25)["times_s"][list(rows)]
        here, there = local.read("b", times_s), FeatureCache.open(root).read("b", times_s)
        for name in ("times_s", "features", "targets"):
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    assert {r.video: r.checksum for r in records_of(cache)} == {r.video: r.checksum for r in records_of(local)}


def test_the_states_of_planned_videos_are_those_of_a_cache_on_a_disk(root):
    cache = fill(make(root))
    with cache.ledger.writer() as run:
        run.failed("d", reason="truncated: it ends early", attempts=2)
    status = FeatureCache.open(root).ledger.status({video: content(25)["times_s"] for video in "abcde"})
    assert (status.done, status.pending, status.unlisted) == (set(VIDEOS), {"e"}, set())
    assert status.failed["d"].reason == "truncated: it ends early"
    assert cache.info().num_videos == 3
    assert all(result.ok for result in cache.verify_all())


def test_any_zarr_reader_opens_a_group(s3_root):
    cache = fill(make(s3_root))
    store = zarr.storage.FsspecStore.from_url(group_of(cache, "b"))
    group = zarr.open_group(store, mode="r", zarr_format=3)
    np.testing.assert_array_equal(group["features"][:], content(25, seed=1)["features"])
    np.testing.assert_array_equal(group["targets"][:], content(25, seed=1)["targets"])


def test_a_new_revision_replaces_the_old_one_and_readers_follow(root):
    cache = fill(make(root))
    reader = FeatureCache.open(root)
    reader.read("a", [0.0])
    cache.write_video("a", **content(25, seed=9))
    np.testing.assert_array_equal(reader.read("a", content(25)["times_s"]).features, content(25, seed=9)["features"])
    assert len(cache.store.groups()) == len(VIDEOS)
    assert cache.store.names("tmp") == []


def test_frames_of_another_task_are_added(root):
    cache, more = make(root), content(30, seed=3)
    cache.write_video("a", **{name: array[:20] for name, array in more.items()})
    cache.write_video("a", **{name: array[20:] for name, array in more.items()}, merge=True)
    np.testing.assert_array_equal(cache.read("a", more["times_s"]).features, more["features"])


def test_a_frame_that_is_not_there_is_an_error_that_names_the_place(root):
    cache = fill(make(root))
    with pytest.raises(MissingFramesError, match=f"{root}: video 'z' is not in this cache.*--cache {root}"):
        cache.read("z", [0.0])


def test_another_fingerprint_and_a_place_with_other_things_are_refused(s3_root):
    make(s3_root)
    with pytest.raises(UserError, match=r"another storage; got 'float16'.*float32"):
        make(s3_root, storage="float32")
    put(s3_root, "other/notes.txt", b"mine")
    with pytest.raises(UserError, match=r"not a feature cache .* and not empty; got 'notes.txt'"):
        make(f"{s3_root}/other")


# --- in other processes


def read_in_child(cache, times_s, queue):
    queue.put(cache.read("b", times_s).features)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_opened_cache_works_in_forked_and_spawned_workers(s3_root, method):
    cache = fill(make(s3_root))
    times_s = content(25)["times_s"]
    cache.read("a", times_s)  # so that the parent has connections and threads
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(cache, times_s, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), content(25, seed=1)["features"])
    child.join()


# --- damage


def flip(path):
    data = bytearray(filesystem().cat_file(path))
    data[17] ^= 4
    filesystem().pipe_file(path, bytes(data))


DAMAGES = {
    "targets: chunk 1 (rows 10 to 19) has CRC-32C": lambda group: flip(f"{group}/targets/c.1.0"),
    "features: chunk 2 (rows 20 to 24) is missing": lambda group: filesystem().rm_file(f"{group}/features/c.2.0.0"),
    "features: chunk 0 (rows 0 to 9) has 100 bytes instead of 240": lambda group: filesystem().pipe_file(
        f"{group}/features/c.0.0.0", bytes(100)
    ),
    "times_s: zarr.json is gone": lambda group: filesystem().rm_file(f"{group}/times_s/zarr.json"),
    "the group ": lambda group: filesystem().rm(group, recursive=True),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_every_damage_is_found_and_the_video_is_queued_again(s3_root, said):
    cache = fill(make(s3_root))
    DAMAGES[said](group_of(cache, "b"))
    bad = [result for result in FeatureCache.open(s3_root).verify_all() if not result.ok]
    assert [result.video for result in bad] == ["b"]
    assert bad[0].problems[0].startswith(said)
    if "missing" in said or "instead" in said:
        with pytest.raises(DamagedCacheError, match=r"this file is (gone|cut short)"):
            cache.read("b", content(25)["times_s"])
    assert cache.requeue(["a", "b"]) == ("b",)
    cache.sweep()
    assert all(result.ok for result in cache.verify_all())
    assert cache.ledger.status({video: content(25)["times_s"] for video in VIDEOS}).pending == {"b"}


def test_a_video_that_was_lost_and_a_group_without_a_record_are_named(s3_root):
    cache = fill(make(s3_root))
    filesystem().rm_file(f"{s3_root}/commits/a.json")
    found = {(r.video, r.orphan): r.problems[0] for r in cache.verify_all() if not r.ok}
    assert found[("a", False)] == "the ledger lists it as done, but nothing is committed"
    assert found[("a", True)].startswith("no commit record names the group a.")
    swept = cache.sweep(dry_run=True)
    assert len(swept.removed) == 1
    assert swept.freed_bytes > 1000
    assert cache.sweep() == swept
    assert cache.info().num_orphans == 0


def test_a_group_that_is_being_written_is_no_orphan_until_its_writer_is_dead(s3_root):
    cache = fill(make(s3_root))
    put(s3_root, "videos/d.0badcafe/zarr.json", b"{}")
    put(s3_root, f"tmp/00000000.{current_writer()}/record.json", json.dumps({"group": "d.0badcafe"}).encode())
    assert cache.sweep().removed == ()
    assert sorted(cache.sweep(stale_after_s=-1).removed) == [
        f"tmp/00000000.{current_writer()}",
        "videos/d.0badcafe",
    ]


# --- the ledger


def test_events_lie_in_parts_and_one_that_nothing_else_tells_is_stored_at_once(root):
    cache = make(root)
    run = cache.ledger.writer("run")
    run.failed("v", reason="first", attempts=1)
    assert cache.ledger.read().latest["v"].reason == "first"
    for number in range(700):
        run.done(f"w{number}", checksum="0" * 64, attempts=1)
    assert len(cache.ledger.read().done) < 700, "a store would be asked for an object per event"
    run.close()
    assert len(cache.ledger.read().done) == 700
    assert sorted(cache.store.names("ledger")) == ["run-0001.jsonl", "run.jsonl"]
    with pytest.raises(UserError, match="this ledger file belongs to an earlier run"):
        cache.ledger.writer("run")


# --- the lock


def test_a_second_writer_stops_with_a_line_that_names_the_first(root):
    cache = make(root)
    with (
        cache.ledger.writer(),
        pytest.raises(UserError, match=rf"another process \({os.getpid()} on .*\) is writing into this cache"),
    ):
        cache.ledger.writer().__enter__()
    assert cache.store.content("", CACHE_LOCK) is None
    with cache.ledger.writer():
        pass


def told(**changes):
    ours = {"host": "elsewhere", "pid": 7, "since": "noon", "token": "t", "writer": "t.7.1.elsewhere-0"}
    return json.dumps({**ours, "heard": time.time(), **changes}).encode()


def test_a_lock_that_was_written_although_the_answer_was_lost_is_ones_own(root):
    """The driver asks again, and the store then says that there is one."""
    cache = make(root)
    lock = cache.store.lock()
    cache.store.add_file("", CACHE_LOCK, lock._content())
    lock.acquire()
    lock.release()
    assert cache.store.content("", CACHE_LOCK) is None


def test_the_lock_of_another_host_counts_until_it_is_old(root):
    cache = make(root)
    cache.store.add_file("", CACHE_LOCK, told())
    with pytest.raises(UserError, match=r"another process \(7 on elsewhere, since noon\)"):
        cache.ledger.writer().__enter__()
    cache.store.add_file("", CACHE_LOCK, told(heard=time.time() - STALE_AFTER_S - 1))
    with cache.ledger.writer():
        assert json.loads(cache.store.content("", CACHE_LOCK))["pid"] == os.getpid()


def test_the_lock_of_a_process_of_this_host_that_ended_is_taken_over_at_once(root):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = current_writer().split(".", 2)[2]
    cache = make(root)
    cache.store.add_file("", CACHE_LOCK, told(writer=f"t.{ended.pid}.1.{host}"))
    with cache.ledger.writer():
        pass


def test_whoever_lost_the_lock_stops_at_the_next_event(root, monkeypatch):
    monkeypatch.setattr("stages.cache.files.remote_lock.BEAT_S", 0.05)
    cache = make(root)
    with cache.ledger.writer() as run:
        run.failed("v", reason="first", attempts=1)
        # On a busy machine a beat that has begun may write its own over it.
        while json.loads(cache.store.content("", CACHE_LOCK))["pid"] != 7:
            cache.store.add_file("", CACHE_LOCK, told())
            time.sleep(1)
        with pytest.raises(UserError, match=r"another process \(7 on elsewhere, since noon\) has taken over"):
            run.failed("w", reason="second", attempts=1)
    assert json.loads(cache.store.content("", CACHE_LOCK))["pid"] == 7, "it is not ours to remove"


def test_a_holder_that_lives_is_heard_again_and_again(root, monkeypatch):
    monkeypatch.setattr("stages.cache.files.remote_lock.BEAT_S", 0.05)
    cache = make(root)
    with cache.ledger.writer():
        first = json.loads(cache.store.content("", CACHE_LOCK))["heard"]
        time.sleep(1)
        assert json.loads(cache.store.content("", CACHE_LOCK))["heard"] > first


# --- conversion


def test_a_cache_that_goes_to_a_url_and_comes_back_has_the_same_files(root, local, tmp_path):
    done = convert(local, place_of(root), "zarr", shard_bytes=1, on_video=lambda: None)
    assert done.num_videos == 3
    convert(FeatureCache.open(root), tmp_path / "back", "zarr", shard_bytes=1, on_video=lambda: None)
    kept = {
        p.relative_to(local.root): p.read_bytes() for p in local.root.rglob("*") if p.is_file() and p.name != CACHE_LOCK
    }
    back = {p.relative_to(tmp_path / "back"): p.read_bytes() for p in (tmp_path / "back").rglob("*") if p.is_file()}
    assert back == kept
    with pytest.raises(UserError, match="the target exists and is not empty"):
        convert(local, place_of(root), "zarr", shard_bytes=1, on_video=lambda: None)


def test_a_conversion_to_a_url_that_fails_leaves_nothing(root, tmp_path):
    damaged = fill(make(tmp_path / "cache"))
    group = damaged.root / "videos" / next(r.group for r in records_of(damaged) if r.video == "c")
    (group / "features" / "c.0.0.0").write_bytes(bytes(240))
    with pytest.raises(DamagedCacheError, match="video 'c' is damaged"):
        convert(damaged, place_of(root), "zarr", shard_bytes=1, on_video=lambda: None)
    assert not FeatureCache.is_at(root)
    assert damaged.requeue(["c"]) == ("c",)
    convert(damaged, place_of(root), "zarr", shard_bytes=1, on_video=lambda: None)
    assert FeatureCache.open(root).video_ids() == ["a", "b"]


def test_shards_are_read_at_a_url_and_the_other_exports_say_what_to_do(s3_root, local, tmp_path):
    convert(local, tmp_path / "shards", "webdataset", shard_bytes=3000, on_video=lambda: None)
    filesystem().put(f"{tmp_path}/shards/", f"{s3_root}/", recursive=True)
    export = FeatureCache.open(s3_root)
    times_s = content(25)["times_s"][[3, 20, 3]]
    np.testing.assert_array_equal(export.read("c", times_s).features, local.read("c", times_s).features)
    assert all(result.ok for result in export.verify_all())
    shard = f"{s3_root}/shards/000000.tar"
    filesystem().pipe_file(shard, filesystem().cat_file(shard)[:2000])
    assert {result.video for result in FeatureCache.open(s3_root).verify_all() if not result.ok} >= {"a"}
    with pytest.raises(UserError, match="an HDF5 export cannot be read at a URL"):
        FeatureCache.open(f"{s3_root}.h5")
    for kind in ("webdataset", "hdf5"):
        with pytest.raises(UserError, match=f"{kind} cannot be written to a URL"):
            convert(local, place_of(f"{s3_root}-2"), kind, shard_bytes=1, on_video=lambda: None)


# --- a web server


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_gives_the_same_frames_whether_it_knows_ranges_or_not(local, ranges):
    with web_server(local.root.parent, ranges=ranges) as (address, _):
        cache = FeatureCache.open(f"{address}/cache")
        times_s = content(25)["times_s"][[3, 21, 3, 12]]
        np.testing.assert_array_equal(cache.read("b", times_s).features, local.read("b", times_s).features)
        np.testing.assert_array_equal(cache.read("b", times_s).targets, local.read("b", times_s).targets)
        assert [result.ok for result in cache.verify_all()] == [True] * 3
        assert cache.ledger.status(dict.fromkeys("ab", content(25)["times_s"])).done == {"a", "b"}
        for writes in (lambda: cache.write_video("d", **content(3)), cache.sweep, lambda: make(f"{address}/new")):
            with pytest.raises(UserError, match="http:// address can only be read"):
                writes()


def test_only_the_rows_that_are_wanted_are_asked_for_and_all_at_once(tmp_path):
    cache = make(tmp_path / "cache")
    cache.write_video("long", **content(100))
    with web_server(tmp_path) as (address, server):
        remote = FeatureCache.open(f"{address}/cache")
        remote.read("long", [0.0])
        server.delay_s, server.most_in_flight = 1.0, 0  # long enough for a busy machine to have asked for all
        server.requests.clear()
        remote.read("long", content(100)["times_s"])
        assert len(server.requests) == 20, "one request per chunk of features and of targets"
        assert server.most_in_flight >= 10


def test_a_server_that_stumbles_is_asked_again_and_one_that_is_gone_is_one_line(local):
    with web_server(local.root.parent) as (address, server):
        cache = FeatureCache.open(f"{address}/cache")
        server.failures = 2
        np.testing.assert_array_equal(cache.read("a", [0.0]).targets, local.read("a", [0.0]).targets)
        server.failures = 1000
        with pytest.raises(UserError, match=r"/cache: no answer, 3 times \(ClientResponseError: 503"):
            cache.read("b", [0.0])
    with pytest.raises(UserError, match=r"no answer, 3 times \(ClientConnectorError"):
        FeatureCache.open(f"{address}/cache")


# --- a copy on a disk


def test_a_copy_is_fetched_once_per_video_and_is_a_cache_itself(local, tmp_path):
    with web_server(local.root.parent) as (address, server):
        cache = FeatureCache.open(f"{address}/cache", local_copy=tmp_path / "copy")
        times_s = content(25)["times_s"][[3, 21, 3]]
        np.testing.assert_array_equal(cache.read("b", times_s).features, local.read("b", times_s).features)
        asked = len(server.requests)
        np.testing.assert_array_equal(cache.read("b", times_s).targets, local.read("b", times_s).targets)
        assert len(server.requests) == asked
        again = FeatureCache.open(f"{address}/cache", local_copy=tmp_path / "copy")
        before = len(server.requests)
        again.read("b", times_s)
        assert [path for path in server.requests[before:] if "/videos/" in path] == []
        copy = FeatureCache.open(tmp_path / "copy")
        assert [(result.video, result.ok) for result in copy.verify_all()] == [("b", True)]
        assert copy.store.names("tmp") == []
        assert FeatureCache.open(local.root, local_copy=tmp_path / "unused").store.root == local.root
        assert not (tmp_path / "unused").exists()


def test_a_copy_is_checked_and_follows_a_new_revision_and_belongs_to_one_cache(s3_root, tmp_path):
    cache = fill(make(s3_root))
    copied = FeatureCache.open(s3_root, local_copy=tmp_path / "copy")
    copied.read("a", [0.0])
    cache.write_video("a", **content(25, seed=9))
    fresh = FeatureCache.open(s3_root, local_copy=tmp_path / "copy")
    np.testing.assert_array_equal(fresh.read("a", content(25)["times_s"]).features, content(25, seed=9)["features"])
    flip(f"{group_of(cache, 'b')}/features/c.1.0.0")
    with pytest.raises(DamagedCacheError, match=r"video 'b' did not arrive whole \(features: chunk 1"):
        copied.read("b", [0.0])
    assert FeatureCache.open(tmp_path / "copy").video_ids() == ["a"]
    make(f"{s3_root}/other", layer=2)
    with pytest.raises(UserError, match="this folder is not empty, and no copy of this cache"):
        FeatureCache.open(f"{s3_root}/other", local_copy=tmp_path / "copy")


# --- what users get wrong


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("s4://bucket/x", "this kind of address is not known; got 's4://'"),
        ("oss://bucket/x", "oss:// needs a package that is not installed"),
        (f"s3://{BUCKET}-which-nobody-made/x", "there is no such bucket. Make it first"),
        (f"s3://{BUCKET}/nothing", "no feature cache here (there is no fingerprint.json). Run `pipeline extract"),
        ("s3://", "this is no address of a cache"),
        (f"s3://{BUCKET}/../x", "this is no address of a cache"),
        ("simplecache::s3://b/x", "this is no address of a cache"),
    ],
)
def test_a_place_that_cannot_be_is_one_line(place, said):
    with pytest.raises(UserError) as error:
        FeatureCache.open(place)
    assert said in str(error.value)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_nobody_made_is_not_made():
    with pytest.raises(UserError, match="there is no such bucket"):
        make("s3://nobody/x")
    assert not filesystem().exists("s3://nobody")


@pytest.mark.parametrize("place", ["s3://me:hidden@b/x", "https://me:hidden@h/x", "https://h/x?X-Amz-Signature=hidden"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(place):
    with pytest.raises(UserError, match="is refused") as error:
        FeatureCache.open(place)
    assert "hidden" not in str(error.value)


def test_a_file_url_is_the_directory_and_a_url_stays_text(tmp_path):
    make(f"file://{tmp_path}/cache").write_video("v", **content(3))
    assert FeatureCache.open(tmp_path / "cache").video_ids() == ["v"]
    url = place_of("s3://bucket/prefix/")
    assert (url, url / "a" / "b", url.name) == ("s3://bucket/prefix", "s3://bucket/prefix/a/b", "prefix")
    assert isinstance(url, CacheUrl)
