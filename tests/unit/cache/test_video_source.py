"""What a commit record says of a video's file, and what is made of it when the file is looked at again."""

import json
import os
import socket
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from stages.cache import CacheWriteError, FeatureCache, Fingerprint
from stages.cache.source import VideoSource, find_changes, look_at
from tests.cached import records_of
from tests.film_server import serving

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
FILE = VideoSource(path="v.mp4", num_bytes=10, modified=NOON)


def content(count, start=0):
    times_s = np.arange(float(start), start + count)
    return {
        "times_s": times_s,
        "features": np.ones((count, 2, 3), np.float16),
        "targets": np.ones((count, 4), np.float32),
    }


@pytest.fixture
def cache(tmp_path):
    return FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float16"}))


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ({}, "same"),
        ({"num_bytes": 11}, "changed"),
        ({"num_bytes": 11, "modified": NOON + timedelta(days=1)}, "changed"),
        ({"modified": NOON + timedelta(seconds=1.5)}, "same"),
        ({"modified": NOON + timedelta(seconds=3)}, "unsure"),
        ({"modified": NOON - timedelta(days=1)}, "unsure"),
        ({"modified": None, "version": '"abc"'}, "same"),
    ],
)
def test_a_size_decides_and_a_time_alone_only_raises_a_doubt(now, verdict):
    assert FILE.compare(FILE.model_copy(update=now)) == verdict


def test_a_digest_on_both_sides_decides_whatever_size_and_time_say():
    one = FILE.model_copy(update={"sha256": "a" * 64})
    assert one.compare(one.model_copy(update={"modified": NOON + timedelta(days=9)})) == "same"
    assert one.compare(one.model_copy(update={"sha256": "b" * 64})) == "changed"
    assert one.compare(FILE.model_copy(update={"modified": NOON + timedelta(days=9)})) == "unsure"


def test_another_version_on_a_server_raises_a_doubt():
    here = VideoSource(path="https://x/v.mp4", num_bytes=10, version='"a"')
    assert here.compare(here.model_copy(update={"version": '"b"'})) == "unsure"
    assert here.compare(here) == "same"


def test_a_file_is_described_without_being_read_unless_its_digest_is_wanted(tmp_path):
    path = tmp_path / "v.mp4"
    path.write_bytes(b"0123456789")
    os.utime(path, (NOON.timestamp(), NOON.timestamp()))
    assert look_at(str(path), named="v.mp4") == FILE
    digest = "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert look_at(str(path), named="v.mp4", digest=True) == FILE.model_copy(update={"sha256": digest})


def test_what_is_no_file_is_only_named_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    for name in ("pipe.mp4", "gone.mp4", ""):
        path = str(tmp_path / name)
        assert look_at(path, digest=True) == VideoSource(path=path)


def test_of_an_address_size_and_version_are_known_and_its_query_is_not_kept(tmp_path):
    pytest.importorskip("aiohttp")
    film = tmp_path / "whole.mp4"
    film.write_bytes(b"0123456789")
    with serving({"whole.mp4": film}) as address:
        first = look_at(f"{address}/whole.mp4?signature=secret")
        nothing = look_at(f"{address}/gone.mp4")
        film.write_bytes(b"9876543210")
        second = look_at(f"{address}/whole.mp4", copy=film, digest=True)
    assert (first.path, first.num_bytes, first.modified) == (f"{address}/whole.mp4", 10, None)
    assert nothing == VideoSource(path=f"{address}/gone.mp4")
    assert first.version != second.version
    assert first.compare(second) == "unsure"
    assert second.sha256 is not None


