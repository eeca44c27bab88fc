"""What there is to learn from: videos, and samples that ask one question about some frames of one video."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import numpy as np
from pydantic import ConfigDict, Field, FiniteFloat, field_validator, model_validator

from stages.atomic import atomic_write_text
from stages.errors import UserError
from stages.ids import check_id
from stages.records import FrozenRecord, nearest_hint, parse_record, read_json, read_json_lines

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

MANIFEST_FILES = _VIDEOS_FILE, _SAMPLES_FILE, _HEADER_FILE = "videos.jsonl", "samples.jsonl", "dataset.json"
"""What `Manifest.write_jsonl` writes."""
# Durations are rounded in many annotation files; half a millisecond is below any frame interval.
_TIME_SLACK_S = 5e-4
# 11 days. A longer video is a slip in the units, and its windows would fill the memory before anybody could see it.
_LONGEST_S = 1e6


class Record(FrozenRecord):
    """One entry of a manifest file: types are not converted."""

    model_config = ConfigDict(strict=True)


def _safe_name(kind: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            return check_id(value, kind=kind)
        except UserError as error:  # pydantic collects ValueErrors and adds the key
            raise ValueError(str(error)) from None

    return check


class Video(Record):
    """One video: its id, where it is and how long it is.

    `path` is relative to the videos folder, or absolute. `duration_s` is the length that samples may use.
    """

    id: str
    path: str = Field(min_length=1)
    duration_s: FiniteFloat = Field(gt=0, le=_LONGEST_S)

    _check_id = field_validator("id")(_safe_name("video id"))

    @field_validator("path")
    @classmethod
    def _stays_below_the_videos_folder(cls, path: str) -> str:
        if "\0" in path or (not path.startswith("/") and "://" not in path and ".." in PurePosixPath(path).parts):
            raise ValueError("a relative path must stay below the videos folder")
        return path


class Sample(Record):
    """One question about some frames of one video.

    The frames are given either by `start_s`, `end_s`, `num_frames` and `index_fps`, or one by one by `times_s`.
    `id` is unique in the manifest; it is not a file name. `question` is the bare question, and what a
    model reads is the question inside `prompt`. `candidates` are a classification's answers in order, None if open.
    `answer_type` is what kind of thing is asked for (MSVD-QA: what, who, how, when, where). With `jitter`, every epoch
    of training draws other frames between `start_s` and `end_s` (`training_times_s`). `frame_offset` is added to every
    frame index, and an index before the video gives its first frame.
    """

    id: str = Field(min_length=1)
    video: str
    task: str
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    split: Split
    prompt: str = "{}"
    candidates: tuple[str, ...] | None = Field(default=None, strict=False)
    answer_type: str | None = None
    start_s: FiniteFloat | None = Field(default=None, ge=0)
    end_s: FiniteFloat | None = Field(default=None, ge=0)
    num_frames: int | None = Field(default=None, ge=1)
    index_fps: FiniteFloat | None = Field(default=None, gt=0)
    jitter: bool = False
    frame_offset: int = Field(default=0, le=0)
    times_s: tuple[FiniteFloat, ...] | None = Field(default=None, strict=False, min_length=1)

    _check_task = field_validator("task")(_safe_name("task"))

    @model_validator(mode="after")
    def _is_consistent(self) -> "Sample":
        if self.candidates is not None and self.answer not in self.candidates:
            raise ValueError(f"answer {self.answer!r} is not among the candidates: {', '.join(self.candidates)}")
        if "{}" not in self.prompt:
            raise ValueError(f"prompt {self.prompt!r} has no '{{}}' for the question")
        rule = (self.start_s, self.end_s, self.num_frames, self.index_fps)
        given = sum(value is not None for value in rule)
        if given not in (0, len(rule)) or (given == 0) == (self.times_s is None):
            raise ValueError("give either start_s, end_s, num_frames and index_fps, or only times_s")
        for name, is_set in (("jitter", self.jitter), ("frame_offset", self.frame_offset != 0)):
            if is_set and self.times_s is not None:
                raise ValueError(f"{name} needs start_s, end_s, num_frames and index_fps, not times_s")
        if self.start_s is not None and self.end_s is not None and self.end_s < self.start_s:
            raise ValueError(f"end_s {self.end_s} is before start_s {self.start_s}")
        if self.times_s is not None and (self.times_s[0] < 0 or list(self.times_s) != sorted(self.times_s)):
            raise ValueError("times_s must be sorted and not negative")
        return self

    @property
    def prompt_text(self) -> str:
        """The question inside its prompt: the text that the Q-Former and the language model read, unless too long."""
        return self.prompt.replace("{}", self.question)

    def frame_times_s(self) -> np.ndarray:
        """Return the frame times of evaluation in seconds, `[T]` float64, sorted; short videos may repeat one.

        Evenly spaced frames are rounded (half to even) to a whole frame index at `index_fps`, as MA-LMM does
        (lavis/datasets/datasets/lvu_cls_datasets.py). An index over `index_fps` is one fixed float, so frames that
        samples share compare equal.
        """
        if self.times_s is not None:
            return np.asarray(self.times_s, dtype=np.float64)
        return even_times_s(*self._rule(), self.frame_offset)

    def training_times_s(self, seed: int, epoch: int) -> np.ndarray:
        """Return the frame times of one epoch of training in seconds, `[T]` float64, sorted.

        Without `jitter` these are `frame_times_s`. With it, the frames from the first to the last are cut into T
        segments of whole frame indices and one index is drawn in each, as MA-LMM does
        (lavis/datasets/datasets/msvd_vqa_datasets.py). The draw depends only on seed, epoch and sample id, so
        neither order nor number of workers changes it, and any epoch can be drawn again.
        """
        if not self.jitter:
            return self.frame_times_s()
        start_s, end_s, num_frames, index_fps = self._rule()
        first, last = _index_of(start_s, index_fps), _index_of(end_s, index_fps)
        bounds = np.linspace(first, last + 1, num_frames + 1, dtype=np.int64)
        of_sample = int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big")
        random = np.random.default_rng([seed, epoch, of_sample])
        # With fewer frames than segments some segments are empty; their one choice is where they begin.
        drawn = random.integers(bounds[:-1], np.maximum(bounds[1:], bounds[:-1] + 1))
        return np.maximum(drawn + self.frame_offset, 0) / index_fps

    def planned_times_s(self) -> np.ndarray:
        """Return all times that a cache must hold for this sample in seconds, float64, sorted and distinct.

        These are the frames of evaluation and, with `jitter`, every frame that an epoch of training may draw.
        """
        if not self.jitter:
            return np.unique(self.frame_times_s())
        start_s, end_s, _, index_fps = self._rule()
        indices = np.arange(_index_of(start_s, index_fps), _index_of(end_s, index_fps) + 1)
        return np.unique(np.maximum(indices + self.frame_offset, 0)) / index_fps

    def _rule(self) -> tuple[float, float, int, float]:
        assert self.start_s is not None
        assert self.end_s is not None
        assert self.num_frames is not None
        assert self.index_fps is not None
        return self.start_s, self.end_s, self.num_frames, self.index_fps


def _index_of(time_s: float, index_fps: float) -> int:
    # index / fps * fps can miss the index by one unit in the last place.
    return round(time_s * index_fps)


def even_times_s(start_s: float, end_s: float, num_frames: int, index_fps: float, offset: int = 0) -> np.ndarray:
    """Return evenly spaced times `[T]` float64 in seconds, both ends included, each on a whole index at `index_fps`.

    `offset` is added to the indices, none of which falls below 0.
    """
    # index / fps * fps can miss the index by one unit in the last place, which a rounded half would show.
    first, last = round(start_s * index_fps, 6), round(end_s * index_fps, 6)
    return np.maximum(np.rint(np.linspace(first, last, num_frames)) + offset, 0) / index_fps


@dataclass(frozen=True)
class Manifest:
    """A data set's videos by id and its samples.

    `absent_splits` maps a split to the annotation file it lacks, `left_out` an annotated video that has no samples to
    the reason why, `forms` a split to the form in which its annotations were found.
    """

    dataset: str
    videos: dict[str, Video]
    samples: tuple[Sample, ...]
    absent_splits: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have samples, in order of appearance."""
        return tuple(dict.fromkeys(sample.task for sample in self.samples))

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have samples, as a subset of train, val, test."""
        present = {sample.split for sample in self.samples}
        return tuple(split for split in SPLITS if split in present)

    def select(self, tasks: Sequence[str] | None = None, splits: Sequence[str] | None = None) -> "Manifest":
        """Return the samples of these tasks and splits (None: all), with only the videos they use.

        Raises:
            UserError: a name is unknown, a split's annotation file is absent, or nothing is left.
        """
        for split in splits or ():
            if split in self.absent_splits:
                raise UserError(
                    f"file not found, so data set {self.dataset!r} has no split {split!r}",
                    where=self.absent_splits[split],
                    allowed=", ".join(self.splits),
                    hint="put the file there, or leave this split out",
                )
        self._check_names("task", tasks, self.tasks)
        self._check_names("split", splits, self.splits)
        samples = tuple(
            sample
            for sample in self.samples
            if (tasks is None or sample.task in tasks) and (splits is None or sample.split in splits)
        )
        if not samples:
            raise UserError(f"data set {self.dataset!r} has no samples of {tasks or 'any task'} in {splits or 'it'}")
        used = {sample.video for sample in samples}
        videos = {name: video for name, video in self.videos.items() if name in used}
        return replace(self, videos=videos, samples=samples)

    def _check_names(self, kind: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
        for name in names or ():
            if name not in known:
                raise UserError(
                    f"data set {self.dataset!r} has no {kind} {name!r}",
                    allowed=", ".join(known),
                    hint=nearest_hint(name, known),
                )

    def write_jsonl(self, folder: Path) -> None:
        """Write `videos.jsonl`, `samples.jsonl` and `dataset.json` into `folder`, each replaced in one step."""
        for name, records in ((_VIDEOS_FILE, self.videos.values()), (_SAMPLES_FILE, self.samples)):
            lines = "".join(f"{record.model_dump_json(exclude_defaults=True)}\n" for record in records)
            atomic_write_text(folder / name, lines)
        header = _Header(**{name: getattr(self, name) for name in _Header.model_fields})
        atomic_write_text(folder / _HEADER_FILE, f"{header.model_dump_json()}\n")

    @classmethod
    def read_jsonl(cls, folder: Path) -> "Manifest":
        """Read what `write_jsonl` wrote; UserError with file and line for whatever is wrong in it."""
        header_path = folder / _HEADER_FILE
        header = parse_record(_Header, read_json(header_path), str(header_path))
        builder = ManifestBuilder(header.dataset)
        for where, entry in read_json_lines(folder / _VIDEOS_FILE):
            builder.add_video(parse_record(Video, entry, where), where)
        for where, entry in read_json_lines(folder / _SAMPLES_FILE):
            builder.add_sample(parse_record(Sample, entry, where), where)
        manifest = builder.build()
        return replace(manifest, absent_splits=header.absent_splits, left_out=header.left_out, forms=header.forms)


class _Header(Record):
    dataset: str
    absent_splits: Mapping[str, str] = Field(default_factory=dict)
    left_out: Mapping[str, str] = Field(default_factory=dict)
    forms: Mapping[str, str] = Field(default_factory=dict)

    _check_dataset = field_validator("dataset")(_safe_name("data set name"))


class ManifestBuilder:
    """Collects videos and samples and refuses what does not fit together; `where` ("file:line") leads each message."""

    def __init__(self, dataset: str) -> None:
        self.videos: dict[str, Video] = {}
        self._dataset = dataset
        self._samples: dict[str, Sample] = {}

    def add_video(self, video: Video, where: str) -> None:
        """Add a video that is not there yet; UserError otherwise."""
        if video.id in self.videos:
            raise UserError(f"video id {video.id!r} appears twice", where=where)
        self.videos[video.id] = video

    def add_shared_video(self, video: Video, where: str) -> None:
        """Add a video that annotations may name several times; UserError when they contradict each other."""
        known = self.videos.setdefault(video.id, video)
        if known != video:
            raise UserError(
                f"video {video.id!r} was given before with duration_s {known.duration_s} and path {known.path!r}",
                where=where,
                received=f"duration_s {video.duration_s} and path {video.path!r}",
            )

    def add_sample(self, sample: Sample, where: str) -> None:
        """Add a sample; UserError when its id is taken, its video unknown, or its frames are beyond the video."""
        if sample.id in self._samples:
            raise UserError(f"sample id {sample.id!r} appears twice", where=where)
        video = self.videos.get(sample.video)
        if video is None:
            raise UserError(
                f"sample {sample.id!r} names a video that is not listed",
                where=where,
                received=sample.video,
                hint=nearest_hint(sample.video, self.videos),
            )
        last_s = sample.times_s[-1] if sample.times_s is not None else sample.end_s
        assert last_s is not None
        if last_s > video.duration_s + _TIME_SLACK_S:
            raise UserError(
                f"sample {sample.id!r} ends at {last_s} s, but video {video.id!r} lasts {video.duration_s} s",
                where=where,
            )
        self._samples[sample.id] = sample

    def build(self) -> Manifest:
        return Manifest(self._dataset, self.videos, tuple(self._samples.values()))
