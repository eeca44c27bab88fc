"""What a data set card (`data_manifests/<name>.yaml`) may hold."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from stages.data.manifest import MANIFEST_FILES, Split
from stages.data.text import TEXT_PROCESSORS
from stages.errors import UserError
from stages.ids import check_id
from stages.records import FrozenRecord

# start * fps may come out a hair below a whole index; MA-LMM truncates, and so must not lose a frame to that.
_INDEX_SLACK = 1e-6


_ASKS_ITSELF = ("lvu_json", "lvu_csv")
_ONE_TASK = ("msvd_json", "msvd_release")
_WHOLE = ("jsonl", "manifest")


class AnnotationFiles(FrozenRecord):
    """One form of the annotations: which files hold it, relative to the annotations folder.

    `lvu_json` and `msvd_json` are MA-LMM's JSON dictionaries, `msvd_release` the original lists, one file per split
    under `files`. `lvu_csv` is the original LVU v1.0, with `{task}` in the file names. `jsonl` has one `file`, whose
    lines name their split. `manifest` is what `pipeline data export` writes, under its own file names.

    What the original releases leave out comes from tables beside them: `durations` are the names looked for, the first
    that is there is read (`stages.data.annotations.lengths`); `video_names` is the list that gives numbered videos
    their names. `labels` maps, per task, the release's class names to the labels here; a name that is not in it stays.
    `published_videos` counts a form's videos per task and split where it differs from the card's `expected`.
    """

    format: Literal["lvu_json", "lvu_csv", "msvd_json", "msvd_release", "jsonl", "manifest"]
    files: dict[Split, str] = Field(default_factory=dict)
    file: str | None = None
    durations: tuple[str, ...] = ()
    video_names: str | None = None
    labels: dict[str, dict[str, str]] = Field(default_factory=dict)
    published_videos: dict[str, dict[Split, int]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_what_its_format_needs(self) -> "AnnotationFiles":
        if self.format == "jsonl" and (self.file is None or self.files):
            raise ValueError("format jsonl needs 'file' (one name) and no 'files'")
        if self.format == "manifest" and (self.file is not None or self.files):
            raise ValueError("format manifest takes neither 'file' nor 'files'")
        if self.format not in _WHOLE and (not self.files or self.file is not None):
            raise ValueError(f"format {self.format} needs 'files' (split: name) and no 'file'")
        if self.format == "lvu_csv" and not all("{task}" in name for name in self.files.values()):
            raise ValueError("format lvu_csv needs '{task}' in every name under 'files'")
        if (self.format in ("lvu_csv", "msvd_release")) != bool(self.durations):
            raise ValueError("formats lvu_csv and msvd_release, and no others, need 'durations' (names of tables)")
        if (self.format == "msvd_release") != (self.video_names is not None):
            raise ValueError("format msvd_release, and no other, needs 'video_names' (name of a list)")
        return self

    @property
    def whole(self) -> tuple[str, ...]:
        """The files that hold all splits at once; none where each split has its own."""
        if self.format == "manifest":
            return MANIFEST_FILES
        return () if self.file is None else (self.file,)

    def files_of(self, split: Split, tasks: Sequence[str]) -> list[str]:
        """Return the names of a split's files: one, or one per task; none if this form has no such split."""
        if split not in self.files:
            return []
        return list(dict.fromkeys(self.files[split].replace("{task}", task) for task in tasks))


