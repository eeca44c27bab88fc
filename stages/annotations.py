"""Readers of public annotation files: each turns one format into videos and questions about them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, FiniteFloat

from stages.card_schema import Card
from stages.errors import UserError
from stages.ids import check_id
from stages.manifest import ManifestBuilder, Record, Sample, Split, Video
from stages.records import nearest_hint, parse_record, read_json, read_json_lines
from stages.text import TEXT_PROCESSORS


@dataclass(frozen=True)
class Question:
    """One annotated question about the part `start_s`..`end_s` of a video, before it is cut into windows.

    `stem` makes sample ids unique within the task. `indexed_frames` counts the frames at the rule's `index_fps`.
    """

    stem: str
    video: str
    task: str
    text: str
    answer: str
    split: Split
    start_s: float
    end_s: float
    indexed_frames: int
    where: str


def read_annotations(card: Card, annotations: Path, videos: Path | None, builder: ManifestBuilder) -> dict[str, str]:
    """Read every annotation file of `card` that exists into `builder`.

    Returns the splits whose file is absent, each with the path looked for.

    Raises:
        UserError: one line with file and place for whatever is wrong.
    """
    source = _Source(card, videos, builder)
    if card.annotations.format == "jsonl":
        assert card.annotations.file is not None
        source.add(_questions_from_jsonl(source, annotations / card.annotations.file))
        return {}
    read = _questions_from_lvu if card.annotations.format == "lvu_json" else _questions_from_msvd
    absent: dict[str, str] = {}
    for split, name in card.annotations.files.items():
        path = annotations / name
        if path.exists():
            source.add(read(source, path, split))
        else:
            absent[split] = str(path)
    return absent


class _Source:
    """What all formats share: the card's rules, and where videos and samples go."""

    def __init__(self, card: Card, videos: Path | None, builder: ManifestBuilder) -> None:
        self.card = card
        self.clean = TEXT_PROCESSORS[card.text]
        self._videos = videos
        self._builder = builder

    def add_video(self, video_id: str, duration_s: float, where: str, path: str | None = None) -> None:
        known = self._builder.videos.get(check_id(video_id, kind="video id", where=where))
        if path is None:  # looking a file up costs system calls, so do it once per video
            path = known.path if known else self.card.videos.path_of(video_id, self._videos)
        video = parse_record(Video, {"id": video_id, "path": path, "duration_s": duration_s}, where)
        self._builder.add_shared_video(video, where)

    def add(self, questions: Iterator[Question]) -> None:
        for question in questions:
            self._add_samples(question)

    def _add_samples(self, question: Question) -> None:
        task = self.card.tasks[question.task]
        rule = self.card.frame_rule
        answer = self.clean(question.answer)
        if task.labels is not None and answer not in task.labels:
            raise UserError(
                f"unknown label of task {question.task!r}",
                where=question.where,
                received=question.answer,
                allowed=", ".join(task.labels),
                hint=nearest_hint(answer, task.labels),
            )
        for start_s, end_s in rule.spans(question.start_s, question.end_s, question.indexed_frames):
            record = {
                "id": _sample_id(question, None if rule.kind == "uniform" else start_s),
                "video": question.video,
                "task": question.task,
                "question": self.clean(question.text),
                "prompt": task.template,
                "answer": answer,
                "split": question.split,
                "candidates": task.labels,
                "start_s": start_s,
                "end_s": end_s,
                "num_frames": rule.num_frames,
                "index_fps": rule.index_fps,
            }
            self._builder.add_sample(parse_record(Sample, record, question.where), question.where)


def _sample_id(question: Question, window_s: float | None) -> str:
    whole = f"{question.task}:{question.stem}"
    if window_s is None:
        return whole
    return f"{whole}_{int(window_s) if window_s == int(window_s) else window_s}"


# ---- MA-LMM's LVU form: {video id: {subset, duration, num_frames, <task>: label, <task>_answer: "(a)"}} ----


class _LvuClip(Record):
    subset: str
    duration: FiniteFloat = Field(gt=0)
    num_frames: int = Field(ge=1)


def _questions_from_lvu(source: _Source, path: Path, split: Split) -> Iterator[Question]:
    tasks = source.card.tasks
    allowed = {*_LvuClip.model_fields, *tasks, *(f"{task}_answer" for task in tasks)}
    for video_id, entry in _entries(path):
        where = f"{path}, video {video_id!r}"
        fields = _as_object(entry, where)
        for key in fields:
            if key not in allowed:
                listed = ", ".join([*_LvuClip.model_fields, *tasks])
                raise UserError(f"unknown key {key!r}", where=where, allowed=listed, hint=nearest_hint(key, allowed))
        clip = parse_record(_LvuClip, {key: fields[key] for key in _LvuClip.model_fields if key in fields}, where)
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


# ---- MA-LMM's MSVD-QA form: {question id: {video, frame_length, question, answer, ...}} ----


class _MsvdQuestion(Record):
    video: str
    frame_length: int = Field(ge=1)
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    answer_type: str | None = None
    question_id: str | None = None
    dataset: str | None = None


def _questions_from_msvd(source: _Source, path: Path, split: Split) -> Iterator[Question]:
    (task,) = source.card.tasks
    for question_id, entry in _entries(path):
        where = f"{path}, question {question_id!r}"
        asked = parse_record(_MsvdQuestion, entry, where)
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
        )


# ---- JSON Lines: a user's own data set, one question a line ----


class _Line(Record):
    video: str
    path: str | None = None
    duration_s: FiniteFloat = Field(gt=0)
    start_s: FiniteFloat = Field(default=0.0, ge=0)
    end_s: FiniteFloat | None = None
    task: str
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    split: Split


def _questions_from_jsonl(source: _Source, path: Path) -> Iterator[Question]:
    tasks = source.card.tasks
    for where, entry in read_json_lines(path):
        line = parse_record(_Line, entry, where)
        if line.task not in tasks:
            hint = nearest_hint(line.task, tasks)
            raise UserError("unknown task", where=where, received=line.task, allowed=", ".join(tasks), hint=hint)
        end_s = line.duration_s if line.end_s is None else line.end_s
        if not line.start_s < end_s <= line.duration_s:
            raise UserError(
                "start_s and end_s do not lie in the video",
                where=where,
                received=f"{line.start_s} and {end_s}",
                allowed=f"0 <= start_s < end_s <= duration_s = {line.duration_s}",
            )
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
        )


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError("must hold one JSON object", where=path, received=type(content).__name__)
    yield from content.items()


def _as_object(entry: object, where: str) -> Mapping[str, Any]:
    if not isinstance(entry, dict):
        raise UserError("must be an object of keys and values", where=where, received=entry)
    return entry
