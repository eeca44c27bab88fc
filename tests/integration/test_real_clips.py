"""Clips from cameras and the web: the right frames at one per second, or a true reason."""

import shutil
import subprocess
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from stages.decode import DecodeChild, DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.video_files import read_plainly

CLIPS = Path(__file__).resolve().parents[3] / "shared" / "data" / "clips"
NAMES = (
    "av1_video.mkv",
    "birthday.mp4",
    "boat.mp4",
    "dog_barking.mp4",
    "h265_video.mp4",
    "nasa_13013_rotated.mp4",
    "testsrc2_vp9.webm",
)
REFUSED = {"decord": {"av1_video.mkv": "av1 video", "h265_video.mp4": "hevc video"}, "torchcodec": {}}
TURNED = "nasa_13013_rotated.mp4"

pytestmark = pytest.mark.skipif(not CLIPS.is_dir(), reason="the clips are not on this machine")


@pytest.fixture(scope="module")
def child():
    with DecodeChild() as shared:
        yield shared


@cache
def per_second(name):
    """Return the clip, its times at 1 fps, and plain decoding's frame numbers and upright frames at those times."""
    shown_s, frames = read_plainly(CLIPS / name)
    times_s = np.arange(0.0, shown_s[-1] + 1e-9, 1.0)
    indices = [int(np.flatnonzero(shown_s <= time + 0.0005)[-1]) for time in times_s]
    upright = [np.rot90(frames[index]) if name == TURNED else frames[index] for index in indices]
    return CLIPS / name, times_s, indices, np.stack(upright)


@pytest.mark.parametrize("name", NAMES)
def test_a_child_returns_the_frames_of_sequential_decoding(child, name):
    path, times_s, _, frames = per_second(name)
    native_px = frames.shape[1:3]
    video = child.decode(FrameRequest(path, times_s, (native_px, (224, 224)), "pyav", 0.1), 60.0)
    assert np.array_equal(video.views[0], frames)
    assert video.views[1].shape == (len(times_s), 224, 224, 3)
    assert np.abs(video.shown_s - times_s).max() < 0.05


@pytest.mark.parametrize("decoder", REFUSED)
@pytest.mark.parametrize("name", NAMES)
def test_the_other_decoders_return_the_same_frames_or_refuse(name, decoder):
    pytest.importorskip(decoder)
    path, times_s, _, frames = per_second(name)
    request = FrameRequest(path, times_s, (frames.shape[1:3],), decoder, 0.1)
    if name in REFUSED[decoder]:
        with pytest.raises(DecodeError, match=REFUSED[decoder][name]) as caught:
            decode(request)
        assert caught.value.kind == "refused"
    else:
        assert np.array_equal(decode(request).views[0], frames)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not on this machine")
@pytest.mark.parametrize("name", NAMES)
def test_the_ffmpeg_program_shows_the_same_pictures_with_the_same_colours(name):
    path, times_s, indices, frames = per_second(name)
    wanted = "+".join(f"eq(n,{index})" for index in indices)
    command = ["ffmpeg", "-v", "error", "-i", str(path), "-vf", f"select='{wanted}'", "-fps_mode", "passthrough"]
    raw = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
    theirs = np.frombuffer(raw, dtype=np.uint8).reshape(frames.shape)
    ours = decode(FrameRequest(path, times_s, (frames.shape[1:3],), "pyav", 0.1)).views[0]
    # Bit-identical with FFmpeg 5.1; other releases may round the colour conversion differently.
    assert np.abs(ours.astype(int) - theirs).mean() < 0.5


def test_a_clip_too_long_for_its_deadline_is_a_timeout_and_the_next_clip_decodes(child):
    long = FrameRequest(CLIPS / "birthday.mp4", np.arange(0.0, 16.0, 0.5), ((224, 224),), "pyav", 0.1)
    with pytest.raises(DecodeError) as caught:
        child.decode(long, 0.01)
    assert caught.value.kind == "timeout"
    assert len(child.decode(long, 60.0).shown_s) == 32
