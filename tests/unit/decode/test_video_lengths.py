"""Lengths from headers: right ones, files that are none, and a child that hangs or dies."""

import os

import pytest

from stages.decode import DecodeChild, DecodeError, LengthRequest
from stages.decode.lengths import read_lengths
from tests.video_files import RATE_FPS, write_video


def test_lengths_of_good_files_and_reasons_for_bad_ones(tmp_path):
    files = {
        "good": write_video(tmp_path / "good.mp4", count=48, height=32, width=48),
        "mkv": write_video(tmp_path / "b.mkv", count=36, height=32, width=48),
        "gone": tmp_path / "gone.mp4",
        "empty": tmp_path / "empty.mp4",
        "text": tmp_path / "text.mp4",
        "again": tmp_path / "good.mp4",
    }
    files["empty"].touch()
    files["text"].write_text("no video\n" * 100)
    found = dict(read_lengths(files))
    assert found["good"] == found["again"] == pytest.approx(48 / RATE_FPS, abs=0.05)
    assert found["mkv"] == pytest.approx(36 / RATE_FPS, abs=0.05)
    assert found["gone"].startswith("no such file")
    assert "0 bytes" in found["empty"]
    assert isinstance(found["text"], str)


@pytest.fixture
def children(monkeypatch):
    """The decode children that are made."""
    made = []
    monkeypatch.setattr("stages.decode.lengths.DecodeChild", lambda: made.append(DecodeChild()) or made[-1])
    return made


def test_a_file_that_takes_too_long_costs_its_deadline_and_no_more(tmp_path, children):
    """A header can make the child work for ever; a stopped child stands for one here."""
    good = write_video(tmp_path / "good.mp4", count=24, height=32, width=48)
    lengths = read_lengths({"first": good, "second": good, "third": good}, deadline_s=5.0)
    assert isinstance(next(lengths)[1], float)
    os.kill(children[0].pid, 19)  # SIGSTOP
    assert next(lengths) == ("second", "reading its length took longer than 5 s; the child was ended")
    assert isinstance(next(lengths)[1], float)
    lengths.close()
    assert children[0].pid is None


def test_a_child_that_dies_costs_no_file_or_one(tmp_path, children):
    good = write_video(tmp_path / "good.mp4", count=24, height=32, width=48)
    lengths = read_lengths({"first": good, "second": good, "third": good})
    next(lengths)
    os.kill(children[0].pid, 9)
    answer = next(lengths)[1]
    assert isinstance(answer, float) or "SIGKILL" in answer or "signal 9" in answer
    assert isinstance(next(lengths)[1], float)


def test_a_length_counts_frames_also_where_packets_carry_no_times_and_up_to_damage(tmp_path):
    avi = write_video(tmp_path / "a.avi", "mpeg4", count=48, max_b_frames=2)
    raw = write_video(tmp_path / "b.h264", count=48)
    cut = write_video(tmp_path / "c.avi", "mpeg4", count=48)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 7 // 8])
    with DecodeChild() as child:
        assert child.length(LengthRequest(avi), 20.0).seconds == pytest.approx(2.0, abs=0.05)
        assert child.length(LengthRequest(raw, clock_fps=12.0), 20.0).seconds == pytest.approx(4.0)
        with pytest.raises(DecodeError, match="no usable timestamps"):
            child.length(LengthRequest(raw), 20.0)
        whole_part = child.length(LengthRequest(cut), 20.0)
        assert 1.0 < whole_part.seconds < 1.6
        assert whole_part.remark.startswith("damaged from about 1.")
        with pytest.raises(DecodeError):
            child.length(LengthRequest(cut, damaged="refuse"), 20.0)
