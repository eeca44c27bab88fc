"""The decode child under every fault: each costs one named error, and the next video decodes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from stages.decode import DecodeChild, DecodeError, FrameRequest
from stages.decode.reader import decode
from stages.errors import UserError
from tests.video_files import write_video

TIMES_S = np.arange(0.0, 3.0, 0.25)
LONG_S = 60.0  # a deadline that nothing here reaches
SOON_S = 20.0  # in which a process must have gone
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the kernel ties parent and child")


def request_for(path, times_s=TIMES_S, sizes_px=((64, 64), (40, 56))):
    return FrameRequest(path, np.array(times_s, dtype=np.float64), sizes_px, "pyav", 0.1)


def failure(child, request, deadline_s=LONG_S):
    with pytest.raises(DecodeError) as caught:
        child.decode(request, deadline_s)
    return caught.value


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition):
    until = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", options={"g": "24", "bf": "3"})


@pytest.fixture(scope="module")
def child():
    """One child object for all tests; most end its process, and the next must get a new one by itself."""
    with DecodeChild() as shared:
        yield shared


def assert_decodes(child, video):
    decoded, expected = child.decode(request_for(video), LONG_S), decode(request_for(video))
    assert np.array_equal(decoded.shown_s, expected.shown_s)
    for view, wanted in zip(decoded.views, expected.views, strict=True):
        assert np.array_equal(view, wanted)
        assert view.flags.owndata
        assert view.flags.writeable


def test_the_child_gives_what_decoding_in_process_gives_and_stays(child, video):
    assert_decodes(child, video)
    pid = child.pid
    assert_decodes(child, video)
    assert child.pid == pid
    assert pid != os.getpid()


def test_a_bad_file_is_an_error_with_its_reason_and_the_child_stays(child, video, tmp_path):
    assert_decodes(child, video)
    pid = child.pid
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    for path, kind, words in (
        (tmp_path / "pipe.mp4", "refused", "not a regular file"),
        (tmp_path / "text.mp4", "unreadable", "Invalid data"),
        (tmp_path / "absent.mp4", "missing", "no such file"),
    ):
        error = failure(child, request_for(path), deadline_s=5.0)
        assert (error.kind, words in error.reason) == (kind, True), error.reason
    assert failure(child, request_for(video, [99.0])).kind == "out_of_range"
    assert_decodes(child, video)
    assert child.pid == pid


def test_a_name_that_is_not_unicode_reaches_the_child_unchanged(child, video, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\xe9.mp4"))
    odd.write_bytes(video.read_bytes())
    assert np.array_equal(child.decode(request_for(odd), LONG_S).views[0], decode(request_for(video)).views[0])


def test_a_child_killed_while_decoding_is_one_crash(child, video):
    assert_decodes(child, video)
    pid = child.pid
    os.kill(pid, signal.SIGSTOP)  # so that the kill surely falls between request and answer
    killer = threading.Timer(0.3, os.kill, (pid, signal.SIGKILL))
    killer.start()
    error = failure(child, request_for(video))
    killer.join()
    assert error.kind == "crash"
    assert "signal 9 (Killed) while decoding" in error.reason
    assert_decodes(child, video)
    assert child.pid != pid


def test_a_child_killed_between_two_videos_is_replaced_unnoticed(child, video):
    assert_decodes(child, video)
    pid = child.pid
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: child.pid is None)
    assert_decodes(child, video)


@on_linux
def test_a_child_that_hangs_is_ended_at_the_deadline(child, video):
    assert_decodes(child, video)
    pid = child.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    error = failure(child, request_for(video), deadline_s=0.5)
    assert 0.5 <= time.monotonic() - began < 5.0
    assert error.kind == "timeout"
    assert "0.5 s" in error.reason
    assert not is_running(pid)
    assert_decodes(child, video)


def test_a_deadline_shorter_than_the_work_is_a_timeout(child, video):
    assert_decodes(child, video)
    assert failure(child, request_for(video), deadline_s=0.001).kind == "timeout"
    assert_decodes(child, video)


def test_an_interrupted_decode_leaves_no_answer_for_the_next(child, video):
    assert_decodes(child, video)
    pid = child.pid
    os.kill(pid, signal.SIGSTOP)
    interrupter = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        child.decode(request_for(video, [0.0]), LONG_S)
    interrupter.join()
    assert_decodes(child, video)
    assert child.pid != pid


@on_linux
def test_a_video_past_the_memory_limit_is_one_memory_error(video, tmp_path):
    large = write_flat_video(tmp_path / "large.mp4", side_px=4096)
    with DecodeChild(memory_gb=64 / 1024) as small:
        assert_decodes(small, video)
        error = failure(small, request_for(large, [0.0]))
        assert error.kind == "memory"
        assert "memory limit" in error.reason
        assert small.pid is None  # the next video gets a new child
    assert decode(request_for(large, [0.0])).views[0].shape == (1, 64, 64, 3)


def write_flat_video(path, side_px, codec="mpeg4"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.height = stream.width = side_px
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(side_px, side_px, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([90]) * plane.buffer_size)
        for index in range(2):
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def test_a_child_that_cannot_start_says_why(video, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with DecodeChild() as broken:
        error = failure(broken, request_for(video))
    assert error.kind == "crash"
    assert "ended with status 1 while starting" in error.reason
    assert "this torch is broken" in error.reason


def test_a_missing_decoder_package_is_the_users_mistake_and_the_child_stays(video, monkeypatch, tmp_path):
    (tmp_path / "decord.py").write_text("raise ImportError('not there')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with DecodeChild() as child:
        assert_decodes(child, video)
        pid = child.pid
        with pytest.raises(UserError, match="decord is not installed"):
            child.decode(FrameRequest(video, np.zeros(1), ((8, 8),), "decord", 0.1), LONG_S)
        assert_decodes(child, video)
        assert child.pid == pid


@on_linux
def test_a_child_outlives_the_thread_that_started_it_and_leaves_nothing_open_when_closed(video):
    before = set(Path("/proc/self/fd").iterdir())
    with DecodeChild() as child:
        starter = threading.Thread(target=child.start)
        starter.start()
        starter.join()
        pid = child.pid
        assert_decodes(child, video)
        assert child.pid == pid
    assert child.pid is None
    assert not is_running(pid)
    assert set(Path("/proc/self/fd").iterdir()) == before


@on_linux
@pytest.mark.parametrize("situation", ["stopped", "started by a thread"])
def test_no_child_outlives_a_killed_parent(video, situation):
    program = f"""
import os, signal, sys, threading, time
import numpy as np
from pathlib import Path
from stages.decode import DecodeChild, FrameRequest
child = DecodeChild()
if {situation == "started by a thread"}:
    starter = threading.Thread(target=child.start)
    starter.start()
    starter.join()
child.decode(FrameRequest(Path({str(video)!r}), np.zeros(1), ((8, 8),), "pyav", 0.1), 60)
if {situation == "stopped"}:
    os.kill(child.pid, signal.SIGSTOP)
print(child.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not is_running(pid))
