"""A corpus with every kind of bad file among good ones, and a cache that cannot be written."""

import json
import os
import shutil
import socket
import struct
import subprocess
import time

import av
import numpy as np
import pytest

from stages.cache.feature_cache import FeatureCache
from stages.cluster.connect import cluster
from stages.errors import UserError
from tests.conftest import run_pipeline
from tests.faults.extract_corpus import (
    VIDEOS,
    checksums,
    committed,
    prepare,
    problems,
    run_here,
)
from tests.faults.test_extract_kill import command
from tests.video_files import write_video


def write_sound(path):
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def write_huge_header(path):
    """A GIF whose header promises 30,000 x 30,000 pixels."""
    write_video(path.with_suffix(".gif"), "gif", count=2, pix_fmt="rgb8")
    data = bytearray(path.with_suffix(".gif").read_bytes())
    struct.pack_into("<HH", data, 6, 30_000, 30_000)
    path.write_bytes(data)


def spoil(videos):
    """Replace nine videos, each by another kind of bad file.

    Returns the words of its true reason by id, and the id of the one that is damaged in its second half only.
    """
    paths = sorted(videos.glob("*.mp4"))[:9]
    empty, truncated, damaged, sound, text, folder, fifo, short, huge = paths
    for path in (truncated, damaged):
        data = bytearray(path.read_bytes())
        middle = len(data) // 2
        if path is truncated:
            del data[middle:]
        else:
            data[middle : middle + 2000] = np.random.default_rng(0).bytes(2000)
        path.write_bytes(data)
    for path in (empty, sound, text, folder, fifo, short, huge):
        path.unlink()
    empty.touch()
    write_sound(sound)
    text.write_text("no video at all\n" * 50)
    folder.mkdir()
    os.mkfifo(fifo)
    write_video(short, count=1)
    write_huge_header(huge)
    words = {
        empty: "unreadable: the file is empty (0 bytes)",
        truncated: "unreadable: ",
        sound: "unreadable: no video stream (audio only)",
        text: "unreadable: Invalid data",
        folder: "refused: not a regular file (d",
        fifo: "refused: not a regular file (p",
        short: "out_of_range: asked for the frame at ",
        huge: "refused: pictures of 30000 x 30000 pixels",
    }
    return {path.stem: reason for path, reason in words.items()}, damaged.stem


def test_every_bad_file_fails_for_its_true_reason_and_every_good_one_is_done(source, corpus):
    videos = corpus / "data" / "videos"
    expected, damaged = spoil(videos)
    done = run_pipeline(*command("--json"), cwd=corpus)
    assert done.returncode == 3
    summary = json.loads(done.stdout)
    assert summary["done"] + len(summary["failed"]) + summary["pending"] == summary["planned"] == VIDEOS
    assert set(summary["failed"]) == set(expected)
    for video, words in expected.items():
        assert summary["failed"][video].startswith(words), summary["failed"][video]
        assert "then, with" not in summary["failed"][video], "a damaged file was tried twice"
    whole = checksums(source / "whole")
    extracted = checksums(corpus / "cache")
    assert set(summary["remarks"]) == {damaged}
    assert extracted.pop(damaged) != whole[damaged]
    used, undamaged = FeatureCache.open(corpus / "cache"), FeatureCache.open(source / "whole")
    times_s = used.cached_times_s(damaged)
    np.testing.assert_array_equal(used.read(damaged, times_s).features, undamaged.read(damaged, times_s).features)
    assert extracted == {video: whole[video] for video in whole if video not in (*expected, damaged)}
    assert "4 of 12 videos done, 4 of them now, 8 failed, 0 pending" in " ".join(done.stderr.split())
    unchanged = run_pipeline(*command("--json"), cwd=corpus)
    assert (unchanged.returncode, json.loads(unchanged.stdout)["extracted_now"]) == (3, 0)
    mended = min(expected)
    shutil.copy(source / "data" / "videos" / f"{mended}.mp4", videos)
    retried = run_here(prepare(corpus, retry_failed=True))
    assert (retried.extracted_now, retried.done, set(retried.failed)) == (1, 5, set(expected) - {mended})


def test_a_cache_on_a_read_only_disk_stops_the_run_and_loses_nothing(source, corpus):
    disk = corpus / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], capture_output=True).returncode:
        pytest.skip("mounting a disk is not permitted here")
    (corpus / "cache").symlink_to(disk)

    def stop(count):
        if count == 3:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            run_here(prepare(corpus), stop)
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(UserError, match="the file system is read-only"):
            run_here(prepare(corpus))
        before = committed(corpus)
        assert len(before) == 3
        assert problems(corpus / "cache") == []
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        summary = run_here(prepare(corpus))
        assert (summary.done, summary.extracted_now) == (VIDEOS, VIDEOS - 3)
        assert checksums(corpus / "cache") == checksums(source / "whole")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_an_address_where_nobody_listens_is_one_line_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"  # bound, but not listened at
        began_s = time.monotonic()
        with (
            pytest.raises(UserError, match=r"--address: no Ray cluster: .*refused.*ray start --head"),
            cluster(address),
        ):
            raise AssertionError("there is a cluster")
    assert time.monotonic() - began_s < 20


def test_what_another_extraction_did_between_the_first_look_and_the_lock_is_not_done_again(corpus):
    late, early = prepare(corpus), prepare(corpus)
    assert late.todo == early.todo != []
    assert run_here(early).extracted_now == VIDEOS
    before = committed(corpus)
    summary = run_here(late)
    assert (summary.done, summary.extracted_now) == (VIDEOS, 0)
    assert committed(corpus) == before
