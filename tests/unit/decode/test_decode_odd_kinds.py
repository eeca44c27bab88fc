"""Odd but whole files: what can be shown is shown, anything else is one true line."""

import re
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from stages.decode import DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.video_files import RATE_FPS, picture_number, read_plainly, write_video
from tests.video_kinds import GOP_24


def ask(path, times_s, size_px=(96, 128), **more):
    return decode(FrameRequest(path, np.array(times_s, dtype=np.float64), (size_px,), "pyav", 0.1, **more))


def failure(path, **more):
    with pytest.raises(DecodeError) as caught:
        ask(path, [0.0], **more)
    return caught.value


def numbers(video):
    return [picture_number(picture) for picture in video.views[0]]


def joined(path, parts):
    """The packets of several files as one stream."""
    with av.open(str(path), "w") as new:
        stream = None
        for part in parts:
            with av.open(str(part)) as old:
                source = old.streams.video[0]
                stream = stream or new.add_stream_from_template(source)
                for packet in old.demux(source):
                    if packet.size:
                        packet.stream = stream
                        new.mux(packet)
    return path


@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts", "flv"])
def test_a_picture_size_that_changes_in_mid_stream_is_shown(tmp_path, ending):
    large = write_video(tmp_path / "large.ts", options=GOP_24, count=48)
    small = write_video(tmp_path / "small.ts", options=GOP_24, count=48, height=64, width=80, shift_ticks=52)
    path = joined(tmp_path / f"both.{ending}", [large, small])
    _, frames = read_plainly(path)
    assert {frame.shape[:2] for frame in frames} == {(96, 128), (64, 80)}
    for time_s, size_px in ((0.5, (96, 128)), (3.0, (64, 80))):
        video = ask(path, [time_s], size_px)
        assert any(np.array_equal(video.views[0][0], frame) for frame in frames)


def test_a_stream_that_begins_in_mid_file_disturbs_nothing(tmp_path):
    """As in live FLV, whose sound comes later than its header."""
    path = write_video(tmp_path / "video.flv", options=GOP_24)
    whole = ask(path, np.arange(0.0, 4.0, 0.25)).views[0]
    data, at = path.read_bytes(), 13
    while at < len(data) * 3 // 4:
        at += 11 + int.from_bytes(data[at + 1 : at + 4], "big") + 4
    sound = bytes([0x2F]) + bytes(200)  # MP3, nothing of it
    tag = bytes([8]) + len(sound).to_bytes(3, "big") + data[at + 4 : at + 8] + bytes(3) + sound
    path.write_bytes(data[:at] + tag + (len(sound) + 11).to_bytes(4, "big") + data[at:])
    video = ask(path, np.arange(0.0, 4.0, 0.25))
    assert np.array_equal(video.views[0], whole)
    assert video.remark is None


