"""`extract --shard I/N`: real processes, two at once into one cache, killed and stopped."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from stages.cache import FeatureCache
from stages.shard import Shard
from tests.faults.extract_corpus import VIDEOS, checksums, committed, named, prepare, problems
from tests.faults.test_extract_kill import command, wait_for_commits


def start(corpus, shard, *more):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command("--shard", shard, *more)],
        cwd=corpus,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def states(corpus):
    """Videos done, failed and pending of the whole plan, as any process sees them now."""
    planned = prepare(corpus).plan.times_s
    status = FeatureCache.open(corpus / "cache").ledger.status(planned)
    return len(status.done), len(status.failed), len(status.pending)


def test_shards_at_once_with_one_killed_and_run_again_make_the_cache_of_one_extraction(source, corpus):
    whole = prepare(corpus).plan
    own = {index: set(whole.of_shard(Shard(index, 2)).times_s) for index in (1, 2)}
    killed, other = start(corpus, "1/2"), start(corpus, "2/2", "--json")
    while not own[1].intersection(committed(corpus)):
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.005)
    children = named(killed.pid, "decode.child_main")
    assert children, "the shard decodes in its own process tree"
    assert not named(killed.pid, "raylet"), "it needs no Ray"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    until = time.monotonic() + 20
    while any(map(is_running, children)):
        assert time.monotonic() < until, "decode children outlived the shard"
        time.sleep(0.1)
    before = {video: record for video, record in committed(corpus).items() if video in own[1]}
    assert 0 < len(before) < len(own[1])
    assert sum(states(corpus)) == VIDEOS
    stdout, stderr = other.communicate(timeout=120)
    assert other.returncode == 0, stderr
    summary = json.loads(stdout)
    assert (summary["shard"], summary["planned"], summary["done"], summary["pending"]) == ("2/2", 6, 6, 0)
    together = summary["all_shards"]
    assert together["planned"] == together["done"] + together["failed"] + together["pending"] == VIDEOS
    assert 6 <= together["done"] <= 6 + len(before), "the other one may have had none yet"
    assert states(corpus) == (6 + len(before), 0, 6 - len(before))

    again = start(corpus, "1/2")
    stdout, stderr = again.communicate(timeout=120)
    assert again.returncode == 0, stderr
    assert f"6 of 6 videos done, {6 - len(before)} of them now, 0 failed, 0 pending" in stdout
    assert stdout.splitlines()[-1] == f"all shards: {VIDEOS} of {VIDEOS} videos done, 0 failed, 0 pending"
    now = committed(corpus)
    assert {video: now[video] for video in before} == before, "a finished video was extracted again"
    assert states(corpus) == (VIDEOS, 0, 0)
    assert problems(corpus / "cache") == []
    assert checksums(corpus / "cache") == checksums(source / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_shard_says_what_is_done_and_leaves_nothing_running(number, status, corpus):
    process = start(corpus, "1/1")
    wait_for_commits(corpus, 1, process)
    started = named(process.pid, "")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "run the same command again to go on" in stderr
    assert "Traceback" not in stderr
    done = int(re.findall(rf"(\d+) of {VIDEOS} videos done", stderr)[-1])
    assert done <= len(committed(corpus)) < VIDEOS
    assert not any(is_running(pid) for pid in started)


def is_running(pid):
    return subprocess.run(["ps", "-o", "pid=", "-p", str(pid)], capture_output=True, check=False).returncode == 0


def test_a_video_that_cannot_be_decoded_is_failed_and_the_shard_ends_as_any_extraction_does(corpus):
    broken = min(prepare(corpus).plan.of_shard(Shard(1, 6)).times_s)
    (path,) = (corpus / "data" / "videos").glob(f"{broken}*")
    path.write_bytes(b"no video at all")
    process = start(corpus, "1/6")
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 3
    assert f"failed {broken}: " in stdout
    assert "1 of 2 videos done, 1 of them now, 1 failed, 0 pending" in stdout
    assert states(corpus) == (1, 1, VIDEOS - 2)


def test_a_shard_beside_another_extraction_is_refused_in_one_line(corpus):
    with prepare(corpus).cache.ledger.writer():
        stdout, stderr = start(corpus, "1/2").communicate(timeout=120)
    assert stdout == ""
    assert "is writing into this cache. Wait until it has ended" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--shard", "0/2"], "--shard: this is no shard of a plan; got '0/2'; allowed: I/N with 1 <= I <= N"),
        (["--shard", "3/2"], "--shard: this is no shard of a plan; got '3/2'"),
        (["--shard", "1/2", "--address", "auto"], "--address: one shard runs in this process"),
        (["--shard", "1/2", "--dry-run"], "--dry-run: one shard runs in this process"),
    ],
)
def test_wrong_shards_are_refused_before_anything_is_made(pipeline, tmp_path, options, line):
    cache = tmp_path / "cache"
    _, stderr = pipeline("extract", "--preset", "tiny", "--cache", cache, *options, status=2)
    assert line in stderr
    assert not cache.exists()
