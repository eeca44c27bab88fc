"""Videos at addresses: fetched through a real server, removed again, and failed for their true reason."""

import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from stages.decode import DecodeChild, DecodeError, FrameRequest
from stages.decode.reader import decode
from stages.errors import UserError
from tests.film_server import serving
from tests.small_disk import small_disk_at
from tests.video_files import write_video

pytest.importorskip("aiohttp", reason="fsspec's http needs it")

TIMES_S = np.arange(0.0, 3.0, 0.5)
SOON_S = 20.0
NAMES = ("whole", "unsized", "moved", "gone", "closed", "broken", "half", "stalled")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", options={"g": "24", "bf": "3"})


@pytest.fixture(scope="module")
def films(video):
    """The address of the server."""
    with serving({f"{name}.mp4": video for name in NAMES}) as address:
        yield address


@pytest.fixture(scope="module")
def child():
    with DecodeChild() as shared:
        yield shared


def request_for(path):
    return FrameRequest(path, TIMES_S, ((64, 64),), "pyav", 0.1)


def copied(child, url, folder, limit_bytes=2**20, deadline_s=60.0):
    return child.local_copy(url, folder=str(folder), limit_bytes=limit_bytes, deadline_s=deadline_s)


def failure(child, url, folder, **limits):
    with pytest.raises(DecodeError) as caught, copied(child, url, folder, **limits):
        pass
    return caught.value


@pytest.mark.parametrize("name", ["whole.mp4", "unsized.mp4", "moved.mp4", "whole.mp4?signature=secret"])
def test_a_fetched_video_decodes_to_the_same_bytes_and_leaves_nothing(films, child, video, tmp_path, name):
    with copied(child, f"{films}/{name}", tmp_path) as path:
        assert np.array_equal(child.decode(request_for(path), 60.0).views[0], decode(request_for(video)).views[0])
        assert list(tmp_path.iterdir()) == []  # the copy has no name that a kill could leave behind
        assert path.exists()
    assert not path.exists()


def test_the_copy_outlives_a_child_that_is_killed(films, child, tmp_path):
    with copied(child, f"{films}/whole.mp4", tmp_path) as path:
        os.kill(child.pid, signal.SIGKILL)
        while child.pid is not None:
            time.sleep(0.01)
        assert len(child.decode(request_for(path), 60.0).shown_s) == len(TIMES_S)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gone.mp4", "missing", "no such file: {url}"),
        ("closed.mp4", "refused", "no permission to read {url} (HTTP 403)"),
        ("broken.mp4", "unreachable", "{url} after 0 of 2 bytes: ClientResponseError: 500"),
        ("half.mp4", "unreachable", "{url} after "),
    ],
)
def test_what_the_server_does_wrong_is_the_reason(films, child, tmp_path, name, kind, words):
    error = failure(child, f"{films}/{name}?signature=secret", tmp_path)
    assert (error.kind, words.format(url=f"{films}/{name}") in error.reason) == (kind, True), error.reason
    assert "secret" not in error.reason
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stalls_costs_the_deadline_and_the_next_fetch_works(films, child, tmp_path):
    began = time.monotonic()
    error = failure(child, f"{films}/stalled.mp4", tmp_path, deadline_s=3.0)
    assert 3.0 <= time.monotonic() - began < SOON_S
    assert (error.kind, error.reason) == ("timeout", "fetching took longer than 3 s; the child was ended")
    with copied(child, f"{films}/whole.mp4", tmp_path) as path:
        assert path.stat().st_size > 0


def test_nobody_at_the_address_is_unreachable(child, tmp_path):
    error = failure(child, "http://127.0.0.1:9/a.mp4", tmp_path)
    assert error.kind == "unreachable"
    assert "http://127.0.0.1:9/a.mp4: ClientConnectorError" in error.reason


@pytest.mark.parametrize("name", ["whole.mp4", "unsized.mp4"])
def test_a_file_over_the_limit_is_refused(films, child, tmp_path, name):
    error = failure(child, f"{films}/{name}", tmp_path, limit_bytes=1000)
    assert error.kind == "refused"
    assert "extract.download_gb allows" in error.reason


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nosuch://place/a.mp4", "nosuch://place/a.mp4: this kind of address is not known; got 'nosuch://'"),
        ("gs://bucket/a.mp4", "gs:// needs a package that is not installed .*gcsfs for gs://"),
    ],
)
def test_a_missing_driver_is_one_line_for_the_user_and_the_child_stays(films, child, tmp_path, url, words):
    if url.startswith("gs:") and find_spec("gcsfs"):
        pytest.skip("the driver is installed")
    with copied(child, f"{films}/whole.mp4", tmp_path):
        pid = child.pid
    with pytest.raises(UserError, match=words), copied(child, url, tmp_path):
        pass
    assert child.pid == pid


def test_a_scratch_folder_that_cannot_be_written_says_so(films, child, tmp_path):
    with pytest.raises(UserError, match=r"nothing can be written here .*extract\.scratch"):
        failure(child, f"{films}/whole.mp4", tmp_path / "absent")


def test_a_full_scratch_disk_stops_the_run_with_one_line(films, child, tmp_path):
    with (
        small_disk_at(tmp_path / "disk", "16k") as disk,
        pytest.raises(UserError, match=r"the disk is full.*extract\.scratch"),
        copied(child, f"{films}/whole.mp4", disk),
    ):
        pass


def test_a_copy_goes_with_its_process(films, tmp_path):
    program = f"""
import time
from stages.decode import DecodeChild
limits = {{"folder": {str(tmp_path)!r}, "limit_bytes": 2**20, "deadline_s": 60.0}}
with DecodeChild() as child, child.local_copy("{films}/whole.mp4", **limits) as path:
    print(path, flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    path = Path(parent.stdout.readline().strip())
    assert path.stat().st_size > 0
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []
