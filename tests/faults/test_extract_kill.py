"""Extraction under real kills at random moments: the next call finishes, and every bit is as if nothing had happened.

`EXTRACT_KILLS=20` kills at so many moments in total, here and in test_extract_cluster.py, instead of a few.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.conftest import run_pipeline
from tests.faults.extract_corpus import (
    SETTINGS,
    VIDEOS,
    checksums,
    committed,
    named,
    num_kills,
    prepare,
    problems,
    run_here,
)

SOON_S = 20.0


def command(*more):
    options = ["--preset", "tiny", "--videos", "data/videos", "--annotations", "data/annotations", "--cache", "cache"]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["extract", *options, *settings, *more]


def start(corpus):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command()],
        cwd=corpus,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_commits(corpus, count, process):
    deadline = time.monotonic() + 120
    while len(committed(corpus)) < count and process.poll() is None:
        assert time.monotonic() < deadline, "no commits in two minutes"
        time.sleep(0.005)


def test_a_driver_killed_at_random_moments_leaves_a_cache_that_the_next_call_completes(source, corpus):
    chance, after = random.Random(7), {}
    for _ in range(num_kills("driver")):
        if len(after) > VIDEOS - 3:  # too few are left for another kill in the middle: begin anew
            assert checksums(corpus / "cache").items() <= checksums(source / "whole").items()
            shutil.rmtree(corpus / "cache")
        before = committed(corpus)
        process = start(corpus)
        wait_for_commits(corpus, len(before) + chance.randint(1, 2), process)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.communicate()
        after = committed(corpus)
        assert {name: after[name] for name in before} == before, "a finished video was extracted again"
    finished = run_pipeline(*command("--json-lines"), cwd=corpus)
    assert finished.returncode == 0, finished.stderr
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    summary = events[-1]
    assert (summary["event"], summary["done"], summary["failed"], summary["pending"]) == ("summary", VIDEOS, {}, 0)
    ended = [event for event in events if event["event"] == "video"]
    assert len(ended) == len({event["video"] for event in ended}) == summary["extracted_now"]
    # Workers that outlive their driver for a moment finish what they have begun.
    assert VIDEOS - len(after) - 3 <= len(ended) <= VIDEOS - len(after)
    if ended:
        last = [event for event in events if event["event"] == "progress"][-1]
        assert (last["done"], last["failed"], last["left"], last["frames_left"]) == (VIDEOS, 0, 0, 0)
        assert last["frames"] == summary["frames_now"] == sum(event["frames"] for event in ended) > 0
        assert 0 <= summary["wait_share"] < 1
    now = committed(corpus)
    assert {name: now[name] for name in after} == after, "a finished video was extracted again"
    assert problems(corpus / "cache") == []
    assert checksums(corpus / "cache") == checksums(source / "whole")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stop_says_what_is_done_and_how_to_go_on_and_leaves_nothing_running(number, status, corpus):
    process = start(corpus)
    wait_for_commits(corpus, 1, process)
    started = named(process.pid, "")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status
    assert "run the same command again to go on" in stderr.decode()
    assert "Traceback" not in stderr.decode()
    done = int(re.findall(rf"(\d+) of {VIDEOS} videos done", stderr.decode())[-1])  # what progress said came before
    assert done <= len(committed(corpus)) < VIDEOS
    assert [result for result in problems(corpus / "cache") if not result.orphan] == []
    until = time.monotonic() + SOON_S
    while any(os.path.exists(f"/proc/{pid}") for pid in started):  # noqa: PTH110
        assert time.monotonic() < until, "processes outlived the command"
        time.sleep(0.1)


def test_a_stop_before_any_work_says_how_to_go_on(corpus):
    process = start(corpus)
    deadline = time.monotonic() + 60
    # Its own answer to the signal is there once it has begun to look at networks and cache.
    while not answers_sigterm(process.pid):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    # Whether it knows already what it is to commit depends on the moment.
    known = "(0 of [0-9]+ videos done; )?(what is committed stays, )?"
    assert re.match(f"stopped by SIGTERM; {known}run the same command again", stderr.decode().splitlines()[-1])


def answers_sigterm(pid):
    """Whether a process catches SIGTERM."""
    (caught,) = re.findall(r"^SigCgt:\t(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def test_decode_children_killed_at_random_moments_cost_nothing_that_is_not_named(source, corpus):
    chance, kills = random.Random(5), []

    def kill_soon(count):
        children = named(os.getpid(), "decode.child_main")
        if children and len(kills) < num_kills("child") and count:
            timer = threading.Timer(chance.random() * 0.3, kill, (chance.choice(children),))
            kills.append(timer)
            timer.start()

    def kill(pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    summary = run_here(prepare(corpus), kill_soon)
    assert len(kills) == num_kills("child")
    assert summary.done + len(summary.failed) == VIDEOS
    assert all(reason.startswith("crash: ") for reason in summary.failed.values())
    if summary.failed:
        assert run_here(prepare(corpus, retry_failed=True)).done == VIDEOS
    assert problems(corpus / "cache") == []
    assert checksums(corpus / "cache") == checksums(source / "whole")
