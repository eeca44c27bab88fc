"""The PyAV reader: the frame shown at a time, equal in every byte to plain sequential decoding, or a true reason."""

import re
import shutil
import socket
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest

from stages.decode import DecodeError, FrameRequest
from stages.decode.pyav_reader import decode_runs, needed_runs
from stages.decode.reader import decode
from stages.decode.video_file import ffmpeg_messages, list_packets
from stages.errors import UserError
from tests.video_files import RATE_FPS, read_plainly, turned_copy, write_video
from tests.video_kinds import GOP_24, KINDS


def ask(path, times_s, size_px=(8, 8), tolerance_s=0.1, **more):
    return decode(FrameRequest(path, np.array(times_s, dtype=np.float64), (size_px,), "pyav", tolerance_s, **more))


def failure(path, times_s=(0.0,), **kwargs):
    with pytest.raises(DecodeError) as caught:
        ask(path, times_s, **kwargs)
    return caught.value


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make each kind of file once."""
    folder = tmp_path_factory.mktemp("videos")
    return cache(lambda name: KINDS[name].write(folder / str(list(KINDS).index(name))))


@pytest.mark.parametrize(
    ("name", "has_unneeded_pictures"),
    [
        ("h264, GOP 24", True),
        ("hevc, open GOP", True),
        ("mpeg2 in MPEG-TS", True),
        ("vp9", False),
        ("av1", False),
    ],
)
def test_few_pictures_are_decoded_for_few_wanted_frames(files, name, has_unneeded_pictures):
    path = files(name)
    with ffmpeg_messages() as messages:
        packets = list_packets(path, messages)
        wanted = frozenset(int(tick) for tick in np.sort(packets.ticks)[[53, 75]])
        runs = needed_runs(packets, wanted)
        decoded = {frame.pts for frame in decode_runs(path, runs, wanted)}
    in_runs = sum(last - first + 1 for first, last in runs)
    assert wanted <= decoded
    assert in_runs <= len(packets.ticks) // 2
    assert len(decoded) < in_runs or not has_unneeded_pictures


def test_an_edit_list_hides_frames_and_moves_time_zero(files):
    shown_s, frames = read_plainly(files("h264, edit list"))
    whole_s, whole = read_plainly(files("h264, GOP 24"))
    hidden = len(whole) - len(frames)
    assert hidden > 24
    video = ask(files("h264, edit list"), [0.0], size_px=whole[0].shape[:2])
    assert np.array_equal(video.views[0][0], whole[hidden])
    assert shown_s[-1] == pytest.approx(whole_s[-1] - whole_s[hidden])


def test_an_edit_list_that_stops_early_ends_the_video_there(files, tmp_path):
    data = bytearray(files("h264, GOP 24").read_bytes())
    offset = data.find(b"elst") + 12
    (duration,) = struct.unpack_from(">I", data, offset)
    struct.pack_into(">I", data, offset, duration // 2)
    (tmp_path / "half.mp4").write_bytes(data)
    assert ask(tmp_path / "half.mp4", [1.9]).shown_s == pytest.approx([45 / RATE_FPS])
    assert "ends at 2.000 s" in failure(tmp_path / "half.mp4", [2.2]).reason


def test_all_views_come_from_one_decoding_and_rows_follow_the_request(files):
    path = files("h264, GOP 24")
    request = FrameRequest(path, np.array([0.5, 0.5, 2.0]), ((32, 32), (50, 20)), "pyav", 0.0)
    video = decode(request)
    assert [view.shape for view in video.views] == [(3, 32, 32, 3), (3, 50, 20, 3)]
    assert np.array_equal(video.views[0][0], video.views[0][1])
    assert not np.array_equal(video.views[0][1], video.views[0][2])
    assert video.shown_s.tolist() == [0.5, 0.5, 2.0]


def test_a_picture_turned_by_an_odd_angle_is_refused(files, tmp_path):
    path = turned_copy(files("h264, GOP 24"), tmp_path / "turned.mp4", (1, 1, -1, 1))
    error = failure(path)
    assert error.kind == "refused"
    assert "45 degrees" in error.reason


def test_a_time_outside_the_video_within_the_tolerance_gets_the_nearest_frame(files):
    path = files("h264, GOP 24")
    end_s = 96 / RATE_FPS
    assert failure(path, [1.0, end_s + 0.3], tolerance_s=0.25).kind == "out_of_range"
    assert failure(path, [-0.3, 1.0], tolerance_s=0.25).kind == "out_of_range"
    near = ask(path, [-0.2, end_s + 0.2], tolerance_s=0.25)
    assert near.shown_s == pytest.approx([0.0, end_s - 1 / RATE_FPS])


def test_files_that_are_no_video_fail_for_their_true_reason(tmp_path, files):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video at all\n" * 50)
    (tmp_path / "random.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    whole = files("h264, GOP 24").read_bytes()
    (tmp_path / "headless.mp4").write_bytes(whole[: whole.rfind(b"moov") - 4])
    write_sound(tmp_path / "sound.wav")
    expected = {
        "absent.mp4": ("missing", "no such file"),
        ".": ("refused", "not a regular file"),
        "empty.mp4": ("unreadable", "0 bytes"),
        "text.mp4": ("unreadable", "Invalid data"),
        "random.mp4": ("unreadable", "Invalid data"),
        "headless.mp4": ("unreadable", "moov atom not found"),
        "sound.wav": ("unreadable", "audio only"),
    }
    for name, (kind, words) in expected.items():
        error = failure(tmp_path / name)
        assert (error.kind, words in error.reason) == (kind, True), f"{name}: {error.kind}: {error.reason}"
        assert "\n" not in error.reason


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
SESSION = "v=0\no=- 0 0 IN IP4 {host}\ns=x\nc=IN IP4 {host}\nt=0 0\nm=video {port} RTP/AVP 96\n"
MANIFEST = """<?xml version="1.0"?>
<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT9S"><Period><AdaptationSet>
<Representation id="1" bandwidth="1" mimeType="video/mp4"><BaseURL>{target}</BaseURL></Representation>
</AdaptationSet></Period></MPD>"""


@pytest.mark.parametrize("decoder", ["pyav", "decord", "torchcodec"])
@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("list.m3u8", PLAYLIST, "refused"),
        ("list.mp4", PLAYLIST, "unreadable"),  # FFmpeg before 7 would go by the content and open it
        ("list.ffconcat", "ffconcat version 1.0\nfile '{target}'\n", "refused"),
        ("call.sdp", SESSION, "refused"),
        ("list.mpd", MANIFEST, "unreadable"),
    ],
)
@pytest.mark.parametrize("target", ["inner.ts", "http://{host}:{port}/inner.ts"])
def test_a_file_that_names_other_files_or_addresses_is_refused_and_nothing_is_opened(
    tmp_path, files, name, text, kind, target, decoder
):
    if decoder != "pyav":
        pytest.importorskip(decoder)
    shutil.copy(files("h264, MPEG-TS"), tmp_path / "inner.ts")
    with socket.create_server(("127.0.0.1", 0)) as server:
        host, port = server.getsockname()
        target = target.format(host=host, port=port)
        (tmp_path / name).write_text(text.format(target=target, host=host, port=port))
        with pytest.raises(DecodeError) as caught:
            decode(FrameRequest(tmp_path / name, np.zeros(1), ((8, 8),), decoder, 0.1))
        assert caught.value.kind == kind
        server.settimeout(0.0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_name_that_looks_like_an_address_is_a_file(tmp_path, files):
    odd = tmp_path / "http:" / "clip%03d?.mp4"
    odd.parent.mkdir()
    shutil.copy(files("h264, GOP 24"), odd)
    assert ask(odd, [1.0]).shown_s.tolist() == [1.0]


@pytest.mark.parametrize("ending", ["mkv", "flv", "mp4"])
def test_a_file_cut_short_is_unreadable_though_its_beginning_decodes(tmp_path, ending):
    path = tmp_path / f"whole.{ending}"
    write_video(path, options=GOP_24)
    if ending == "mp4":
        path = with_index_in_front(path, tmp_path / "front.mp4")
    assert ask(path, [3.0]).shown_s.tolist() == [3.0]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    error = failure(path, [0.0], damaged="refuse")
    assert error.kind == "unreadable"
    assert re.search(r"truncated: .* 2\.\d\d s of the 4\.\d\d s", error.reason)
    assert error.whole_before_s is None
    error = failure(path, [0.0, 3.0])
    assert re.search(r"truncated: .* 2\.\d\d s of the 4\.\d\d s", error.reason)
    assert error.whole_before_s > (0.3 if ending == "mkv" else 1.5)  # a cluster of Matroska is proved as a whole
    near_s = error.whole_before_s - 0.001
    assert "truncated" in ask(path, [0.0, near_s]).remark


def with_index_in_front(source, target):
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return target


@pytest.mark.parametrize("ending", ["mkv", "flv"])  # the first declares each stream's duration, the second only one
def test_sound_that_outlasts_the_pictures_is_no_truncation(tmp_path, ending):
    path = tmp_path / f"long_sound.{ending}"
    source = write_video(tmp_path / "silent.mp4", options=GOP_24)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        sound = new.add_stream("aac", rate=44_100)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 441_000), dtype=np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 44_100, 0
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        for packet in packets:
            packet.stream = stream
        for packet in (*packets, *sound.encode(silence), *sound.encode(None)):
            new.mux(packet)
    with av.open(str(path)) as container:
        assert container.duration > 9 * av.time_base
    assert ask(path, [3.0]).shown_s == pytest.approx([3.0], abs=0.001)


@pytest.mark.parametrize("ending", ["mkv", "mp4", "ts"])
def test_time_zero_is_the_first_frame_and_a_late_start_is_no_truncation(tmp_path, ending):
    path = write_video(tmp_path / f"late.{ending}", options=GOP_24, shift_ticks=30 * RATE_FPS)
    _, frames = read_plainly(path)
    video = ask(path, [0.0, 1.0], size_px=frames[0].shape[:2])
    assert np.array_equal(video.views[0], np.stack([frames[0], frames[RATE_FPS]]))
    assert video.shown_s == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("filler", ["zeros", "noise"])
def test_a_damaged_file_never_gives_a_wrong_frame(tmp_path, ending, filler):
    codec, options = ("mpeg4", {"g": "24"}) if ending == "avi" else ("libx264", GOP_24)
    path = write_video(tmp_path / f"video.{ending}", codec, options=options)
    shown_s, frames = read_plainly(path)
    size_px = frames[0].shape[:2]
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, 2000
    data[middle : middle + length] = bytes(length) if filler == "zeros" else np.random.default_rng(0).bytes(length)
    path.write_bytes(data)
    assert failure(path, shown_s, size_px=size_px).kind in ("unreadable", "out_of_range")
    for index in range(0, len(frames) // 3, 8):  # long before the damage
        with suppress(DecodeError):
            assert np.array_equal(ask(path, [shown_s[index]], size_px=size_px).views[0][0], frames[index])


def test_a_stream_without_any_timestamps_is_unreadable(tmp_path):
    error = failure(write_video(tmp_path / "bare.h264", options=GOP_24))
    assert error.kind == "unreadable"
    assert "timestamps" in error.reason


def test_an_absurd_picture_size_is_refused_before_decoding(tmp_path, files):
    data = bytearray(files("gif").read_bytes())
    struct.pack_into("<H", data, 6, 17_000)
    (tmp_path / "wide.gif").write_bytes(data)
    error = failure(tmp_path / "wide.gif")
    assert error.kind == "refused"
    assert "17000 x 96" in error.reason


def test_an_unknown_decoder_is_the_users_mistake():
    with pytest.raises(UserError, match="pyav, decord, torchcodec"):
        FrameRequest(Path("x.mp4"), np.zeros(1), ((8, 8),), "opencv", 0.0)
