"""What one decoder could not bear is tried once with the other, and gives the same bytes."""

import os
import signal
import sys
import threading

import numpy as np
import pytest

from stages.decode import DecodeChild, DecodeError, FrameRequest, decode_or_retry
from stages.decode.reader import decode
from tests.video_files import write_video

pytest.importorskip("decord")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stops a process by its id")

TIMES_S = np.arange(0.0, 3.0, 0.25)
LONG_S = 60.0


def request_for(path):
    return FrameRequest(path, TIMES_S, ((64, 64), (40, 56)), "pyav", 0.1)


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


def test_both_reasons_are_told_where_the_other_decoder_refuses_the_file(child, video, tmp_path):
    stream = write_video(tmp_path / "stream.ts", options={"g": "24"})
    kill_soon(stop(child, video))
    with pytest.raises(DecodeError) as caught:
        decode_or_retry(child, request_for(stream), LONG_S)
    assert caught.value.kind == "crash"
    assert "signal 9 (Killed) while decoding" in caught.value.reason
    assert "then, with decord, refused: not safe with decord" in caught.value.reason


def test_a_damaged_file_is_not_tried_again(child, tmp_path):
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    with pytest.raises(DecodeError) as caught:
        decode_or_retry(child, request_for(tmp_path / "text.mp4"), LONG_S)
    assert caught.value.kind == "unreadable"
    assert "decord" not in caught.value.reason
