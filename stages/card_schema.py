"""What a data set card (`data_manifests/<name>.yaml`) may say."""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, field_validator, model_validator

from stages.errors import UserError
from stages.ids import check_id
from stages.manifest import Split
from stages.text import TEXT_PROCESSORS

# start * fps may come out a hair below a whole index; MA-LMM truncates, and so must not lose a frame to that.
_INDEX_SLACK = 1e-6


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnnotationFiles(_Part):
    """Which files hold the annotations, relative to the annotations folder.

    `lvu_json` and `msvd_json` (MA-LMM's JSON dictionaries) have one file per split under `files`; `jsonl` has one
    `file`, whose lines name their split.
    """

    format: Literal["lvu_json", "msvd_json", "jsonl"]
    files: dict[Split, str] = Field(default_factory=dict)
    file: str | None = None

    @model_validator(mode="after")
    def _has_what_its_format_needs(self) -> "AnnotationFiles":
        if self.format == "jsonl" and (self.file is None or self.files):
            raise ValueError("format jsonl needs 'file' (one name) and no 'files'")
        if self.format != "jsonl" and (not self.files or self.file is not None):
            raise ValueError(f"format {self.format} needs 'files' (split: name) and no 'file'")
        return self


class VideoFiles(_Part):
    """How a video's file is called: `pattern` with `{id}`; when absent, the same name with each of `extensions`."""

    pattern: str = "{id}.mp4"
    extensions: tuple[str, ...] = (".mp4", ".mkv", ".webm", ".avi", ".mov")

    @field_validator("pattern")
    @classmethod
    def _names_the_id(cls, pattern: str) -> str:
        if "{id}" not in pattern:
            raise ValueError("must contain {id}")
        return pattern

    def path_of(self, video_id: str, folder: Path | None) -> str:
        """Return the path, relative to `folder`, of the first name that exists there; else of the plain pattern."""
        plain = self.pattern.replace("{id}", video_id)
        if folder is None or (folder / plain).exists():
            return plain
        stem = plain.removesuffix(Path(self.pattern).suffix)
        return next((stem + ext for ext in self.extensions if (folder / (stem + ext)).exists()), plain)


class TaskCard(_Part):
    """One task: what is asked, and the answers allowed in order (null: open answers).

    Where the annotations hold only labels, `prompt` is the question itself; where they hold questions, it is the
    text around them, with `{}` in the question's place.
    """

    prompt: str = "{}"
    labels: tuple[str, ...] | None = Field(default=None, min_length=1)

    @property
    def template(self) -> str:
        """The text around a question; `{}` alone where `prompt` is the question itself."""
        return self.prompt if "{}" in self.prompt else "{}"


class FrameRule(_Part):
    """Which frames a sample sees: `num_frames` evenly spaced over the whole video (`uniform`) or over `windows`.

    Windows are `history_s` long and start every `stride_s`. Frame indices count at `index_fps`.
    """

    kind: Literal["windows", "uniform"]
    num_frames: int = Field(ge=1)
    index_fps: FiniteFloat = Field(gt=0)
    history_s: FiniteFloat | None = Field(default=None, ge=1)
    stride_s: FiniteFloat | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _windows_have_sizes(self) -> "FrameRule":
        sizes = (self.history_s, self.stride_s)
        if self.kind == "windows" and None in sizes:
            raise ValueError("kind windows needs history_s and stride_s")
        if self.kind == "uniform" and sizes != (None, None):
            raise ValueError("kind uniform takes no history_s or stride_s")
        return self

    def spans(self, start_s: float, end_s: float, indexed_frames: int) -> list[tuple[float, float]]:
        """Return each window's first and last frame time in seconds, both whole indices over `index_fps`.

        A window from s ends at s + history_s - 1 (whole seconds, both ends counted), at `end_s`, or at the last of
        the `indexed_frames`, whichever is first; a part shorter than `history_s` still gives one window
        (MA-LMM, lavis/datasets/datasets/lvu_cls_datasets.py).
        """
        if self.history_s is None or self.stride_s is None:
            return [self._on_indices(start_s, end_s, indexed_frames)]
        more = max(0, math.floor((end_s - start_s - self.history_s) / self.stride_s + _INDEX_SLACK))
        starts = [start_s + step * self.stride_s for step in range(more + 1)]
        return [self._on_indices(start, min(start + self.history_s - 1, end_s), indexed_frames) for start in starts]

    def indexed_frames(self, duration_s: float) -> int:
        """Return how many frames a video of this length has at `index_fps`, at least 1."""
        return max(1, math.floor(duration_s * self.index_fps + _INDEX_SLACK))

    def _on_indices(self, start_s: float, end_s: float, indexed_frames: int) -> tuple[float, float]:
        final = indexed_frames - 1
        first = min(math.floor(start_s * self.index_fps + _INDEX_SLACK), final)
        last = max(first, min(math.floor(end_s * self.index_fps + _INDEX_SLACK), final))
        return first / self.index_fps, last / self.index_fps


class Expected(_Part):
    """What the published annotations contain for one task and split; `majority_floor` in 0..1."""

    videos: int
    samples: int
    majority_floor: float | None = None


class Card(_Part):
    """One data set: how its public annotation files become videos and samples.

    `text` names how prompts, questions and answers are cleaned (`stages.text`). `expected` is task -> split -> counts.
    `settings` are this data set's values of configuration keys (under the preset's and the user's). `paper` holds
    published numbers, in whatever shape they come.
    """

    name: str
    title: str
    annotations: AnnotationFiles
    videos: VideoFiles = VideoFiles()
    text: Literal["caption", "question", "verbatim"] = "verbatim"
    tasks: dict[str, TaskCard] = Field(min_length=1)
    frame_rule: FrameRule
    expected: dict[str, dict[Split, Expected]] = Field(default_factory=dict)
    download: str = ""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    paper: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _fits_together(self) -> "Card":
        try:
            check_id(self.name, kind="card name")
            for key in self.tasks:
                check_id(key, kind="task")
        except UserError as error:  # pydantic collects ValueErrors
            raise ValueError(str(error)) from None
        for key, task in self.tasks.items():
            self._check_prompt(key, task)
            self._check_labels(key, task.labels or ())
        for key in self.expected:
            if key not in self.tasks:
                raise ValueError(f"expected.{key} is none of the tasks: {', '.join(self.tasks)}")
        if self.annotations.format == "msvd_json" and len(self.tasks) != 1:
            raise ValueError("format msvd_json has one task, because its questions name none")
        return self

    def _check_prompt(self, key: str, task: TaskCard) -> None:
        asks_itself = self.annotations.format == "lvu_json"
        if asks_itself == ("{}" in task.prompt):
            rule = "is the question itself, without '{}'" if asks_itself else "needs '{}' where the question goes"
            raise ValueError(f"tasks.{key}.prompt {task.prompt!r}: with format {self.annotations.format} it {rule}")

    def _check_labels(self, key: str, labels: tuple[str, ...]) -> None:
        for label in labels:
            cleaned = TEXT_PROCESSORS[self.text](label)
            if cleaned != label:
                raise ValueError(
                    f"tasks.{key}.labels: {label!r} becomes {cleaned!r} under text: {self.text}; write it so"
                )
        if len(set(labels)) < len(labels):
            raise ValueError(f"tasks.{key}.labels names a label twice")
