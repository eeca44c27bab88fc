"""`pipeline extract` under real kills: what is committed stays, a second call finishes without doing anything twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.cache.feature_cache import FeatureCache
from tests.conftest import run_pipeline

VIDEOS = 12


@pytest.fixture
def corpus(tmp_path):
    """Twelve short videos, a card of one's own, nothing extracted yet."""
    from stages.synthetic import generate

    generate(tmp_path / "data", seed=3, videos_per_split={"train": 4, "val": 4, "test": 4}, workers=1)
    return tmp_path


def command(*more):
    options = ["--preset", "tiny", "--videos", "data/videos", "--annotations", "data/annotations", "--cache", "cache"]
    return ["extract", *options, "--set", "extract.batch_size=2", *more]


def committed(corpus):
    folder = corpus / "cache" / "commits"
    return {path.stem: path.read_bytes() for path in folder.glob("*.json")} if folder.is_dir() else {}


def wait_for_commits(corpus, count, process):
    deadline = time.monotonic() + 120
    while len(committed(corpus)) < count:
        assert process.poll() is None, "the extraction ended before it could be killed"
        assert time.monotonic() < deadline, "no commits in two minutes"
        time.sleep(0.02)


def start(corpus):
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *command()],
        cwd=corpus,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def descendants(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(entry.parent.name)
            found += [child, *descendants(child)]
    return found


def decode_children(pid):
    def line(child):
        try:
            return (Path("/proc") / str(child) / "cmdline").read_text()
        except OSError:
            return ""

    return [child for child in descendants(pid) if "decode.child_main" in line(child)]


def test_a_killed_driver_leaves_whole_videos_and_the_next_call_finishes(corpus):
    process = start(corpus)
    wait_for_commits(corpus, 2, process)
    process.kill()
    process.wait()
    before = committed(corpus)
    assert 2 <= len(before) < VIDEOS
    again = run_pipeline(*command("--json"), cwd=corpus)
    assert again.returncode == 0, again.stderr
    summary = json.loads(again.stdout)
    assert (summary["done"], summary["failed"], summary["pending"]) == (VIDEOS, {}, 0)
    after = committed(corpus)
    assert {name: after[name] for name in before} == before, "a finished video was extracted again"
    cache = FeatureCache.open(corpus / "cache")
    assert [result.problems for result in cache.verify_all() if not result.ok and not result.orphan] == []


def test_ctrl_c_says_how_to_go_on_and_exits_130(corpus):
    process = start(corpus)
    wait_for_commits(corpus, 1, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"run the same command again" in stderr
    assert b"Traceback" not in stderr
    assert len(committed(corpus)) < VIDEOS


def test_a_killed_decode_child_costs_one_video_at_most_and_is_named(corpus):
    process = start(corpus)
    wait_for_commits(corpus, 1, process)
    victims = decode_children(process.pid)
    assert victims, "no decode child found to kill"
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    summary = json.loads(run_pipeline(*command("--json", "--retry-failed"), cwd=corpus).stdout)
    assert summary["done"] == VIDEOS
    assert process.returncode in (0, 3)


def test_unreadable_videos_fail_with_their_reason_and_the_others_go_on(corpus):
    videos = sorted((corpus / "data" / "videos").glob("*.mp4"))
    whole = videos[1].read_bytes()
    videos[0].write_bytes(b"")
    videos[1].write_bytes(whole[: len(whole) // 2])
    videos[2].unlink()
    done = run_pipeline(*command("--json"), cwd=corpus)
    assert done.returncode == 3
    summary = json.loads(done.stdout)
    assert summary["done"] + len(summary["failed"]) + summary["pending"] == summary["planned"] == VIDEOS
    assert set(summary["failed"]) == {path.stem for path in videos[:3]}
    assert summary["failed"][videos[2].stem].startswith("missing")
    assert f"{VIDEOS - 3} of {VIDEOS} videos done" in " ".join(done.stderr.split())
    videos[1].write_bytes(whole)
    unchanged = run_pipeline(*command("--json"), cwd=corpus)
    assert unchanged.returncode == 3
    assert json.loads(unchanged.stdout)["extracted_now"] == 0
    retried = json.loads(run_pipeline(*command("--json", "--retry-failed"), cwd=corpus).stdout)
    assert retried["extracted_now"] == 1
    assert set(retried["failed"]) == {videos[0].stem, videos[2].stem}
