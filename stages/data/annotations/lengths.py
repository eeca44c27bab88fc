"""How long videos are, for annotations without it: a table with a line per video beside them."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stages.errors import UserError
from stages.records import read_text

HEADER = ("video", "duration_s", "num_frames")
"""The columns as this project writes them; `videoid,duration` of LVU's lvu_durations.csv is read as well."""
_VIDEO, _DURATION, _FRAMES = ("video", "videoid"), ("duration_s", "duration"), ("num_frames",)


@dataclass(frozen=True)
class Length:
    """A video's length; `num_frames` counts frames at the card's `index_fps`, None if the table does not have it."""

    duration_s: float
    num_frames: int | None


def read_length_table(folder: Path, names: Sequence[str], *, hint: str) -> dict[str, Length]:
    """Return the lengths by video id from the first of the tables `names` that is in `folder`.

    The table is comma-separated with a header: `video` or `videoid`, `duration_s` or `duration` in seconds, and, if
    known, `num_frames`.

    Raises:
        UserError: there is no such table (`hint`: how to get one), or a line of it is broken; file and line.
    """
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        places = " or ".join(str(folder / name) for name in names)
        raise UserError("file not found, so it is not known how long the videos are", where=places, hint=hint)
    rows = csv.reader(read_text(path).splitlines())
    columns = _columns(next(rows, []), path)
    found: dict[str, Length] = {}
    for row in rows:
        where = f"{path}:{rows.line_num}"
        if not row:
            continue
        if len(row) <= max(at for at in columns if at is not None):
            raise UserError("the line has too few columns", where=where, received=",".join(row))
        video, length = row[columns[0]], _length(row, columns, where)
        if video in found:
            raise UserError(f"video {video!r} appears twice", where=where)
        found[video] = length
    return found


def _columns(header: list[str], path: Path) -> tuple[int, int, int | None]:
    names = [name.strip().lower() for name in header]

    def find(known: Sequence[str]) -> int | None:
        return next((names.index(name) for name in known if name in names), None)

    video, duration = find(_VIDEO), find(_DURATION)
    if video is None or duration is None:
        allowed = f"{HEADER[0]},{HEADER[1]} or {_VIDEO[1]},{_DURATION[1]}"
        raise UserError("the first line must name the columns", where=f"{path}:1", received=header, allowed=allowed)
    return video, duration, find(_FRAMES)


def _length(row: list[str], columns: tuple[int, int, int | None], where: str) -> Length:
    _, at, frames_at = columns
    try:
        duration_s = float(row[at])
    except ValueError:
        duration_s = math.nan
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise UserError("a duration must be a number of seconds above 0", where=where, received=row[at])
    text = "" if frames_at is None else row[frames_at].strip()
    if text and not (text.isdecimal() and int(text) > 0):
        raise UserError("num_frames must be a whole number above 0", where=where, received=text)
    return Length(duration_s, int(text) if text else None)
