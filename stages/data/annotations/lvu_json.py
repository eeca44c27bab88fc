"""MA-LMM's LVU form: {video id: {subset, duration, num_frames, <task>: label, <task>_answer: "(a)"}}."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field, FiniteFloat

from stages.data.annotations.questions import Question, Source
from stages.data.card_schema import AnnotationFiles
from stages.data.manifest import Record, Split
from stages.errors import UserError
from stages.records import nearest_hint, parse_record, read_json_entries


class _Clip(Record):
    subset: str
    duration: FiniteFloat = Field(gt=0)
    num_frames: int = Field(ge=1)


def questions(source: Source, form: AnnotationFiles, folder: Path, split: Split) -> Iterator[Question]:
    """Yield one question per video and task that it is labelled for."""
    tasks = source.card.tasks
    allowed = {*_Clip.model_fields, *tasks, *(f"{task}_answer" for task in tasks)}
    for place, video_id, fields in read_json_entries(folder / form.files[split]):
        where = f"{place}, video {video_id!r}"
        if not isinstance(fields, dict):
            raise UserError("must be an object of keys and values", where=where, received=fields)
        for key in fields:
            if key not in allowed:
                listed = ", ".join([*_Clip.model_fields, *tasks])
                raise UserError(f"unknown key {key!r}", where=where, allowed=listed, hint=nearest_hint(key, allowed))
        clip = parse_record(_Clip, {key: fields[key] for key in _Clip.model_fields if key in fields}, where)
        if clip.subset != split:
            raise UserError("subset differs from the file's split", where=where, received=clip.subset, allowed=split)
        source.add_video(video_id, clip.duration, where)
        for task in tasks:
            if task in fields:
                label = fields[task]
                if not isinstance(label, str):
                    raise UserError(f"label of task {task!r} must be text", where=where, received=label)
                yield Question(
                    stem=video_id,
                    video=video_id,
                    task=task,
                    text=tasks[task].prompt,
                    answer=label,
                    split=split,
                    start_s=0.0,
                    end_s=clip.duration,
                    indexed_frames=clip.num_frames,
                    where=where,
                )
