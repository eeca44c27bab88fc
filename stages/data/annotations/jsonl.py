"""JSON Lines: a user's own data set, one question a line."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, FiniteFloat

from stages.data.annotations.questions import Question, Source
from stages.data.manifest import Record, Split
from stages.errors import UserError
from stages.ids import check_id
from stages.records import nearest_hint, parse_record, read_json_lines

_PLAIN_ID = "give the video a plain id under 'video', and its file's name, which may be any, under 'path'"


class _Line(Record):
    video: str
    path: str | None = None
    duration_s: FiniteFloat = Field(gt=0)
    start_s: FiniteFloat = Field(default=0.0, ge=0)
    end_s: FiniteFloat | None = None
    task: str
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answer_type: str | None = None
    split: Split


def questions(source: Source, path: Path) -> Iterator[Question]:
    """Yield one question per line of the file."""
    tasks = source.card.tasks
    for where, entry in read_json_lines(path):
        line = parse_record(_Line, entry, where)
        if line.task not in tasks:
            hint = nearest_hint(line.task, tasks)
            raise UserError("unknown task", where=where, received=line.task, allowed=", ".join(tasks), hint=hint)
        end_s = line.duration_s if line.end_s is None else line.end_s
        if not line.start_s < end_s <= line.duration_s:
            raise UserError(
                "start_s and end_s are not in the video",
                where=where,
                received=f"{line.start_s} and {end_s}",
                allowed=f"0 <= start_s < end_s <= duration_s = {line.duration_s}",
            )
        check_id(line.video, kind="video id", where=where, hint=_PLAIN_ID)
        source.add_video(line.video, line.duration_s, where, line.path)
        yield Question(
            stem=f"{line.video}_line{where.rpartition(':')[2]}",
            video=line.video,
            task=line.task,
            text=line.question,
            answer=line.answer,
            split=line.split,
            start_s=line.start_s,
            end_s=end_s,
            indexed_frames=source.card.frame_rule.indexed_frames(line.duration_s),
            where=where,
            answer_type=line.answer_type,
        )
