"""Files and times that cannot be predicted from."""

import re

import pytest

from tests.video_files import write_video


def test_predicting_a_file_that_is_not_there(made, refused):
    assert refused("predict", "/nowhere/v.mp4", "--question", "where?", "--run", made.run) == (
        "/nowhere/v.mp4: cannot be decoded (missing): no such file: /nowhere/v.mp4"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("notes.mp4", "(unreadable): Invalid data found when processing input"),
        ("notes.txt", "(refused): FFmpeg takes it for 'tty', which is not opened here"),
    ],
)
def test_predicting_a_text_file(made, refused, tmp_path, name, reason):
    (tmp_path / name).write_text("no video at all\n" * 100)
    said = refused("predict", tmp_path / name, "--question", "where?", "--run", made.run)
    assert said.startswith(f"{tmp_path / name}: cannot be decoded {reason}")


def test_predicting_a_damaged_file(made, refused, tmp_path):
    """A stream that the header does not name once ended the command in a traceback."""
    path = write_video(tmp_path / "damaged.flv", options={"g": "24"})
    data = bytearray(path.read_bytes())
    first = 13 + 11 + int.from_bytes(data[14:17], "big") + 4  # after the tag of metadata
    data[first] = 8  # sound, and too long
    data[first + 1] ^= 1
    path.write_bytes(data)
    said = refused("predict", path, "--question", "where?", "--run", made.run)
    assert said.startswith(f"{path}: cannot be decoded (unreadable): ")


@pytest.mark.parametrize(("start", "shown"), [("99", "99.0"), ("-1", "-1.0"), ("nan", "nan")])
def test_predicting_beyond_the_video(made, refused, start, shown):
    video = made.videos / "test_0000.mp4"
    said = refused("predict", video, "--question", "where?", "--run", made.run, f"--start={start}")
    assert re.fullmatch(
        rf"--start: the window begins outside the video; got {re.escape(shown)}; allowed: 0 to \d+\.\d\d", said
    )
