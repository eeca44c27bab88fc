"""DINOv2 teachers, opened from their checkpoints but not loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import DinoSettings
from model.pixels import IMAGENET_PIXELS
from stages.errors import UserError
from stages.frozen.pixels import pixel_statistics, preprocessor
from stages.frozen.transformer import OpenedTransformer
from stages.weights.instructblip import loading, naming
from stages.weights.repository import Repository

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
class OpenedDino(OpenedTransformer):
    """A DINOv2."""

    config: DinoSettings

    @property
    def tokens(self) -> int:
        """Tokens that are pooled: the patches, or only the class token."""
        return 1 if self.config.pooling == "class" else self.patches

    def names(self) -> Iterable[str]:
        """Embeddings, blocks and the last LayerNorm."""
        last = ("layernorm.",) if self.layer is None else ()
        return (*_DINO_EMBEDDINGS, *(f"encoder.layer.{index}." for index in self.blocks), *last)

    def load(self) -> "Teacher":
        from model.teachers.dino import DinoTeacher

        return DinoTeacher(
            self.config,
            dino_config=self.described,
            tensors=self.tensors,
            size_px=self.size_px,
            pixels=self.pixels,
        )


def open_dino(config: DinoSettings) -> OpenedDino:
    """Look into a repository of one of `DINOV2_FAMILY`; UserError if it is none, or has no such block."""
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    repository = Repository(config.source)
    content = repository.json("config.json")
    family = content.get("model_type")
    if family not in DINOV2_FAMILY:
        raise UserError("not a DINOv2", where=config.source, received=family, hint="set teacher.source to one")
    with loading("configuration", config.source):
        described = (Dinov2Config if family == _DINOV2 else Dinov2WithRegistersConfig).from_dict(content)
    with naming(config.source):
        config.require_fits(described.num_hidden_layers)
    size_px, pixels = _crop_size_px(repository), pixel_statistics(repository, IMAGENET_PIXELS)
    return OpenedDino(repository, family, described, size_px, pixels, config.block, config.random_seed, config)


def _crop_size_px(repository: Repository) -> int:
    """Side of a DINOv2's picture: what its processor crops to, which is not what its table of positions is for."""
    stated = preprocessor(repository).get("crop_size", _DINO_SIZE_PX)
    if isinstance(stated, dict):
        stated = stated.get("height", stated.get("shortest_edge", _DINO_SIZE_PX))
    return int(stated)
