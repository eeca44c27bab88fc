"""Lengths from headers: right ones, files that are none, and a reader that hangs or dies."""

import os
from pathlib import Path

import pytest

from stages.video_lengths import read_lengths
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


def test_a_file_that_takes_too_long_costs_its_deadline_and_no_more(tmp_path):
    """A header can make the reader work for ever; a stopped reader stands for one here."""
    good = write_video(tmp_path / "good.mp4", count=24, height=32, width=48)
    files = {"first": good, "second": good, "third": good}
    lengths = read_lengths(files, deadline_s=5.0)
    assert isinstance(next(lengths)[1], float)
    (reader,) = children()
    os.kill(reader, 19)  # SIGSTOP
    assert next(lengths) == ("second", "reading its header took too long")
    assert isinstance(next(lengths)[1], float)
    lengths.close()
    assert reader not in children()


def test_a_reader_that_dies_costs_one_file(tmp_path):
    good = write_video(tmp_path / "good.mp4", count=24, height=32, width=48)
    lengths = read_lengths({"first": good, "second": good, "third": good})
    next(lengths)
    (reader,) = children()
    os.kill(reader, 9)
    assert next(lengths) == ("second", "its header ended the program that read it")
    assert isinstance(next(lengths)[1], float)
    lengths.close()
    assert children() == []


def children() -> list[int]:
    """Processes of this one that read lengths."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, IndexError, ValueError):
            continue
        if parent == os.getpid() and b"stages.video_lengths" in command:
            found.append(int(entry.name))
    return found
