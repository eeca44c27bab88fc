"""Odd and damaged files from other programs: the right picture, or one true reason."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from stages.decode import DecodeChild, DecodeError, FrameRequest, LengthRequest
from tests.video_files import read_plainly

ODD = Path(__file__).resolve().parents[3] / "shared" / "data" / "odd"
DAMAGED = json.loads((ODD / "damaged.json").read_text())["files"] if ODD.is_dir() else []
FPS = 25

pytestmark = pytest.mark.skipif(not ODD.is_dir(), reason="the odd files are not on this machine")


@pytest.fixture(scope="module")
def child():
    with DecodeChild() as shared:
        yield shared


def size_of(path):
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        return codec.height, codec.width


def ask(child, name, times_s, size_px=None, **more):
    path = ODD / name
    request = FrameRequest(path, np.array(times_s, dtype=np.float64), (size_px or size_of(path),), "pyav", 0.1, **more)
    return child.decode(request, 60.0)


def number_of(rgb):
    """The number in the bottom rows of the damaged files: eight cells of 24 pixels, the highest bit first."""
    row = rgb[-14:-4].mean(axis=(0, 2))
    return sum(1 << 7 - cell for cell in range(8) if row[cell * 24 + 2 : cell * 24 + 7].mean() > 127)


@pytest.mark.parametrize("file", [one["file"] for one in DAMAGED])
def test_a_damaged_file_shows_the_number_asked_for_or_refuses(child, file):
    with pytest.raises(DecodeError) as caught:
        ask(child, file, (np.arange(0, 200, 3) + 0.5) / FPS, (112, 192))
    assert caught.value.kind == "unreadable"
    for number in range(0, 200, 9):
        time_s = (number + 0.5) / FPS
        if time_s < (caught.value.whole_before_s or 0.0):
            assert number_of(ask(child, file, [time_s], (112, 192)).views[0][0]) == number
        else:
            with pytest.raises(DecodeError):
                ask(child, file, [time_s], (112, 192))


@pytest.mark.parametrize(
    "name",
    [
        "avi_cinepak_no_index.avi",
        "avi_msmpeg4_no_index.avi",
        "avi_wmv2_no_index.avi",
        "wmv2_all_packets_flagged_key.asf",
    ],
)
def test_false_key_frames_change_no_picture(child, name):
    _, frames = read_plainly(ODD / name)
    for number in (0, 13, 26, 39, 90):
        assert np.array_equal(ask(child, name, [(number + 0.5) / FPS]).views[0][0], frames[number])


def test_one_by_one_and_all_together_are_the_same_pictures_where_times_are_those_of_decoding(child):
    name, times_s = "mp4_xvid_bframes_stream_copied.mp4", (np.arange(58) + 0.5) / FPS
    together = ask(child, name, times_s).views[0]
    assert [number_of(picture) for picture in together] == list(range(58))
    for number in range(0, 58, 5):
        assert np.array_equal(ask(child, name, [times_s[number]]).views[0][0], together[number])


def test_a_hole_in_mid_file_is_refused_from_there_on(child):
    for name in ("avi_xvid_hole_50_frames.avi", "mkv_one_bit_45_frames_lost.mkv"):
        path = ODD / name
        before_s = child.length(LengthRequest(path), 60.0).seconds
        with pytest.raises(DecodeError) as caught:
            ask(child, name, [1.0, before_s])
        assert caught.value.whole_before_s == before_s > 5
        _, frames = read_plainly(path)
        proved = ask(child, name, [1.0, before_s - 0.01])
        assert np.array_equal(proved.views[0][0], frames[FPS])
        assert proved.remark.startswith("damaged from about")


def test_a_file_whose_last_packet_is_cut_gives_all_but_its_end(child):
    name = "d0_cutlast.avi"
    with pytest.raises(DecodeError, match="corrupt") as caught:
        ask(child, name, [0.0, 5.0, 9.99])
    assert caught.value.whole_before_s > 9.8
    _, frames = read_plainly(ODD / name)
    times_s = (np.arange(0, 290, 20) + 0.5) / 30
    shown = ask(child, name, times_s)
    assert shown.remark.startswith("damaged from about 9.9")
    for row, picture in enumerate(shown.views[0]):
        assert np.array_equal(picture, frames[20 * row])
    with pytest.raises(DecodeError):
        ask(child, name, times_s, damaged="refuse")


def test_what_pyav_has_no_name_for_is_shown(child):
    for name in ("apple_spatial_mvhevc.mov", "exif_mjpeg.mov"):
        shown_s, frames = read_plainly(ODD / name)
        for number in (0, len(frames) - 1):
            assert np.array_equal(ask(child, name, [shown_s[number]]).views[0][0], frames[number])
    assert np.array_equal(ask(child, "exif_mjpeg.avi", [2.0]).views[0][0], read_plainly(ODD / "exif_mjpeg.avi")[1][50])


def test_a_tag_copied_from_a_longer_file_is_no_truncation(child):
    assert ask(child, "nut_stale_duration_tag.nut", [1.0]).shown_s == pytest.approx([1.0])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("short.y4m", "refused", "takes it for 'yuv4mpegpipe'"),
        ("flv_new_stream_crash.flv", "unreadable", "damaged: "),
    ],
)
def test_other_files_are_refused_for_their_true_reason(child, name, kind, words):
    with pytest.raises(DecodeError) as caught:
        ask(child, name, np.arange(0.0, 7.9, 0.5), (8, 8))
    assert (caught.value.kind, words in caught.value.reason) == (kind, True)
