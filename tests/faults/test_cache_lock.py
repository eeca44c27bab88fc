"""Two extractions into one cache: the second stops with a clear line, the first goes on, a killed one frees it.

Run as a program, this file is an extraction of ten videos; it says when it holds the cache and waits to be let go.
"""

import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stages.cache import FeatureCache, Fingerprint
from stages.errors import UserError

TIMES_S = np.arange(3.0)
PLANNED = {f"v{number}": TIMES_S for number in range(10)}


def extract(root):
    cache = FeatureCache.open(root)
    with cache.ledger.writer() as ledger:
        say("begun")
        sys.stdin.readline()
        for video in sorted(cache.ledger.status(PLANNED).pending):
            record = cache.write_video(
                video, times_s=TIMES_S, features=np.ones((3, 2, 4), np.float16), targets=np.ones((3, 5), np.float32)
            )
            ledger.done(video, checksum=record.checksum, attempts=1)
            time.sleep(0.02)


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def start(root):
    """Start this file as a program and return once it holds the cache or has stopped, with its first line."""
    process = subprocess.Popen(
        [sys.executable, __file__, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def finish(process):
    """Let it go on and return its exit status."""
    process.communicate("go\n")
    return process.returncode


@pytest.fixture
def cache(tmp_path):
    return FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float16"}))


def test_a_second_extraction_stops_with_a_line_that_names_the_first(cache):
    first, line = start(cache.root)
    assert line == "begun"
    second, line = start(cache.root)
    assert line.startswith(f"error: {cache.root}: another process ({first.pid} on ")
    assert "is writing into this cache. Wait until it has ended, or give another --cache" in line
    assert finish(second) == 2
    assert finish(first) == 0
    status = cache.ledger.status(PLANNED)
    assert (status.done, status.unlisted) == (set(PLANNED), set())
    assert all(result.ok for result in cache.verify_all())
    assert len(list((cache.root / "ledger").iterdir())) == 1
    third, line = start(cache.root)
    assert (line, finish(third)) == ("begun", 0)


def test_a_killed_extraction_holds_nothing_and_the_next_finishes_its_work(cache):
    first, _ = start(cache.root)
    first.stdin.write("go\n")
    first.stdin.flush()
    while len(cache.video_ids()) < 3:
        assert first.poll() is None
        time.sleep(0.001)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = len(cache.ledger.status(PLANNED).done)
    assert done < len(PLANNED)
    second, line = start(cache.root)
    assert (line, finish(second)) == ("begun", 0)
    assert cache.ledger.status(PLANNED).done == set(PLANNED)


def test_a_repair_waits_for_no_extraction_and_takes_nothing_from_it(cache):
    first, _ = start(cache.root)
    with pytest.raises(UserError, match="is writing into this cache"):
        cache.requeue(["v0"])
    assert finish(first) == 0
    assert cache.requeue(["v0"]) == (), "it is whole"


def test_reading_and_looking_at_a_cache_need_no_lock(cache):
    first, _ = start(cache.root)
    assert all(result.ok or result.orphan for result in cache.verify_all())
    assert cache.sweep().removed == ()
    assert finish(first) == 0


def test_pipeline_extract_is_such_an_extraction(world):
    cache = world.folder / "locked"
    shutil.copytree(world.cache, cache)
    min((cache / "commits").iterdir()).unlink()  # without anything to do it would not write
    with FeatureCache.open(cache).ledger.writer():
        refused = world.run("extract", *world.options(cache=cache))
    assert refused.returncode == 2
    assert "is writing into this cache" in refused.stderr
    assert "Traceback" not in refused.stderr


if __name__ == "__main__":
    import zarr  # noqa: F401  so that the first write does not wait for it

    try:
        extract(sys.argv[1])
    except UserError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
