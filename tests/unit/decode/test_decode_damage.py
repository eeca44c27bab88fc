"""Damaged containers: the picture asked for or a refusal, what lies before the damage, and whole files untouched."""

import re

import av
import numpy as np
import pytest

from stages.decode import DecodeError, FrameRequest
from stages.decode.reader import decode
from tests.damaged_videos import COUNT, SOURCES, Source, ask_damaged, damage, pictures_at
from tests.video_files import RATE_FPS, picture_number

# One damage of each kind, of those that FFmpeg passes over or that once gave wrong pictures.
QUICK = {
    "xvid": (11, 30, 37, 38),
    "xvid, B-frames": (17, 44),
    "mjpeg": (5, 36, 57),
    "mkv": (34, 69),
    "ts": (1, 11, 75),
    "flv": (21, 23, 36),
    "mp4": (6, 31),
    "wmv": (11, 27, 75),
    "vp9": (6, 37),
}
EVERY_THIRD = list(range(0, COUNT, 3))
ALONE = (3, 60, 120, 180)

# Of so many damages to pictures alone, which their codec's bits do not show, some pictures are spoilt, not moved:
# VP9 and H.264 carry no checksums. Containers with checksums and codecs with marks show them all or nearly.
SPOILT_FILES = {"vp9": 16, "ts": 4, "flv": 6, "mp4": 8, "wmv": 2, "mjpeg": 1, "xvid, B-frames": 1}


@pytest.fixture(scope="module", params=SOURCES)
def source(request, tmp_path_factory):
    """Each format: its name, a whole file, and all of its pictures."""
    path = SOURCES[request.param].write(tmp_path_factory.mktemp("whole") / "video")
    return request.param, path, pictures_at(path, list(range(COUNT)))


def spoilt_by(seeds, source, folder):
    """Damage the file by each seed: how many files show a picture that is none of the video's; none shows another."""
    _, path, whole = source
    spoilt = 0
    for seed in seeds:
        data, how = damage(path.read_bytes(), seed)
        damaged = folder / f"damaged{path.suffix}"
        damaged.write_bytes(data)
        answers = [ask_damaged(damaged, EVERY_THIRD, whole), *(ask_damaged(damaged, [one], whole) for one in ALONE)]
        assert [one.moved for one in answers] == [[]] * len(answers), f"seed {seed}: {how}"
        spoilt += any(one.spoilt for one in answers)
    return spoilt


def test_a_whole_file_shows_every_picture_at_once_or_one_by_one(source):
    _, path, whole = source
    assert [picture_number(picture) for picture in whole] == list(range(COUNT))
    for number in (0, 1, *ALONE, COUNT - 1):
        assert np.array_equal(pictures_at(path, [number])[0], whole[number])


def test_damage_that_ffmpeg_passes_over_moves_no_picture(source, tmp_path):
    assert spoilt_by(QUICK[source[0]], source, tmp_path) == 0


@pytest.mark.slow
def test_no_random_damage_moves_a_picture(source, tmp_path):
    assert spoilt_by(range(80), source, tmp_path) <= SPOILT_FILES.get(source[0], 0)


def test_frames_before_the_damage_are_given_with_a_remark_and_later_ones_are_refused_from_a_time_on(source, tmp_path):
    name, path, whole = source
    data = bytearray(path.read_bytes())
    at = len(data) * 4 // 5
    data[at : at + 1500] = bytes(1500)
    damaged = tmp_path / path.name
    damaged.write_bytes(data)
    with pytest.raises(DecodeError, match="damaged") as caught:
        pictures_at(damaged, EVERY_THIRD)
    assert caught.value.kind == "unreadable"
    before_s = caught.value.whole_before_s
    assert before_s > 4.0
    proved = [number for number in range(COUNT) if (number + 0.5) / RATE_FPS < before_s]
    assert np.array_equal(pictures_at(damaged, proved), whole[: len(proved)])
    video = decode(FrameRequest(damaged, np.array([0.0, before_s - 0.001]), ((8, 8),), "pyav", 0.1))
    if name != "mp4":  # where the container is whole, nothing is known of pictures that nobody asked for
        assert re.fullmatch(rf"damaged from about {before_s:.2f} s on: .+", video.remark)
        with pytest.raises(DecodeError) as caught:
            pictures_at(damaged, [0], damaged="refuse")
        assert caught.value.whole_before_s is None


def test_a_file_whose_header_is_damaged_gives_nothing(tmp_path):
    path = SOURCES["xvid"].write(tmp_path / "video")
    data = path.read_bytes()
    at = data.find(b"movi")
    path.write_bytes(data[:at] + bytes(8) + data[at + 8 :])
    with pytest.raises(DecodeError) as caught:
        pictures_at(path, [0])
    assert caught.value.whole_before_s is None


