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
_COLUMNS = {**{name: name for name in HEADER}, "videoid": "video", "duration": "duration_s"}


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
    rows = csv.DictReader(read_text(path).splitlines())
    header = rows.fieldnames or []
    rows.fieldnames = [_COLUMNS.get(name.strip().lower(), name) for name in header]
    if not {"video", "duration_s"} <= {*rows.fieldnames}:
        allowed = "video,duration_s or videoid,duration"
        raise UserError("the first line must name the columns", where=f"{path}:1", received=header, allowed=allowed)
    found: dict[str, Length] = {}
    for row in rows:
        where = f"{path}:{rows.line_num}"
        if None in (row["video"], row["duration_s"], row.get("num_frames", "")):
            line = ",".join(value for value in row.values() if value is not None)
            raise UserError("the line has too few columns", where=where, received=line)
        if row["video"] in found:
            raise UserError(f"video {row['video']!r} appears twice", where=where)
        found[row["video"]] = _length(row["duration_s"], row.get("num_frames", "").strip(), where)
    return found


def _length(seconds: str, text: str, where: str) -> Length:
    try:
        duration_s = float(seconds)
    except ValueError:
        duration_s = math.nan
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise UserError("a duration must be a number of seconds above 0", where=where, received=seconds)
    if text and not (text.isdecimal() and int(text) > 0):
        raise UserError("num_frames must be a whole number above 0", where=where, received=text)
    return Length(duration_s, int(text) if text else None)