# What the containers that the reader opens are usually called; what is most likely first.
_EXTENSIONS = (
    *(".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".3gp", ".3g2", ".gif", ".ts", ".m2ts", ".mts", ".mpg"),
    *(".mpeg", ".vob", ".flv", ".f4v", ".wmv", ".asf", ".ogv", ".mxf", ".dv", ".wtv", ".rm", ".rmvb", ".nut", ".ivf"),
)


class VideoFiles(FrozenRecord):
    """How a video's file is called: `pattern` with `{id}`; when absent, the same name with each of `extensions`.

    Those are tried as written and in capitals.

    `longer_by_s` is how many seconds a file may run on past the annotated duration and still be the right one.
    """

    pattern: str = "{id}.mp4"
    extensions: tuple[str, ...] = _EXTENSIONS
    longer_by_s: FiniteFloat = Field(default=1.0, ge=0)

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
        others = (stem + ext for name in self.extensions for ext in (name, name.upper()))
        return next((other for other in others if (folder / other).exists()), plain)


class TaskCard(FrozenRecord):
    """One task: what is asked, and the answers allowed in order (null: open answers).

    Where the annotations hold only labels, `prompt` is the question itself; where they hold questions, it is the
    text around them, with `{}` in the question's place. `paper_prompt` is the wording of the Diff-LMM paper where it
    differs (`data.prompts`).
    """

    prompt: str = "{}"
    paper_prompt: str | None = None
    labels: tuple[str, ...] | None = Field(default=None, min_length=1)

    @property
    def template(self) -> str:
        """The text around a question; just `{}` where `prompt` is the question itself."""
        return self.prompt if "{}" in self.prompt else "{}"


class FrameRule(FrozenRecord):
    """Which frames a sample sees: `num_frames` evenly spaced over the whole video (`uniform`) or over `windows`.

    Windows are `history_s` long and start every `stride_s`. Frame indices count at `index_fps`. With `jitter`, training
    draws one random frame from each of `num_frames` equal parts instead (`Sample.training_times_s`). `frame_offset` is
    added to the indices (`data.frame_offset`).
    """

    kind: Literal["windows", "uniform"]
    num_frames: int = Field(ge=1)
    index_fps: FiniteFloat = Field(gt=0)
    history_s: FiniteFloat | None = Field(default=None, ge=1)
    stride_s: FiniteFloat | None = Field(default=None, gt=0)
    jitter: bool = False
    frame_offset: int = Field(default=0, le=0)

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
        (MA-LMM:lavis/datasets/datasets/lvu_cls_datasets.py:37-72).
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


class Expected(FrozenRecord):
    """What the published annotations contain for one task and split; `majority_floor` in 0..1."""

    videos: int
    samples: int
    majority_floor: float | None = None


class Card(FrozenRecord):
    """One data set: how its public annotation files become videos and samples.

    `annotations` is one form of the annotation files or a list of them: for each split, the first whose file is there
    is read. `text` names how prompts, questions and answers are cleaned (`stages.data.text`). `expected` is task ->
    split
    -> counts. `settings` are this data set's values of configuration keys (under the preset's and the user's),
    `presets` those that a preset has on this data set only (over its own, under the user's). `paper` holds published
    numbers, in whatever shape they come.
    """

    name: str
    title: str
    annotations: tuple[AnnotationFiles, ...] = Field(min_length=1)
    videos: VideoFiles = VideoFiles()
    text: Literal["caption", "question", "verbatim"] = "verbatim"
    tasks: dict[str, TaskCard] = Field(min_length=1)
    frame_rule: FrameRule
    expected: dict[str, dict[Split, Expected]] = Field(default_factory=dict)
    download: str = ""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    presets: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    paper: dict[str, Any] = Field(default_factory=dict)

    @field_validator("annotations", mode="before")
    @classmethod
    def _one_form_or_several(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else (value,)

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
        for form in self.annotations:
            if form.format in _ONE_TASK and len(self.tasks) != 1:
                raise ValueError(f"format {form.format} has one task, because its questions name none")
            if form.whole and len(self.annotations) > 1:
                raise ValueError(f"format {form.format} must be the only one, because it holds all splits at once")
        return self

    def as_asked(self, *, prompts: Literal["ma-lmm", "paper"], jitter: bool, frame_offset: int = 0) -> "Card":
        """Return the card with the wording of the prompts asked for, and its frame rule without jitter or shifted.

        Raises:
            UserError: the paper's wording is asked for, and the card has none.
        """
        tasks = self.tasks
        if prompts == "paper":
            if all(task.paper_prompt is None for task in tasks.values()):
                known = "its tasks have no paper_prompt"
                raise UserError(f"data set {self.name!r} has no wording of the paper: {known}", where="data.prompts")
            tasks = {
                key: task.model_copy(update={"prompt": task.paper_prompt or task.prompt}) for key, task in tasks.items()
            }
        changed = {
            "jitter": self.frame_rule.jitter and jitter,
            "frame_offset": frame_offset or self.frame_rule.frame_offset,
        }
        rule = self.frame_rule.model_copy(update=changed)
        return self.model_copy(update={"tasks": tasks, "frame_rule": rule})

    def _check_prompt(self, key: str, task: TaskCard) -> None:
        for form in self.annotations:
            asks_itself = form.format in _ASKS_ITSELF
            rule = "is the question itself, without '{}'" if asks_itself else "needs '{}' where the question goes"
            for name in ("prompt", "paper_prompt"):
                text = getattr(task, name)
                if text is not None and asks_itself == ("{}" in text):
                    raise ValueError(f"tasks.{key}.{name} {text!r}: with format {form.format} it {rule}")

    def _check_labels(self, key: str, labels: tuple[str, ...]) -> None:
        for label in labels:
            cleaned = TEXT_PROCESSORS[self.text](label)
            if cleaned != label:
                raise ValueError(
                    f"tasks.{key}.labels: {label!r} becomes {cleaned!r} under text: {self.text}; write it so"
                )
        if len(set(labels)) < len(labels):
            raise ValueError(f"tasks.{key}.labels names a label twice")
