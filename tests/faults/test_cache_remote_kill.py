"""Killing a process that writes into an object store: a reader sees each video absent or whole, never in between.

Run as a program, this file is the writer that the test starts: ROOT VIDEO...
"""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stages.cache import FeatureCache, Fingerprint
from tests.faults.test_cache_kill import (
    PLANNED,
    TIMES_S,
    VIDEOS,
    assert_whole,
    content,
    extract,
    go,
    say,
    wait_for_commits,
)
from tests.object_stores import BUCKET, s3_server

NUM_KILLS = 3
ROOT = f"s3://{BUCKET}/killed"


@pytest.fixture
def cache():
    with s3_server():
        yield FeatureCache.create_or_open(ROOT, Fingerprint(fields={"storage": "float16"}))


def start(*videos):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.test_cache_remote_kill", ROOT, *videos],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_writer_killed_at_any_moment_leaves_each_video_absent_or_whole(cache):
    chance = random.Random(0)
    videos, interrupted = VIDEOS[:8], 0
    for _ in range(NUM_KILLS):
        process = start(*videos)
        go(process)
        wait_for_commits(cache, len(cache.video_ids()) + chance.randint(0, 1), process)
        time.sleep(chance.uniform(0, 0.1))  # about one write
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reader = FeatureCache.open(ROOT)
        for result in reader.verify_all():
            assert result.orphan or result.ok
        for video in reader.video_ids():
            assert_whole(reader, video)
        status = reader.ledger.status({video: PLANNED[video] for video in videos})
        assert (status.done, status.damaged) == (set(reader.video_ids()), {})
        interrupted += bool(reader.store.names("tmp"))
        reader.sweep()
        assert reader.store.names("tmp") == []
        assert reader.info().num_orphans == 0
    assert interrupted, "no kill fell into a write, so this run showed nothing"

    # The killed writers' lock is that of processes of this host that have ended, so nobody waits for it.
    process = start(*videos)
    process.communicate("go\n")
    assert process.returncode == 0
    status = cache.ledger.status({video: PLANNED[video] for video in videos})
    assert (status.done, status.unlisted) == (set(videos), set())
    assert all(result.ok for result in cache.verify_all())
    assert len(cache.store.groups()) == len(videos)


def test_two_writers_at_once_are_one_that_works_and_one_that_says_why_not(cache):
    videos = VIDEOS[:4]
    with cache.ledger.writer():
        second = start(*videos)
        said = second.communicate("go\n", timeout=60)[0]
    assert f"another process ({os.getpid()} on" in said
    assert "is writing into this cache" in said
    assert second.returncode == 1
    assert cache.video_ids() == []
    third = start(*videos)
    assert (third.communicate("go\n", timeout=60)[0], third.returncode) == ("", 0)
    for video in videos:
        np.testing.assert_array_equal(cache.read(video, TIMES_S).features, content(video)["features"])


if __name__ == "__main__":
    import zarr  # noqa: F401  so that the first write does not wait for it

    from stages.errors import UserError

    say("ready")
    sys.stdin.readline()
    try:
        extract(*sys.argv[1:])
    except UserError as error:
        say(str(error))
        sys.exit(1)
