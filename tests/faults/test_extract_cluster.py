"""Extraction on two Ray nodes of this machine whose actors and nodes are killed."""

import os
import random
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from stages.cluster.connect import cluster
from stages.errors import UserError
from stages.extract.hand_out import process_all
from tests.faults.extract_corpus import (
    VIDEOS,
    checksums,
    committed,
    named,
    num_kills,
    prepare,
    problems,
    run_here,
)
from tests.video_files import RATE_FPS, write_video

PLACE_LIMIT_S = 3.0


class Nodes:
    """A head that has no core to give, and nodes with one core each."""

    def __init__(self):
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.address, self.workers = self.cluster.address, []

    def have(self, count):
        while len(self.workers) < count:
            self.workers.append(self.cluster.add_node(num_cpus=1, include_dashboard=False))

    def lose_one(self):
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)


@pytest.fixture(scope="module")
def nodes():
    with pytest.MonkeyPatch.context() as patch:
        # Other programs on this machine may fill its memory; that is not what is tested.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        made = Nodes()
        made.have(2)
        with cluster(made.address):
            yield made
        made.cluster.shutdown()


def prepared(folder, *settings):
    return prepare(folder, "cache", *settings)


def run(extraction, on_count=lambda _count: None):
    """Extract, calling `on_count` with the number of videos that have ended; return the summary and their attempts."""
    attempts = {}

    def watched(tasks):
        for outcome, attempt in process_all(tasks, extraction.job, place_limit_s=PLACE_LIMIT_S):
            assert outcome.video not in attempts, "a video ended twice"
            attempts[outcome.video] = attempt
            yield outcome, attempt
            on_count(len(attempts))

    return extraction.run(watched, lambda _outcome, _progress: None), attempts


def actors():
    return named(os.getpid(), "ray::WorkerActor")


def test_a_lost_node_and_killed_actors_cost_nothing(nodes, source, corpus):
    """A node and then actors at random moments; a video may be alone in a dying actor as often as that takes."""
    chance, before, kills = random.Random(11), {}, []

    def disturb(count):
        if count == 2:
            before.update(committed(corpus))
            nodes.lose_one()
        elif count > 3 and len(kills) < num_kills("actor"):
            time.sleep(chance.random() * 0.2)
            for actor in actors()[:1]:
                kills.append(actor)
                os.kill(actor, signal.SIGKILL)

    assert run_here(prepare(source, "one-core"), threads=1).done == VIDEOS
    while len(kills) < num_kills("actor"):
        shutil.rmtree(corpus / "cache", ignore_errors=True)
        nodes.have(2)
        before.clear()
        summary, attempts = run(prepared(corpus, f"extract.max_attempts={2 + num_kills('actor')}"), disturb)
        assert (summary.done, summary.failed, summary.pending) == (VIDEOS, {}, 0)
        assert problems(corpus / "cache") == []
        assert checksums(corpus / "cache") == checksums(source / "one-core")
        assert len(attempts) == VIDEOS
        after = committed(corpus)
        assert before
        assert {video: after[video] for video in before} == before, "a finished video was extracted again"


def test_a_video_that_kills_its_worker_fails_alone(nodes, corpus):
    """Whoever opens this file is killed, and so is the actor behind."""
    nodes.have(1)

    def kill_actors(_reader):
        for actor in actors():
            send(actor, signal.SIGKILL)

    with while_read(slow_to_read(corpus, "train_0001"), kill_actors):
        summary, attempts = run(prepared(corpus, "extract.max_attempts=1"))
    assert summary.failed == {"train_0001": "its worker died 1 time with this video only"}
    assert (summary.done, summary.pending) == (VIDEOS - 1, 0)
    assert set(attempts.values()) == {1}


def slow_to_read(corpus, video):
    """Write a longer video in its place: opening it is seen from outside."""
    path = corpus / "data" / "videos" / f"{video}.mp4"
    write_video(path, count=9 * RATE_FPS, height=480, width=640, options={"preset": "ultrafast"})
    return path


@contextmanager
def while_read(path, act):
    """Call `act` with every process that is seen to decode `path`."""
    ended = threading.Event()

    def watch():
        while not ended.wait(0.02):
            for reader in named(os.getpid(), "decode.child_main"):
                if opened(reader, path):
                    act(reader)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def send(pid, number):
    """A process that has gone meanwhile needs no signal."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def opened(pid, path):
    try:
        return any(entry.samefile(path) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.exists())
    except OSError:
        return False


def test_without_a_node_left_it_stops_with_one_line_and_goes_on_later(nodes, corpus):
    """The last video's reader is stopped, so that something is left to do however late the nodes are lost."""
    nodes.have(1)
    lost_s = []

    def lose_all(count):
        while count == 2 and nodes.workers:
            nodes.lose_one()
            lost_s.append(time.monotonic())

    last = slow_to_read(corpus, "test_0003")
    stopped = while_read(last, lambda reader: send(reader, signal.SIGSTOP))
    with stopped, pytest.raises(UserError, match="the cluster has no node left that can run a worker") as caught:
        run(prepared(corpus), lose_all)
    assert time.monotonic() - lost_s[0] < 60
    assert "0 CPU cores" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    before = committed(corpus)
    assert 2 <= len(before) < VIDEOS
    unfinished = prepared(corpus)
    assert set(unfinished.before.done) == set(before)
    assert unfinished.before.failed == {}
