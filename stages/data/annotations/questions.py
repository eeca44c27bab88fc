"""What all forms of annotations become: questions about parts of videos, which the card's rules turn into samples."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stages.data.card_schema import Card
from stages.data.manifest import ManifestBuilder, Sample, Split, Video
from stages.data.text import TEXT_PROCESSORS
from stages.errors import UserError
from stages.ids import check_id
from stages.records import nearest_hint, parse_record


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
    answer_type: str | None = None


class Source:
    """What all forms share: the card's rules, and where videos and samples go."""

    def __init__(self, card: Card, videos: Path | None, builder: ManifestBuilder) -> None:
        self.card = card
        self.left_out: dict[str, str] = {}
        self._clean = TEXT_PROCESSORS[card.text]
        self._videos = videos
        self._builder = builder

    def add_video(self, video_id: str, duration_s: float, where: str, path: str | None = None) -> None:
        """Add a video; `path` None: under the name that the card's pattern gives it."""
        known = self._builder.videos.get(check_id(video_id, kind="video id", where=where))
        if path is None:  # looking a file up costs system calls, so do it once per video
            path = known.path if known else self.card.videos.path_of(video_id, self._videos)
        video = parse_record(Video, {"id": video_id, "path": path, "duration_s": duration_s}, where)
        self._builder.add_shared_video(video, where)

    def leave_out(self, video_id: str, reason: str) -> None:
        """Note why an annotated video has no samples."""
        self.left_out[video_id] = reason

    def add(self, questions: Iterator[Question]) -> None:
        """Cut every question into the samples that the card's frame rule makes of it."""
        for question in questions:
            self._add_samples(question)

    def _add_samples(self, question: Question) -> None:
        task = self.card.tasks[question.task]
        rule = self.card.frame_rule
        answer = self._clean(question.answer)
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
                "question": self._clean(question.text),
                "prompt": task.template,
                "answer": answer,
                "split": question.split,
                "candidates": task.labels,
                "answer_type": question.answer_type,
                "start_s": start_s,
                "end_s": end_s,
                "num_frames": rule.num_frames,
                "index_fps": rule.index_fps,
                "jitter": rule.jitter and question.split == "train",
                "frame_offset": rule.frame_offset,
            }
            self._builder.add_sample(parse_record(Sample, record, question.where), question.where)


def _sample_id(question: Question, window_s: float | None) -> str:
    whole = f"{question.task}:{question.stem}"
    if window_s is None:
        return whole
    return f"{whole}_{int(window_s) if window_s == int(window_s) else window_s}"
