"""Killing and racing writers: a reader sees each video absent or whole, and the next run finishes the work.

Run as a program, this file is the writer that the tests start: `extract ROOT VIDEO...`, `race ROOT SEED`, `step ROOT`.
"""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np

from stages.cache import FeatureCache, Fingerprint

NUM_KILLS = 10
TIMES_S = np.arange(14) / 25
VIDEOS = [f"video-{number}" for number in range(60)]
PLANNED = dict.fromkeys(VIDEOS, TIMES_S)


def content(video, seed=0):
    numbers = np.random.default_rng([seed, *video.encode()])
    return {
        "times_s": TIMES_S,
        "features": numbers.standard_normal((len(TIMES_S), 40, 64)).astype(np.float16),
        "targets": numbers.standard_normal((len(TIMES_S), 32)).astype(np.float32),
    }


def extract(root, *videos):
    """Write what is pending, as an extraction run does."""
    cache = FeatureCache.open(root)
    with cache.ledger.writer() as run:
        pending = cache.ledger.status({video: PLANNED[video] for video in videos}, adopt=run).pending
        for video in sorted(pending):
            record = cache.write_video(video, **content(video))
            run.done(video, checksum=record.checksum, attempts=1)


def race(root, seed):
    """Write one video again and again."""
    cache = FeatureCache.open(root)
    for _ in range(25):
        cache.write_video("contested", **content("contested", int(seed)))


def step(root):
    """For each number N on standard input, let a child write and kill itself before its N-th file operation."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            kill_before_operation(int(line))
            FeatureCache.open(root).write_video("stepped", **content("stepped", int(line)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say("killed" if os.WIFSIGNALED(status) else f"ended {os.WEXITSTATUS(status)}")


def kill_before_operation(number):
    operations = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}
    count = 0

    def hook(event, _):
        nonlocal count
        if event in operations:  # os.kill is an audited event too
            count += 1
            if count > number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def say(line):
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def start(*arguments):
    """Start this file as a program and return when it is about to work."""
    process = subprocess.Popen(
        [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("go\n")
    process.stdin.flush()


def make(folder):
    return FeatureCache.create_or_open(folder, Fingerprint(fields={"storage": "float16"}))


def assert_whole(cache, video, seeds=(0,)):
    """The video is one of the contents that were written, entirely."""
    read = cache.read(video, TIMES_S)
    wanted = [content(video, seed) for seed in seeds]
    equal = [(read.features == one["features"]).all() and (read.targets == one["targets"]).all() for one in wanted]
    assert any(equal)


def wait_for_commits(cache, number, process):
    while len(cache.video_ids()) < number and process.poll() is None:
        time.sleep(0.001)


def test_a_writer_killed_at_any_moment_leaves_each_video_absent_or_whole(tmp_path):
    cache = make(tmp_path / "cache")
    chance = random.Random(0)
    interrupted = 0
    for _ in range(NUM_KILLS):
        process = start("extract", str(cache.root), *VIDEOS)
        go(process)
        wait_for_commits(cache, len(cache.video_ids()) + chance.randint(0, 3), process)
        time.sleep(chance.uniform(0, 0.015))  # about one write
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reader = FeatureCache.open(cache.root)
        for result in reader.verify_all():
            assert result.orphan or result.ok
        for video in reader.video_ids():
            assert_whole(reader, video)
        status = reader.ledger.status(PLANNED)
        assert status.done == set(reader.video_ids())
        assert status.pending == set(VIDEOS) - status.done
        assert status.damaged == {}
        interrupted += any((cache.root / "tmp").glob("*"))
        reader.sweep()
        assert list((cache.root / "tmp").glob("*")) == []
        assert reader.info().num_orphans == 0
    assert interrupted, "no kill fell into a write, so this run showed nothing"

    process = start("extract", str(cache.root), *VIDEOS)
    process.communicate("go\n")
    assert process.returncode == 0
    status = cache.ledger.status(PLANNED)
    assert (status.done, status.unlisted) == (set(VIDEOS), set())
    assert all(result.ok for result in cache.verify_all())
    assert len(list((cache.root / "videos").iterdir())) == len(VIDEOS)


def test_a_kill_before_each_single_file_operation_leaves_the_old_or_the_new_revision(tmp_path):
    """The random kills above seldom hit the short moments between the renames; this one hits all of them."""
    cache = make(tmp_path / "cache")
    committed = 1_000
    cache.write_video("stepped", **content("stepped", committed))
    process = start("step", str(cache.root))
    go(process)
    answers = []
    while answers[-1:] in ([], ["killed"]):
        seed = len(answers)
        process.stdin.write(f"{seed}\n")
        process.stdin.flush()
        answers.append(process.stdout.readline().strip())
        assert_whole(cache, "stepped", seeds=(committed, seed))
        assert cache.verify("stepped").ok
        if (cache.read("stepped", [0.0]).features == content("stepped", seed)["features"][:1]).all():
            committed = seed
        cache.sweep()
        assert len(list((cache.root / "videos").iterdir())) == 1
        assert list((cache.root / "tmp").iterdir()) == []
    process.communicate()
    assert answers[-1] == "ended 0"
    assert len(answers) > 30, "the write has more steps than that"


def test_two_writers_racing_on_one_video_leave_one_whole_revision(tmp_path):
    cache = make(tmp_path / "cache")
    cache.write_video("contested", **content("contested", 1))
    writers = [start("race", str(cache.root), seed) for seed in ("1", "2")]
    for writer in writers:
        go(writer)
    num_reads = 0
    while any(writer.poll() is None for writer in writers):
        assert_whole(cache, "contested", seeds=(1, 2))
        num_reads += 1
    assert num_reads > 10, "the reader never met the writers"
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    cache.sweep()
    assert_whole(cache, "contested", seeds=(1, 2))
    assert cache.verify("contested").ok
    assert len(list((cache.root / "videos").iterdir())) == 1
    assert list((cache.root / "tmp").iterdir()) == []


if __name__ == "__main__":
    import zarr  # noqa: F401  so that the first write does not wait for it

    say("ready")
    sys.stdin.readline()
    {"extract": extract, "race": race, "step": step}[sys.argv[1]](*sys.argv[2:])