def test_of_a_picture_with_transparency_the_colours_are_shown(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    rgba = np.zeros((96, 128, 4), dtype=np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, 90
    path = tmp_path / "picture.avif"
    try:
        pillow.fromarray(rgba, "RGBA").save(path)
    except (KeyError, OSError, ValueError):
        pytest.skip("this Pillow writes no AVIF")
    data = path.read_bytes()
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"infe"]
    first, second = (data[at - 4 : at - 4 + struct.unpack_from(">I", data, at - 4)[0]] for at in starts)
    path.write_bytes(data.replace(first + second, second + first))  # some writers list the alpha plane first
    with av.open(str(path)) as container:
        assert [stream.codec_context.pix_fmt for stream in container.streams.video] == ["gray", "yuv420p"]
    assert np.abs(ask(path, [0.0]).views[0][0, 10, 10].astype(int) - (200, 0, 0)).max() < 6


def box(name, *parts):
    content = b"".join(parts)
    return struct.pack(">I4s", len(content) + 8, name) + content


def test_a_picture_made_of_tiles_is_refused_as_such(tmp_path):
    """Two tiles of HEVC side by side; FFmpeg gives each as a stream of its own."""
    options = {"x265-params": "log-level=none"}
    source = write_video(tmp_path / "tile.mp4", "libx265", count=3, height=64, width=64, options=options)
    data = source.read_bytes()
    at = data.find(b"hvcC") - 4
    decoder = data[at : at + struct.unpack_from(">I", data, at)[0]]
    with av.open(str(source)) as container:
        tile = bytes(next(container.demux(video=0)))

    def head(offset):
        grid = struct.pack(">4BHH", 0, 0, 0, 1, 128, 64)
        sizes = [box(b"ispe", struct.pack(">3I", 0, width, 64)) for width in (64, 128)]
        of_items = [struct.pack(">HBB", 1, 1, 3), *(struct.pack(">HBBB", item, 2, 0x81, 2) for item in (2, 3))]
        places = [
            struct.pack(">4HII", 1, 1, 0, 1, 0, len(grid)),
            struct.pack(">4HII", 2, 0, 0, 1, offset, len(tile)),
            struct.pack(">4HII", 3, 0, 0, 1, offset + len(tile), len(tile)),
        ]
        kinds = [(1, b"grid", 0), (2, b"hvc1", 1), (3, b"hvc1", 1)]
        items = [box(b"infe", struct.pack(">IHH4sB", 2 << 24 | hidden, one, 0, kind, 0)) for one, kind, hidden in kinds]
        return box(b"ftyp", b"heic\0\0\0\0mif1heic") + box(
            b"meta",
            struct.pack(">I", 0),
            box(b"hdlr", struct.pack(">II4s13x", 0, 0, b"pict")),
            box(b"pitm", struct.pack(">IH", 0, 1)),
            box(b"iinf", struct.pack(">IH", 0, 3), *items),
            box(b"iref", struct.pack(">I", 0), box(b"dimg", struct.pack(">4H", 1, 2, 2, 3))),
            box(b"iprp", box(b"ipco", decoder, *sizes), box(b"ipma", struct.pack(">II", 0, 3), *of_items)),
            box(b"iloc", struct.pack(">IBBH", 1 << 24, 0x44, 0, 3), *places),
            box(b"idat", grid),
        )

    path = tmp_path / "tiled.heic"
    path.write_bytes(head(len(head(0)) + 8) + box(b"mdat", tile, tile))
    error = failure(path)
    assert (error.kind, error.reason) == ("refused", "the picture is made of tiles, which are not put together")


def test_a_format_that_is_not_opened_is_named(tmp_path):
    (tmp_path / "video.y4m").write_bytes(b"YUV4MPEG2 W16 H16 F25:1 C420\nFRAME\n" + bytes(384))
    error = failure(tmp_path / "video.y4m")
    assert error.kind == "refused"
    assert "takes it for 'yuv4mpegpipe'" in error.reason
    assert "playlist" not in error.reason


@pytest.mark.parametrize(("ending", "codec"), [("h264", "libx264"), ("hevc", "libx265")])
def test_a_stream_without_times_goes_by_the_clock_that_is_given(tmp_path, ending, codec):
    options = {"x265-params": "log-level=none:keyint=24"} if codec == "libx265" else {"g": "24"}
    path = write_video(tmp_path / f"bare.{ending}", codec, options=options)
    assert "no usable timestamps" in failure(path).reason
    for clock_fps in (10.0, 30000 / 1001):
        times_s = (np.array([0, 1, 40, 95]) + 0.5) / clock_fps
        video = ask(path, times_s, clock_fps=clock_fps)
        assert numbers(video) == [0, 1, 40, 95]
        assert video.shown_s == pytest.approx(times_s - 0.5 / clock_fps, abs=1e-4)


def test_a_clock_changes_nothing_where_the_file_has_times(tmp_path):
    path = write_video(tmp_path / "video.mp4", options=GOP_24, ticks=list(range(0, 192, 2)), time_base=Fraction(1, 24))
    for clock_fps in (None, 10.0):
        assert numbers(ask(path, [(40 * 2 + 0.5) / RATE_FPS], clock_fps=clock_fps)) == [40]


def test_damage_is_placed_by_the_last_whole_frame_counted_from_the_first(tmp_path):
    """Not by a number from the damaged frame itself, nor by the file's own time, which may begin anywhere."""
    path = write_video(tmp_path / "late.ts", options=GOP_24, shift_ticks=1000 * RATE_FPS)
    data = bytearray(path.read_bytes())
    at = len(data) * 3 // 4 // 188 * 188 + 60
    data[at : at + 100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(DecodeError) as caught:
        ask(path, np.arange(0.0, 3.9, 0.25), damaged="refuse")
    place = re.search(r"damaged at about (\d\.\d{3}) s: ", caught.value.reason)
    assert 2.5 < float(place[1]) < 3.0