def test_chunks_lost_without_a_trace_but_the_index_are_missed_from_there_on(tmp_path):
    """Whole chunks are left out, so that every length still leads to the next chunk."""
    path = SOURCES["xvid"].write(tmp_path / "video")
    whole, data = pictures_at(path, list(range(COUNT))), path.read_bytes()
    starts = [at for at in range(len(data)) if data[at : at + 4] == b"00dc"][:COUNT]
    path.write_bytes(data[: starts[100]] + data[starts[112] :])
    with pytest.raises(DecodeError, match="200 frames in the index, 188 in the file") as caught:
        pictures_at(path, [150])
    assert 97 / RATE_FPS - 0.001 <= caught.value.whole_before_s <= 100 / RATE_FPS
    assert np.array_equal(pictures_at(path, [90])[0], whole[90])


def test_blocks_lost_without_a_trace_but_their_clusters_length_prove_nothing_of_the_cluster(tmp_path):
    path = SOURCES["vp9"].write(tmp_path / "video")
    whole, data = pictures_at(path, list(range(COUNT))), path.read_bytes()
    with av.open(str(path)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path.write_bytes(data[: ends[150]] + data[ends[162] :])
    with pytest.raises(DecodeError, match="damaged") as caught:
        pictures_at(path, [155])
    assert caught.value.whole_before_s <= 150 / RATE_FPS
    shown = [number for number in range(150) if (number + 0.5) / RATE_FPS < caught.value.whole_before_s]
    assert np.array_equal(pictures_at(path, shown), whole[: len(shown)])


def test_an_index_or_a_count_that_is_off_by_a_few_is_no_damage(tmp_path):
    path = SOURCES["xvid"].write(tmp_path / "video")
    whole, data = pictures_at(path, [150]), bytearray(path.read_bytes())
    for name, place in (("avih", 24), ("strh", 40)):
        at = data.find(name.encode()) + place
        data[at : at + 4] = (COUNT + 3).to_bytes(4, "little")
    path.write_bytes(data)
    assert np.array_equal(pictures_at(path, [150]), whole)
    index_at = data.find(b"idx1")
    for end in (index_at + 100, index_at):  # a cut index, and none
        path.write_bytes(data[:end])
        assert np.array_equal(pictures_at(path, [150]), whole)
    data[index_at + 4 : index_at + 8] = b"\xf0\xff\xff\xff"
    path.write_bytes(data)
    assert np.array_equal(pictures_at(path, [150], damaged="refuse"), whole)


@pytest.mark.parametrize("name", ["mkv", "ts", "flv", "mp4", "wmv"])
def test_a_legal_gap_in_time_and_a_variable_rate_are_no_damage(tmp_path, name):
    source = SOURCES[name]
    steps = np.ones(COUNT, dtype=int)
    steps[[40, 120]] = 50, 7
    jittered = np.tile([1, 2, 1, 5, 3], COUNT // 5)
    for ticks in (np.cumsum(steps), np.cumsum(jittered)):
        ticks = [int(tick) for tick in ticks - ticks[0]]
        arguments = {**source.arguments, "ticks": ticks}
        path = Source(source.ending, source.codec, arguments).write(tmp_path / "video")
        times_s = (np.array(ticks) + 0.5) / RATE_FPS
        shown = decode(FrameRequest(path, times_s, ((48, 64),), "pyav", 0.1))
        assert [picture_number(picture) for picture in shown.views[0]] == list(range(COUNT))
        assert shown.remark is None


@pytest.mark.parametrize("name", ["wmv", "xvid"])
def test_false_key_frames_give_no_other_picture(tmp_path, name):
    source = SOURCES[name]
    path = Source(source.ending, source.codec, {**source.arguments, "mark_key_every": 1}).write(tmp_path / "video")
    whole = pictures_at(path, list(range(COUNT)))
    for number in (0, 13, 26, 39, 150):
        assert np.array_equal(pictures_at(path, [number])[0], whole[number])
        assert picture_number(whole[number]) == number


def test_times_of_decoding_are_seen_as_such_whatever_is_asked_for(tmp_path):
    """As a stream copied from AVI into mp4 has them: the packets of reordered pictures ascend in time."""
    source = SOURCES["xvid, B-frames"]
    whole = pictures_at(source.write(tmp_path / "whole"), list(range(COUNT)))
    arguments = {**source.arguments, "times_of_decoding": True, "shift_ticks": 1}
    path = Source("mp4", source.codec, arguments).write(tmp_path / "video")
    assert [picture_number(picture) for picture in pictures_at(path, list(range(COUNT - 2)))] == list(range(COUNT - 2))
    for number in (1, 2, 3, 60, 61, 62, 150):
        assert np.array_equal(pictures_at(path, [number])[0], whole[number])
