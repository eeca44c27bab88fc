"""What one decoder could not bear is tried once with each other that is installed, and gives the same bytes."""

import os
import signal
import sys
import threading
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from stages.decode import Attempts, DecodeChild, DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.faults.test_decode_child import write_flat_video
from tests.video_files import write_video

pytest.importorskip("decord")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops a process by its id")

TIMES_S = np.arange(0.0, 3.0, 0.25)
LONG_S = 60.0


def request_for(path):
    return FrameRequest(path, TIMES_S, ((64, 64), (40, 56)), "pyav", 0.1)


def decode_or_retry(child, request, deadline_s):
    return Attempts(request, deadline_s).decode(child, request.times_s)


@pytest.fixture(scope="module")
def child():
    with DecodeChild() as shared:
        yield shared


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", options={"g": "24", "bf": "3"})


def stop(child, video):
    """Let the running child never answer again."""
    child.decode(request_for(video), LONG_S)
    os.kill(child.pid, signal.SIGSTOP)
    return child.pid


def kill_soon(pid):
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    return killer


@pytest.mark.parametrize("fault", ["a hang", "a crash"])
def test_the_other_decoder_gives_the_same_bytes(child, video, fault):
    pid = stop(child, video)
    if fault == "a crash":
        kill_soon(pid)  # while it decodes
    decoded = decode_or_retry(child, request_for(video), 2.0 if fault == "a hang" else LONG_S)
    expected = decode(request_for(video))
    assert child.pid != pid
    assert np.array_equal(decoded.shown_s, expected.shown_s)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(decoded.views, expected.views, strict=True))


def test_all_reasons_are_told_where_the_other_decoders_refuse_the_file(child, video, tmp_path):
    stream = write_video(tmp_path / "stream.ts", options={"g": "24"})
    kill_soon(stop(child, video))
    with pytest.raises(DecodeError) as caught:
        decode_or_retry(child, request_for(stream), LONG_S)
    assert caught.value.kind == "crash"
    assert "signal 9 (Killed) while decoding" in caught.value.reason
    for other in ("decord", "torchcodec"):
        told = f"then, with {other}, refused: not safe with {other}" in caught.value.reason
        assert told == (find_spec(other) is not None)


def test_a_damaged_file_is_not_tried_again(child, tmp_path):
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    with pytest.raises(DecodeError) as caught:
        decode_or_retry(child, request_for(tmp_path / "text.mp4"), LONG_S)
    assert caught.value.kind == "unreadable"
    assert "decord" not in caught.value.reason


def test_only_decoders_that_are_installed_are_tried(child, video, monkeypatch):
    for other in ("decord", "torchcodec"):
        monkeypatch.setitem(sys.modules, other, None)  # what the import system does for a package that is not there
    kill_soon(stop(child, video))
    with pytest.raises(DecodeError) as caught:
        decode_or_retry(child, request_for(video), LONG_S)
    assert caught.value.reason.endswith("while decoding")


def test_parts_go_on_with_the_decoder_that_took_over_and_keep_their_bytes(child, video):
    request, pids = request_for(video), []
    attempts = Attempts(request, 5.0)
    parts = []
    for number, times_s in enumerate(np.split(TIMES_S, 4)):
        if number == 1:
            stop(child, video)
        parts.append(attempts.decode(child, times_s))
        pids.append(child.pid)
    assert pids[0] != pids[1] == pids[2] == pids[3]
    expected = decode(request)
    assert np.array_equal(np.concatenate([part.shown_s for part in parts]), expected.shown_s)
    assert np.array_equal(np.concatenate([part.views[1] for part in parts]), expected.views[1])


def test_the_deadline_holds_for_all_parts_together(child, video):
    attempts = Attempts(replace(request_for(video), decoder="decord"), 0.4)

    def decode_for_ever():
        while True:
            attempts.decode(child, TIMES_S)

    with pytest.raises(DecodeError) as caught:
        decode_for_ever()
    assert caught.value.kind == "timeout"
    told = "decoding took longer than 0.4 s in all its parts; then, with pyav, timeout: decoding took longer than 0.4 s"
    assert told in caught.value.reason


def test_a_video_past_the_memory_limit_is_tried_with_the_other_decoder_too(tmp_path):
    large = write_flat_video(tmp_path / "large.mp4", side_px=4096, codec="libx264")
    request = FrameRequest(large, TIMES_S[:1], ((64, 64),), "pyav", 0.1)
    with DecodeChild(memory_gb=64 / 1024) as small, pytest.raises(DecodeError) as caught:
        decode_or_retry(small, request, LONG_S)
    assert caught.value.kind == "memory"
    assert "; then, with decord, " in caught.value.reason
