"""DINOv2 teachers, opened from their checkpoints but not loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import TeacherConfig
from model.pixels import IMAGENET_PIXELS, PixelStatistics
from stages.cache.fingerprint import Scalar
from stages.frozen.pixels import pixel_statistics, preprocessor
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.instructblip import loading, naming
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository

if TYPE_CHECKING:
    from model.teachers.base import Teacher

# What the network reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_DINO_EMBEDDINGS = (
    "embeddings.cls_token",
    "embeddings.register_tokens",
    "embeddings.patch_embeddings.",
    "embeddings.position_embeddings",
)

_DINOV2 = "dinov2"
DINOV2_FAMILY = (_DINOV2, "dinov2_with_registers")
# The published pictures; the table of positions is for 518 px.
_DINO_SIZE_PX = 224


@dataclass(frozen=True)
class OpenedDino:
    """A DINOv2's configuration object of transformers, and where its tensors are."""

    family: str
    described: Any
    tensors: CheckpointTensors | None
    size_px: int
    pixels: PixelStatistics

    def describe(self, config: TeacherConfig) -> FrozenSource:
        """Input size, digest of what is read, and what the checkpoint says; UserError if settings do not fit."""
        config.require_fits_dino(self.described.num_hidden_layers)
        facts: dict[str, Scalar] = {"family": self.family, "pixels": str(self.pixels)}
        if self.tensors is None:
            assert config.random_seed is not None
            digest = random_digest(config.random_seed, self.described.to_dict())
        else:
            blocks = range(config.dino_block or self.described.num_hidden_layers)
            names = (*_DINO_EMBEDDINGS, *(f"encoder.layer.{index}." for index in blocks))
            digest = self.tensors.digest(names if config.dino_block else (*names, "layernorm."))
        return FrozenSource(self.size_px, digest, facts, self.loading())

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return () if self.tensors is None else (self.tensors.loading(),)

    def load(self, config: TeacherConfig) -> "Teacher":
        """Build the network with its weights."""
        from model.teachers.dino import DinoTeacher

        return DinoTeacher(
            config,
            dino_config=self.described,
            tensors={} if self.tensors is None else self.tensors,
            size_px=self.size_px,
            pixels=self.pixels,
        )


def open_dino(config: TeacherConfig, repository: Repository, family: str) -> OpenedDino:
    """Look into a repository of one of `DINOV2_FAMILY`; UserError if a setting asks for another family."""
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    with naming(config.source):
        config.require_family("dinov2")
    with loading("configuration", config.source):
        described = (Dinov2Config if family == _DINOV2 else Dinov2WithRegistersConfig).from_dict(
            repository.json("config.json")
        )
    return OpenedDino(
        family,
        described,
        None if config.random_seed is not None else repository.tensors(),
        _crop_size_px(repository),
        pixel_statistics(repository, IMAGENET_PIXELS),
    )


def _crop_size_px(repository: Repository) -> int:
    """Side of a DINOv2's picture: what its processor crops to, which is not what its table of positions is for."""
    stated = preprocessor(repository).get("crop_size", _DINO_SIZE_PX)
    if isinstance(stated, dict):
        stated = stated.get("height", stated.get("shortest_edge", _DINO_SIZE_PX))
    return int(stated)
