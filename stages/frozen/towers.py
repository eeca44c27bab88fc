"""The vision towers of InstructBLIP and CLIP, opened from their checkpoints but not loaded."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model.config import EncoderConfig, TowerSettings
from model.pixels import CLIP_PIXELS, PixelStatistics
from stages.errors import UserError
from stages.frozen.pixels import pixel_statistics
from stages.frozen.transformer import OpenedTransformer
from stages.weights.instructblip import INSTRUCTBLIP, instructblip_config, loading, naming
from stages.weights.repository import Repository
from stages.weights.whole_files import Needs

if TYPE_CHECKING:
    from model.teachers.base import Teacher

# What a tower reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_VISION_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.",
    "embeddings.position_embedding",
    "pre_layrnorm.",  # CLIP's, spelt like this
)

_CLIP, _CLIP_VISION = "clip", "clip_vision_model"
_PREFIX = "vision_model."
TOWER_FAMILY = (INSTRUCTBLIP, _CLIP, _CLIP_VISION)
TOWER_NEEDS = Needs(("config.json",), prefixes=(_PREFIX,))


class OpenedEncoder(OpenedTransformer):
    """A vision tower."""

    @property
    def tokens(self) -> int:
        """P, patch tokens with the class token."""
        return self.patches + 1

    @property
    def prefix(self) -> str:
        """Of the tensors' names: transformers 5 writes a bare CLIP vision model without it, earlier ones with it."""
        bare = self.family == _CLIP and not any(name.startswith(_PREFIX) for name in self.tensors)
        return "" if bare else _PREFIX

    def names(self) -> Iterable[str]:
        """Embeddings, blocks, and an InstructBLIP's last LayerNorm."""
        last = ("post_layernorm.",) if self.family == INSTRUCTBLIP and self.layer is None else ()
        names = (*_VISION_EMBEDDINGS, *(f"encoder.layers.{index}." for index in self.blocks), *last)
        return (self.prefix + name for name in names)


@dataclass(frozen=True)
class OpenedTower(OpenedEncoder):
    """The visual encoder that is the teacher."""

    config: TowerSettings

    @property
    def tokens(self) -> int:
        """Tokens that are pooled: the patches, or only the class token."""
        return 1 if self.config.pooling == "class" else self.patches

    def load(self) -> "Teacher":
        from model.teachers.tower import TowerTeacher

        return TowerTeacher(
            self.config,
            vision_config=self.described,
            tensors=self.tensors,
            prefix=self.prefix,
            pixels=self.pixels,
        )


def open_encoder(config: EncoderConfig) -> OpenedEncoder:
    """Look into a repository of one of `TOWER_FAMILY`.

    Raises:
        UserError: it is of another family, or has no such layer.
    """
    repository, family, described, pixels = _look_into(config.source)
    with naming(config.source):
        config.require_fits(described.num_hidden_layers)
    return OpenedEncoder(repository, family, described, described.image_size, pixels, config.layer, None)


def open_tower(config: TowerSettings) -> OpenedTower:
    """The same as a teacher."""
    repository, family, described, pixels = _look_into(config.source)
    with naming(config.source):
        config.require_fits(described.num_hidden_layers)
    size_px, seed = described.image_size, config.random_seed
    return OpenedTower(repository, family, described, size_px, pixels, config.block, seed, config)


def _look_into(source: str) -> tuple[Repository, str, Any, PixelStatistics]:
    repository = Repository(source)
    family = repository.json("config.json").get("model_type")
    if family == INSTRUCTBLIP:
        described = instructblip_config(repository).vision_config
    elif family in (_CLIP, _CLIP_VISION):
        described, family = _clip_vision_config(repository, family), _CLIP
    else:
        raise UserError(
            "not a visual encoder that is known here",
            where=source,
            received=family,
            allowed=f"config.json with model_type {INSTRUCTBLIP}, {_CLIP} or {_CLIP_VISION}",
            hint="set encoder.source to an InstructBLIP or CLIP folder or hub id",
        )
    return repository, family, described, pixel_statistics(repository, CLIP_PIXELS)


def _clip_vision_config(repository: Repository, family: str) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    described = repository.json("config.json")
    with loading("configuration", repository.source):
        if family == _CLIP:
            return CLIPConfig.from_dict(described).vision_config
        return CLIPVisionConfig.from_dict(described)
