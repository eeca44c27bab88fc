"""Every kind of file with every decoder: the frame shown at each time, to the byte, or a refusal that says why.

Each picture carries its number, so that right means the picture meant for that time, not only what PyAV makes of the
same file; the bytes are compared with plain sequential decoding.
"""

import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest

from stages.decode import DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.video_files import RATE_FPS, picture_number, read_plainly, turned_copy
from tests.video_kinds import KINDS, Kind

DECODERS = ("pyav", "decord", "torchcodec")
# Formats whose timestamps are rounded: half a tick of the coarsest, and a float's rounding.
SAME_TIME_S = 0.0011


def ask(path, times_s, decoder, size_px=(8, 8)):
    return decode(FrameRequest(path, np.array(times_s, dtype=np.float64), (size_px,), decoder, 0.1))


def skip_without(decoder):
    if decoder != "pyav" and find_spec(decoder) is None:
        pytest.skip(f"{decoder} is not installed")


@dataclass(frozen=True)
class Made:
    """A file of one kind, and every frame of it by plain sequential decoding."""

    kind: Kind
    path: Path
    shown_s: np.ndarray
    frames: list[np.ndarray]


def make(name, folder):
    path = KINDS[name].write(folder / "video")
    return Made(KINDS[name], path, *read_plainly(path))


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """Each kind in turn, for all the tests that ask for it."""
    return make(request.param, tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return make("h264, GOP 24", tmp_path_factory.mktemp("videos"))


def test_plain_decoding_shows_the_pictures_that_were_encoded(made):
    first, times_s = made.kind.first, made.kind.times_s
    assert [picture_number(frame) for frame in made.frames] == list(range(first, first + len(times_s)))
    np.testing.assert_allclose(made.shown_s, times_s, atol=SAME_TIME_S)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_right_frame_at_each_time_or_a_refusal_with_its_reason(made, decoder):
    skip_without(decoder)
    path, shown_s, frames = made.path, made.shown_s, made.frames
    words = getattr(made.kind, decoder, None)
    if words is not None:
        with pytest.raises(DecodeError) as caught:
            ask(path, [0.0], decoder)
        assert caught.value.kind == "refused"
        assert words in caught.value.reason
        assert "use decoder pyav" in caught.value.reason
        return
    end_s = shown_s[-1]
    for times_s in (
        np.arange(0.0, end_s + 1e-9, 1.0),  # sparse, on the grid
        np.array([0.37]) * end_s,  # from the middle
        np.array([0.61, 0.61, 0.612, 0.62]) * end_s,  # several on one frame
        np.append(np.arange(0.011, end_s, 0.17), end_s),  # off the grid, up to the last frame
        shown_s,  # every frame
    ):
        video = ask(path, times_s, decoder, size_px=frames[0].shape[:2])
        expected = [int(np.flatnonzero(shown_s <= time + 0.0005)[-1]) for time in times_s]
        np.testing.assert_allclose(video.shown_s, shown_s[expected], atol=1e-6)
        for row, index in enumerate(expected):
            assert np.array_equal(video.views[0][row], frames[index]), f"{times_s[row]} s is not frame {index}"


MATRICES = {
    "0": ((1, 0, 0, 1), lambda rgb: rgb),
    "90": ((0, -1, 1, 0), lambda rgb: np.rot90(rgb, 1)),
    "180": ((-1, 0, 0, -1), lambda rgb: np.rot90(rgb, 2)),
    "270": ((0, 1, -1, 0), lambda rgb: np.rot90(rgb, 3)),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda rgb: rgb.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda rgb: np.rot90(rgb.transpose(1, 0, 2), 2)),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("turn", MATRICES)
def test_the_display_matrix_is_applied_or_refused(usual, tmp_path, turn, decoder):
    skip_without(decoder)
    matrix, upright = MATRICES[turn]
    turned = turned_copy(usual.path, tmp_path / "turned.mp4", matrix)
    want = np.ascontiguousarray(upright(usual.frames[RATE_FPS]))
    if decoder != "pyav" and np.linalg.det(np.reshape(matrix, (2, 2))) < 0:
        with pytest.raises(DecodeError, match="does not mirror") as caught:
            ask(turned, [1.0], decoder)
        assert caught.value.kind == "refused"
    else:
        assert np.array_equal(ask(turned, [1.0], decoder, size_px=want.shape[:2]).views[0][0], want)


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_time_outside_the_video_says_what_was_asked_and_found(usual, decoder):
    skip_without(decoder)
    path, shown_s = usual.path, usual.shown_s
    for time_s in (shown_s[-1] + 9.0, -9.0):
        with pytest.raises(DecodeError) as caught:
            ask(path, [time_s], decoder)
        assert caught.value.kind == "out_of_range"
        for part in (f"{time_s:.3f}", f"{shown_s[-1]:.3f}", str(path), f"decoder {decoder}"):
            assert part in caught.value.reason


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("name", ["h264, GOP 24", "h264, matroska", "vp9"])
@pytest.mark.parametrize("filler", ["zeros", "noise"])
def test_damage_in_the_middle_is_an_error_with_every_decoder(tmp_path, name, filler, decoder):
    skip_without(decoder)
    made = make(name, tmp_path)
    data = bytearray(made.path.read_bytes())
    at, length = len(data) * 3 // 10, 2000
    data[at : at + length] = bytes(length) if filler == "zeros" else np.random.default_rng(0).bytes(length)
    made.path.write_bytes(data)
    with pytest.raises(DecodeError) as caught:
        ask(made.path, made.shown_s, decoder)
    assert caught.value.kind in ("unreadable", "refused")


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_the_codec_notices_of_one_wrong_byte_is_an_error_and_no_decoder_hides_it(usual, tmp_path, decoder):
    skip_without(decoder)
    data, reasons = usual.path.read_bytes(), []
    for share in np.arange(0.30, 0.70, 0.05):
        damaged = bytearray(data)
        damaged[int(len(data) * share)] ^= 0xFF
        (tmp_path / "damaged.mp4").write_bytes(damaged)
        try:
            ask(tmp_path / "damaged.mp4", usual.shown_s, decoder)
        except DecodeError as error:
            reasons.append(f"{error.kind}: {error.reason}")
    assert len(reasons) >= 2  # a byte may also turn a picture into another valid one, which nobody can know
    assert all(re.match("unreadable: .*(damaged|Invalid data)", reason) for reason in reasons), reasons


@pytest.mark.parametrize("decoder", DECODERS)
def test_of_several_video_streams_the_first_is_read_or_the_file_is_refused(usual, tmp_path, decoder):
    skip_without(decoder)
    path = tmp_path / "two.mkv"
    with av.open(str(usual.path)) as old, av.open(str(path), "w") as new:
        streams = [new.add_stream_from_template(old.streams.video[0]) for _ in range(2)]
        for packet in old.demux(old.streams.video[0]):
            for stream in streams if packet.size else ():
                packet.stream = stream
                new.mux(packet)
    if decoder == "pyav":
        assert np.array_equal(ask(path, [1.0], decoder, usual.frames[0].shape[:2]).views[0][0], usual.frames[RATE_FPS])
    else:
        with pytest.raises(DecodeError, match="several video streams"):
            ask(path, [1.0], decoder)
