"""The original MSVD-QA release: a list of {id, video_id, question, answer} per split, about videos by number.

`youtube_mapping.txt` ("<YouTube id>_<start>_<end> vid<number>" a line) gives the numbers their names, and a table says
how long the videos are (`pipeline data prepare` measures them).
"""

from collections.abc import Iterator
from pathlib import Path

from pydantic import ConfigDict, Field

from stages.data.annotations.lengths import read_length_table
from stages.data.annotations.questions import Question, Source
from stages.data.card_schema import AnnotationFiles
from stages.data.manifest import Record, Split
from stages.data.text import answer_type_by_word
from stages.errors import UserError
from stages.records import parse_record, read_json, read_text

_HINT = "`pipeline data prepare` measures the videos and writes it"
NO_LENGTH = "the table of durations does not have it"


class _Asked(Record):
    # Copies of the release differ in what else they have.
    model_config = ConfigDict(extra="ignore")

    video_id: int = Field(ge=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def questions(source: Source, form: AnnotationFiles, folder: Path, split: Split) -> Iterator[Question]:
    """Yield the questions, numbered by their place in the list as in MA-LMM's files; unmeasured videos are left out."""
    (task,) = source.card.tasks
    assert form.video_names is not None
    path, names_path = folder / form.files[split], folder / form.video_names
    entries = read_json(path)
    if not isinstance(entries, list):
        raise UserError("must hold one JSON list", where=path, received=type(entries).__name__)
    names = read_video_names(names_path)
    lengths = read_length_table(folder, form.durations, hint=_HINT)
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        asked = parse_record(_Asked, entry, where)
        video = names.get(f"vid{asked.video_id}")
        if video is None:
            raise UserError(f"{names_path} does not name vid{asked.video_id}", where=where)
        length = lengths.get(video)
        if length is None:
            source.leave_out(video, NO_LENGTH)
            continue
        frames = length.num_frames or source.card.frame_rule.indexed_frames(length.duration_s)
        duration_s = frames / source.card.frame_rule.index_fps
        source.add_video(video, duration_s, where)
        yield Question(
            stem=f"{split}_{number:07d}",
            video=video,
            task=task,
            text=asked.question,
            answer=asked.answer,
            split=split,
            start_s=0.0,
            end_s=duration_s,
            indexed_frames=frames,
            where=where,
            answer_type=answer_type_by_word(asked.question),
        )


def read_video_names(path: Path) -> dict[str, str]:
    """Return {"vid<number>": "<YouTube id>_<start>_<end>"} from youtube_mapping.txt; UserError with file and line."""
    names: dict[str, str] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        where = f"{path}:{number}"
        if len(fields) != 2 or not fields[1].startswith("vid"):
            allowed = "<YouTube id>_<start>_<end> vid<number>"
            raise UserError("a line names one video and its number", where=where, received=line, allowed=allowed)
        if fields[1] in names:
            raise UserError(f"{fields[1]} appears twice", where=where)
        names[fields[1]] = fields[0]
    return names
