"""The decord reader: PyAV's frames to the byte on the kinds it accepts, a refusal that says why on all others."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from stages.decode import DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.video_files import read_plainly, write_video

pytest.importorskip("decord", reason="decord has wheels for x86-64 only")

GOP_24 = {"g": "24", "bf": "3"}
VFR_TICKS = [int(tick) for tick in np.cumsum([20, 40, 20, 100, 60, 20] * 16)]
REALTIME = {"deadline": "realtime", "cpu-used": "8", "g": "48"}

ACCEPTED = {
    "h264, GOP 250": ("mp4", "libx264", {"options": {"g": "250", "bf": "3", "b-pyramid": "normal"}}),
    "h264, GOP 24": ("mkv", "libx264", {"options": GOP_24}),
    "h264, variable rate": ("mp4", "libx264", {"options": GOP_24, "ticks": VFR_TICKS, "time_base": Fraction(1, 600)}),
    "h264, full range": ("mp4", "libx264", {"options": GOP_24, "pix_fmt": "yuvj420p"}),
    "vp9": ("webm", "libvpx-vp9", {"options": REALTIME}),
}
REFUSED = {
    "avi": ("avi", "mpeg4", {"max_b_frames": 2}, "avi files"),
    "MPEG-TS": ("ts", "libx264", {"options": GOP_24}, "mpegts files"),
    "hevc": ("mp4", "libx265", {"options": {"x265-params": "log-level=none"}}, "hevc video"),
    "mpeg4": ("mp4", "mpeg4", {"max_b_frames": 2}, "mpeg4 video"),
    "av1": ("mp4", "libsvtav1", {"options": {"preset": "12"}}, "av1 video"),
    "open GOP": ("mp4", "libx264", {"options": {"x264-params": "open-gop=1:keyint=24:bframes=3"}}, "GOPs are open"),
    "intra refresh": ("mp4", "libx264", {"options": {"x264-params": "intra-refresh=1:keyint=24"}}, "GOPs are open"),
    "edit list": ("mp4", "libx264", {"options": GOP_24, "shift_ticks": -31}, "edit list"),
    "10 bits": ("mp4", "libx264", {"options": GOP_24, "pix_fmt": "yuv420p10le"}, "8-bit"),
    "odd size": ("webm", "libvpx-vp9", {"options": REALTIME, "height": 97, "width": 129}, "even sides"),
}


def ask(path, times_s, size_px=(8, 8)):
    return decode(FrameRequest(path, np.array(times_s, dtype=np.float64), (size_px,), "decord", 0.1))


@pytest.mark.parametrize("name", ACCEPTED)
def test_frames_equal_those_of_sequential_decoding_with_pyav(tmp_path, name):
    ending, codec, arguments = ACCEPTED[name]
    path = write_video(tmp_path / f"video.{ending}", codec, **arguments)
    shown_s, frames = read_plainly(path)
    for times_s in (np.arange(0.0, shown_s[-1], 1.0), shown_s[::7] + 0.005, shown_s[[0, 60, 60, 95]]):
        video = ask(path, times_s, size_px=frames[0].shape[:2])
        expected = [int(np.flatnonzero(shown_s <= time + 0.0005)[-1]) for time in times_s]
        np.testing.assert_allclose(video.shown_s, shown_s[expected], atol=1e-6)
        for row, index in enumerate(expected):
            assert np.array_equal(video.views[0][row], frames[index])


@pytest.mark.parametrize("name", REFUSED)
def test_what_decord_gets_wrong_is_refused_with_the_reason(tmp_path, name):
    ending, codec, arguments, words = REFUSED[name]
    path = write_video(tmp_path / f"video.{ending}", codec, count=48, **arguments)
    with pytest.raises(DecodeError) as caught:
        ask(path, [1.0])
    assert caught.value.kind == "refused"
    assert words in caught.value.reason
    assert "use decoder pyav" in caught.value.reason


def test_a_time_after_the_end_names_this_decoder(tmp_path):
    with pytest.raises(DecodeError, match="decoder decord") as caught:
        ask(write_video(tmp_path / "video.mp4", options=GOP_24), [9.0])
    assert caught.value.kind == "out_of_range"


def test_without_decord_the_user_is_told_and_pyav_still_works(tmp_path):
    path = write_video(tmp_path / "video.mp4", options=GOP_24, count=24)
    program = f"""
import sys
sys.modules["decord"] = None  # what the import system does for a package that is not there
from pathlib import Path
import numpy as np
from stages.decode import FrameRequest
from stages.decode.reader import decode
for decoder in ("pyav", "decord"):
    decode(FrameRequest(Path({str(path)!r}), np.zeros(1), ((8, 8),), decoder, 0.1))
    print(decoder, "works")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.stdout == "pyav works\n"
    assert "UserError: decord is not installed" in run.stderr
