"""The networks of Stage 1 from their checkpoints: visual encoder and teacher, described or loaded.

What a checkpoint says of itself (`model_type` in its config.json, the subfolders of a DiT pipeline, the name of an
original DiT file) decides which network it is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import EncoderConfig, TeacherConfig
from stages.frozen.dino import DINOV2_FAMILY, OpenedDino, open_dino
from stages.frozen.dit import ORIGINAL_SUFFIXES, ORIGINAL_VAE, OpenedDiT, open_dit, open_original_dit
from stages.frozen.source import FrozenSource, remembered
from stages.frozen.towers import TOWER_FAMILY, OpenedEncoder, open_encoder
from stages.weights.instructblip import naming
from stages.weights.repository import LoadingReport, OnLoaded, Repository, log_loading

if TYPE_CHECKING:
    from model.teachers.base import Teacher
    from model.vision import VisionEncoder

__all__ = [
    "DINOV2_FAMILY",
    "ORIGINAL_SUFFIXES",
    "ORIGINAL_VAE",
    "TOWER_FAMILY",
    "describe_encoder",
    "describe_teacher",
    "load_encoder",
    "load_teacher",
]


def describe_encoder(config: EncoderConfig) -> FrozenSource:
    """Input size and weight digest of the visual encoder, without building it.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one without the layer asked for.
    """
    return remembered("encoder", config, lambda: _describe_encoder(config))


def _describe_encoder(config: EncoderConfig) -> FrozenSource:
    opened = open_encoder(config)
    with naming(config.source):
        config.require_fits(opened.described.num_hidden_layers)
    return opened.describe(config.layer)


def load_encoder(config: EncoderConfig, on_loaded: OnLoaded = log_loading) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those; `on_loaded` is told what was read.

    Raises:
        UserError: no InstructBLIP or CLIP checkpoint, or one that lacks the layer or a tensor.
    """
    from model.vision import VisionEncoder

    opened = open_encoder(config)
    with naming(config.source):
        encoder = VisionEncoder(
            config,
            vision_config=opened.described,
            tensors=opened.stored(),
            prefix=opened.prefix,
            pixels=opened.pixels,
        )
    for report in opened.loading():
        on_loaded(report)
    return encoder


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it.

    Raises:
        UserError: neither a DiT, a DINOv2 nor a vision tower, or one that settings do not fit.
    """
    return remembered("teacher", config, lambda: _describe_teacher(config))


def _describe_teacher(config: TeacherConfig) -> FrozenSource:
    opened = _open_teacher(config)
    with naming(config.source):
        return opened.describe(config)


def load_teacher(config: TeacherConfig, on_loaded: OnLoaded = log_loading) -> "Teacher":
    """Build the teacher and read the weights that it needs, and only those; `on_loaded` is told what was read.

    Raises:
        UserError: neither a DiT, a DINOv2 nor a vision tower, or one that settings do not fit or that lacks a tensor.
    """
    opened = _open_teacher(config)
    with naming(config.source):
        teacher = opened.load(config)
    for report in opened.loading():
        on_loaded(report)
    return teacher


@dataclass(frozen=True)
class _OpenedTower:
    """The visual encoder that is the teacher."""

    encoder: OpenedEncoder

    def describe(self, config: TeacherConfig) -> FrozenSource:
        config.require_fits_tower(self.encoder.described.num_hidden_layers)
        return self.encoder.describe(config.tower_block, config.random_seed)

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return self.encoder.loading()

    def load(self, config: TeacherConfig) -> "Teacher":
        from model.teachers.tower import TowerTeacher

        return TowerTeacher(
            config,
            vision_config=self.encoder.described,
            tensors=self.encoder.stored(),
            prefix=self.encoder.prefix,
            pixels=self.encoder.pixels,
        )


def _open_teacher(config: TeacherConfig) -> OpenedDiT | OpenedDino | _OpenedTower:
    if config.source.endswith(ORIGINAL_SUFFIXES):
        return open_original_dit(config)
    repository = Repository(config.source)
    found = repository.find("config.json")
    # A DiT pipeline has no configuration at its root.
    family = None if found is None else repository.json("config.json").get("model_type")
    if family in DINOV2_FAMILY:
        return open_dino(config, repository, family)
    if family in TOWER_FAMILY:
        return _OpenedTower(open_encoder(config.as_encoder(), trained=config.random_seed is None))
    return open_dit(config, repository)
