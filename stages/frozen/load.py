"""The networks of Stage 1 from their checkpoints: visual encoder and teacher, opened, described or loaded.

`FAMILIES` is the one registry of teachers: `teacher.kind` chooses the family, and its checkpoint must be one of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import EncoderConfig, TeacherConfig
from stages.errors import UserError
from stages.frozen.dino import DINOV2_FAMILY, OpenedDino, open_dino
from stages.frozen.dit import OpenedDiT, dit_needs, dit_sources, is_dit, is_original, open_dit
from stages.frozen.source import FrozenSource, remembered
from stages.frozen.towers import TOWER_FAMILY, TOWER_NEEDS, OpenedTower, open_encoder, open_tower
from stages.weights.instructblip import naming
from stages.weights.repository import OnLoaded, Repository, log_loading
from stages.weights.whole_files import Needs

if TYPE_CHECKING:
    from model.teachers.base import Teacher
    from model.vision import VisionEncoder


@dataclass(frozen=True)
class Family:
    """One family of teachers.

    Attributes:
        open: from its settings to its checkpoint, opened: `tokens` that are pooled of a frame, `width` D, `size_px`,
            `describe`, `load` and what `loading` read; UserError if it is none of the family or does not fit.
        recognises: whether a source is a checkpoint of the family.
        sources: every checkpoint that its settings name, by the setting: `source` and what else there is.
        needs: what is read of each of them; None for one that is a single file.
    """

    open: Callable[[Any], OpenedDiT | OpenedDino | OpenedTower]
    recognises: Callable[[str], bool]
    sources: Callable[[Any], dict[str, str]] = lambda config: {"source": config.source}
    needs: Callable[[Any], dict[str, Needs | None]] = lambda _config: {"source": Needs(("config.json",))}


def _states(model_types: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a source's `config.json` states one of these."""

    def recognises(source: str) -> bool:
        if is_original(source) or Repository(source).find("config.json") is None:
            return False
        return Repository(source).json("config.json").get("model_type") in model_types

    return recognises


FAMILIES = {
    "dit": Family(open_dit, is_dit, dit_sources, dit_needs),
    "dinov2": Family(open_dino, _states(DINOV2_FAMILY)),
    "tower": Family(open_tower, _states(TOWER_FAMILY), needs=lambda _config: {"source": TOWER_NEEDS}),
}
"""What opens each kind of teacher."""


def open_teacher(config: TeacherConfig) -> OpenedDiT | OpenedDino | OpenedTower:
    """Open the teacher's checkpoint.

    Raises:
        UserError: it is of another family than `teacher.kind`, or of none, or settings do not fit it.
    """
    if (kind := other_kind(config)) is not None:
        raise UserError(
            f"this checkpoint is of another family than teacher.kind={config.kind}",
            where=f"teacher.source {config.source}",
            hint=f"set teacher.kind={kind}, or teacher.source to a checkpoint of kind {config.kind}",
        )
    return FAMILIES[config.kind].open(config)


def other_kind(config: TeacherConfig) -> str | None:
    """The kind of the teacher's checkpoint if that is another than `teacher.kind`; None where it is of no family, too.

    Raises:
        UserError: the checkpoint cannot be had.
    """
    if FAMILIES[config.kind].recognises(config.source):
        return None
    return next((kind for kind, family in FAMILIES.items() if family.recognises(config.source)), None)


def teacher_sources(config: TeacherConfig) -> dict[str, str]:
    """Every checkpoint that the teacher is read from, by its setting below `teacher`."""
    return FAMILIES[config.kind].sources(config)


def describe_encoder(config: EncoderConfig) -> FrozenSource:
    """Input size and weight digest of the visual encoder, without building it.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one without the layer asked for.
    """
    return remembered("encoder", config, lambda: open_encoder(config).describe())


def load_encoder(config: EncoderConfig, on_loaded: OnLoaded = log_loading) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those; `on_loaded` is called with what was read.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one that lacks the layer or a tensor.
    """
    from model.vision import VisionEncoder

    opened = open_encoder(config)
    with naming(config.source):
        encoder = VisionEncoder(
            config,
            vision_config=opened.described,
            tensors=opened.tensors,
            prefix=opened.prefix,
            pixels=opened.pixels,
        )
    for report in opened.loading():
        on_loaded(report)
    return encoder


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it.

    Raises:
        UserError: as `open_teacher`.
    """

    def describe() -> FrozenSource:
        opened = open_teacher(config)
        with naming(config.source):
            return opened.describe()

    return remembered("teacher", config, describe)


def load_teacher(config: TeacherConfig, on_loaded: OnLoaded = log_loading) -> "Teacher":
    """Build the teacher and read the weights that it needs, and only those; `on_loaded` is called with what was read.

    Raises:
        UserError: as `open_teacher`, or the checkpoint lacks a tensor.
    """
    opened = open_teacher(config)
    with naming(config.source):
        teacher = opened.load()
    for report in opened.loading():
        on_loaded(report)
    return teacher
