"""MA-LMM's MSVD-QA form: {question id: {video, frame_length, question, answer, answer_type, ...}}."""

from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from stages.data.annotations.questions import Question, Source
from stages.data.card_schema import AnnotationFiles
from stages.data.manifest import Record, Split
from stages.records import parse_record, read_json_entries


class _Asked(Record):
    video: str
    frame_length: int = Field(ge=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answer_type: str | None = None
    question_id: str | None = None
    dataset: str | None = None


def questions(source: Source, form: AnnotationFiles, folder: Path, split: Split) -> Iterator[Question]:
    """Yield the questions; `frame_length` counts frames at the rule's `index_fps` and so gives the duration."""
    (task,) = source.card.tasks
    for place, question_id, entry in read_json_entries(folder / form.files[split]):
        where = f"{place}, question {question_id!r}"
        asked = parse_record(_Asked, entry, where)
        duration_s = asked.frame_length / source.card.frame_rule.index_fps
        source.add_video(asked.video, duration_s, where)
        yield Question(
            stem=f"{split}_{question_id}",  # question ids start again in each split
            video=asked.video,
            task=task,
            text=asked.question,
            answer=asked.answer,
            split=split,
            start_s=0.0,
            end_s=duration_s,
            indexed_frames=asked.frame_length,
            where=where,
            answer_type=asked.answer_type,
        )