def test_a_server_that_gives_no_answer_is_not_asked_for_every_video(monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("stages.cache.source._LOOKS_AT_ONCE", 1)
    recorded = {f"v{number}": VideoSource(path=f"{number}.mp4", num_bytes=10) for number in range(50)}
    with hanging_up() as (address, connections):
        found = find_changes(recorded, lambda video: f"{address}/{video}.mp4")
    assert (found.outdated, found.compared, len(found.absent)) == ((), 0, 50)
    assert 0 < len(connections) < 10


@contextmanager
def hanging_up():
    """A server that closes every connection at once; its address, and a list that grows by one with each."""
    connections = []

    def accept():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connections.append(1)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", connections
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_doubt_is_settled_by_reading_the_file_where_a_digest_was_recorded(tmp_path):
    recorded = {}
    for name in ("copied", "replaced", "plain", "gone"):
        path = tmp_path / name
        path.write_bytes(b"0123456789")
        recorded[name] = look_at(str(path), digest=name != "plain")
        path.write_bytes(b"9876543210" if name == "replaced" else b"0123456789")
        os.utime(path, (0, 0))
    (tmp_path / "gone").unlink()
    found = find_changes(recorded, lambda name: str(tmp_path / name))
    assert found.changed == {"replaced": "other content of the same size"}
    assert set(found.unsure) == {"plain"}
    assert (found.absent, found.compared) == (("gone",), 3)
    unread = find_changes(recorded, lambda name: str(tmp_path / name), digests="none")
    assert (set(unread.changed), set(unread.unsure)) == (set(), {"copied", "replaced", "plain"})


def test_a_file_that_changed_and_got_its_old_time_back_is_found_by_reading_all(tmp_path):
    path = tmp_path / "v"
    path.write_bytes(b"0123456789")
    recorded = {"v": look_at(str(path), digest=True)}
    path.write_bytes(b"9876543210")
    os.utime(path, (recorded["v"].modified.timestamp(),) * 2)
    assert find_changes(recorded, lambda _: str(path)).outdated == ()
    assert find_changes(recorded, lambda _: str(path), digests="all").outdated == ("v",)


def test_equal_contents_have_equal_checksums_whatever_file_they_are_from(cache):
    plain = cache.write_video("v", **content(3))
    told = cache.write_video("v", **content(3), source=FILE)
    assert plain.checksum == told.checksum
    assert (plain.source, told.source) == (None, FILE)
    assert records_of(cache)[0].source == FILE
    assert cache.verify("v").ok


def test_a_record_of_an_earlier_version_is_read_and_added_to(cache):
    cache.write_video("v", **content(3))
    path = cache.root / "commits" / "v.json"
    old = json.loads(path.read_text())
    assert old.pop("source") is None
    path.write_text(json.dumps(old))
    assert cache.verify("v").ok
    assert cache.ledger.status({"v": np.arange(3.0)}).sources == {}
    added = cache.write_video("v", **content(2, start=3), merge=True, source=FILE)
    assert (len(added.times_s), added.source) == (5, FILE)


def test_frames_of_another_file_are_not_added_to_those_of_the_old_one(cache):
    cache.write_video("v", **content(3), source=FILE)
    other = FILE.model_copy(update={"num_bytes": 11})
    with pytest.raises(CacheWriteError, match=r"video 'v': its file is another one .* --refresh-changed"):
        cache.write_video("v", **content(2, start=3), merge=True, source=other)
    assert cache.cached_times_s("v").tolist() == [0.0, 1.0, 2.0]
    assert cache.write_video("v", **content(2), source=other).source == other


def test_what_is_known_of_a_files_damage_outlives_frames_that_are_added_later(cache):
    cut = FILE.model_copy(update={"remark": "ends early", "whole_before_s": 2.5})
    cache.write_video("v", **content(2), source=cut)
    planned = np.arange(5.0)
    assert cache.ledger.status({"v": planned}).pending == {"v"}
    record = cache.write_video("v", **content(1, start=2), merge=True, source=FILE)
    assert (record.source, record.remark) == (cut, "ends early")
    assert record.missing(planned).size == 0
    assert record.absent(planned).tolist() == [3.0, 4.0]
    status = cache.ledger.status({"v": planned})
    assert (status.done, status.remarks) == ({"v"}, {"v": "ends early"})


def test_damage_that_is_found_later_is_added_to_the_record_and_changes_no_frame(cache):
    before = cache.write_video("v", **content(2), source=FILE)
    cut = FILE.model_copy(update={"remark": "ends early", "whole_before_s": 1.5})
    assert cache.add_source("v", cut).source == cut
    after = records_of(cache)[0]
    assert (after.group, after.checksum, after.source) == (before.group, before.checksum, cut)
    assert cache.add_source("w", cut) is None
    with pytest.raises(CacheWriteError, match="another one"):
        cache.add_source("v", cut.model_copy(update={"num_bytes": 11}))


def test_info_and_verify_tell_of_damaged_files(cache):
    cache.write_video("v", **content(2), source=FILE.model_copy(update={"remark": "ends early"}))
    cache.write_video("w", **content(2), source=FILE)
    assert cache.info().remarks == {"v": "ends early"}
    assert [(result.video, result.ok, result.remark) for result in cache.verify_all()] == [
        ("v", True, "ends early"),
        ("w", True, None),
    ]
