"""The original LVU v1.0: <task>/<split>.csv, one video a line, separated by spaces, and a table of durations beside."""

from collections.abc import Iterator
from pathlib import Path

from stages.data.annotations.lengths import read_length_table
from stages.data.annotations.questions import Question, Source
from stages.data.card_schema import AnnotationFiles
from stages.data.manifest import Split
from stages.errors import UserError
from stages.records import read_text

_HEADER = ["class_id", "class_name", "youtube_id", "imdb_id"]
_HINT = "the release has none; take lvu_durations.csv from data/lvu_1.0 of github.com/md-mohaiminul/ViS4mer"
NO_DURATION = "the table of durations does not have it"


def questions(source: Source, form: AnnotationFiles, folder: Path, split: Split) -> Iterator[Question]:
    """Yield one question per line. The card's `labels` turn class names into labels.

    The release counts no frames, so a window is never cut by their number (in MA-LMM's files one window is). A video
    without a duration, as clips have that went offline before durations were collected, is left out.
    """
    lengths = read_length_table(folder, form.durations, hint=_HINT)
    for task, card in source.card.tasks.items():
        (name,) = form.files_of(split, [task])
        if not (folder / name).exists():
            continue
        labels = form.labels.get(task, {})
        for where, class_name, video_id in _rows(folder / name):
            length = lengths.get(video_id)
            if length is None:
                source.leave_out(video_id, NO_DURATION)
                continue
            source.add_video(video_id, length.duration_s, where)
            yield Question(
                stem=video_id,
                video=video_id,
                task=task,
                text=card.prompt,
                answer=labels.get(class_name, class_name),
                split=split,
                start_s=0.0,
                end_s=length.duration_s,
                # One more than the duration holds: MA-LMM's last index of a short video is the duration itself.
                indexed_frames=length.num_frames or source.card.frame_rule.indexed_frames(length.duration_s) + 1,
                where=where,
            )


def _rows(path: Path) -> Iterator[tuple[str, str, str]]:
    lines = read_text(path).splitlines()
    header = lines[0].split() if lines else []
    if header != _HEADER:
        allowed = " ".join(_HEADER)
        raise UserError("the first line must name the columns", where=f"{path}:1", received=header, allowed=allowed)
    for number, line in enumerate(lines[1:], start=2):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}:{number}"
        if len(fields) != len(_HEADER):
            raise UserError(
                f"a line has {len(_HEADER)} columns, separated by spaces: {' '.join(_HEADER)}",
                where=where,
                received=line,
            )
        yield where, fields[1], fields[2]
