"""Who may write into a cache side by side: shards that count the same number of shards, and nobody else."""

import json
import os
import time

import pytest

from stages.cache import FeatureCache, Fingerprint
from stages.cache.files.lock import lock_name
from stages.cache.files.places import place_of
from stages.cache.files.remote_lock import STALE_AFTER_S
from stages.errors import UserError
from stages.shard import Shard
from tests.object_stores import BUCKET, s3_server

WHOLE = None
FIRST, SECOND, OTHER = Shard(1, 2), Shard(2, 2), Shard(2, 3)


@pytest.fixture(params=["directory", "s3"])
def cache(request, tmp_path):
    fingerprint = Fingerprint(fields={"storage": "float16"})
    if request.param == "directory":
        yield FeatureCache.create_or_open(tmp_path / "cache", fingerprint)
        return
    with s3_server():
        yield FeatureCache.create_or_open(place_of(f"s3://{BUCKET}/shards"), fingerprint)


def test_shards_of_one_division_write_side_by_side(cache):
    with cache.ledger.writer(shard=FIRST) as one, cache.ledger.writer(shard=SECOND) as other:
        one.failed("v", reason="first", attempts=1)
        other.failed("w", reason="second", attempts=1)
    assert {video: event.reason for video, event in cache.ledger.read().latest.items()} == {"v": "first", "w": "second"}
    for later in (SECOND, OTHER, WHOLE):
        with cache.ledger.writer(shard=later):
            pass


@pytest.mark.parametrize(
    ("first", "second"),
    [(FIRST, FIRST), (FIRST, OTHER), (FIRST, WHOLE), (WHOLE, FIRST), (WHOLE, WHOLE)],
    ids=["the same shard", "another division", "all beside a shard", "a shard beside all", "all twice"],
)
def test_whoever_comes_second_beside_a_rival_is_refused_in_a_line_that_names_it(cache, first, second):
    with cache.ledger.writer(shard=first):
        with pytest.raises(UserError) as refused:
            cache.ledger.writer(shard=second).__enter__()
        of_shard = "" if first is WHOLE else f" (--shard {first})"
        line = str(refused.value)
        assert f"another process ({os.getpid()} on " in line
        assert f"is writing into this cache{of_shard}. Wait until it has ended" in line
    with cache.ledger.writer(shard=second):
        pass


def test_a_shard_that_fell_silent_is_no_rival_any_more_and_learns_of_it(cache, monkeypatch):
    if isinstance(cache.root, os.PathLike):
        pytest.skip("the system takes the lock of a directory from whoever ends")
    monkeypatch.setattr("stages.cache.files.remote_lock.BEAT_S", 1.0)
    name = lock_name(FIRST)
    with cache.ledger.writer(shard=FIRST) as silent:
        told = json.loads(cache.store.content("", name))
        cache.store.add_file("", name, json.dumps({**told, "heard": time.time() - STALE_AFTER_S - 1}).encode())
        with cache.ledger.writer():
            assert cache.store.content("", name) is None
            time.sleep(2.0)
            with pytest.raises(UserError, match="has taken over this cache"):
                silent.failed("v", reason="too late", attempts=1)
