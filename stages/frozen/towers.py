"""The vision towers of InstructBLIP and CLIP, opened from their checkpoints but not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from model.config import EncoderConfig, TowerSettings
from model.pixels import CLIP_PIXELS, PixelStatistics
from stages.cache.fingerprint import Scalar
from stages.errors import UserError
from stages.frozen.pixels import pixel_statistics
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.instructblip import INSTRUCTBLIP, instructblip_config, loading, naming
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository

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


@dataclass(frozen=True)
class OpenedEncoder:
    """A vision tower's configuration object of transformers; its weights are looked for when they are asked for.

    Attributes:
        repository: where it is.
        family: instructblip or clip.
        described: transformers' configuration of the tower.
        pixels: how it sees them.
        layer: the block that is read; None: the last.
        random_seed: of weights that are not the checkpoint's.
    """

    repository: Repository
    family: str
    described: Any
    pixels: PixelStatistics
    layer: int | None
    random_seed: int | None = None

    @property
    def tokens(self) -> int:
        """P, patch tokens with the class token."""
        return (self.described.image_size // self.described.patch_size) ** 2 + 1

    @property
    def width(self) -> int:
        """C."""
        return int(self.described.hidden_size)

    @property
    def size_px(self) -> int:
        """Side of its square picture."""
        return int(self.described.image_size)

    @cached_property
    def tensors(self) -> Mapping[str, Tensor]:
        """The checkpoint's tensors by name, unread; none where weights are random."""
        return {} if self.random_seed is not None else self.repository.tensors()

    @property
    def prefix(self) -> str:
        """Of the tensors' names: transformers 5 writes a bare CLIP vision model without it, earlier ones with it."""
        bare = self.family == _CLIP and not any(name.startswith(_PREFIX) for name in self.tensors)
        return "" if bare else _PREFIX

    def describe(self) -> FrozenSource:
        """Of the tower up to the layer that is read."""
        if self.random_seed is not None:
            digest = random_digest(self.random_seed, self.described.to_dict())
        else:
            assert isinstance(self.tensors, CheckpointTensors)
            layers = range(self.layer or self.described.num_hidden_layers)
            names = (*_VISION_EMBEDDINGS, *(f"encoder.layers.{index}." for index in layers))
            if self.family == INSTRUCTBLIP and self.layer is None:
                names = (*names, "post_layernorm.")
            digest = self.tensors.digest(self.prefix + name for name in names)
        facts: dict[str, Scalar] = {"family": self.family, "pixels": str(self.pixels)}
        return FrozenSource(self.size_px, digest, facts, self.loading())

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return (self.tensors.loading(),) if isinstance(self.tensors, CheckpointTensors) else ()


@dataclass(frozen=True)
class OpenedTower:
    """The visual encoder that is the teacher."""

    config: TowerSettings
    encoder: OpenedEncoder

    @property
    def tokens(self) -> int:
        """Patch tokens that are pooled, without the class token; or the class token alone."""
        return 1 if self.config.pooling == "class" else self.encoder.tokens - 1

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.width

    @property
    def size_px(self) -> int:
        """Side of its square picture."""
        return self.encoder.size_px

    def describe(self) -> FrozenSource:
        """As that of the encoder."""
        return self.encoder.describe()

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return self.encoder.loading()

    def load(self) -> "Teacher":
        """Build the tower with its weights."""
        from model.teachers.tower import TowerTeacher

        return TowerTeacher(
            self.config,
            vision_config=self.encoder.described,
            tensors=self.encoder.tensors,
            prefix=self.encoder.prefix,
            pixels=self.encoder.pixels,
        )


def open_encoder(config: EncoderConfig) -> OpenedEncoder:
    """Look into a repository of one of `TOWER_FAMILY`.

    Raises:
        UserError: it is of another family, or has no such layer.
    """
    opened = _open(config)
    with naming(config.source):
        config.require_fits(opened.described.num_hidden_layers)
    return opened


def open_tower(config: TowerSettings) -> OpenedTower:
    """The same as a teacher."""
    opened = _open(config.as_encoder(), config.random_seed)
    with naming(config.source):
        config.require_fits(opened.described.num_hidden_layers)
    return OpenedTower(config, opened)


def _open(config: EncoderConfig, random_seed: int | None = None) -> OpenedEncoder:
    repository = Repository(config.source)
    family = repository.json("config.json").get("model_type")
    if family == INSTRUCTBLIP:
        described = instructblip_config(repository).vision_config
    elif family in (_CLIP, _CLIP_VISION):
        described, family = _clip_vision_config(repository, family), _CLIP
    else:
        raise UserError(
            "not a visual encoder that is known here",
            where=config.source,
            received=family,
            allowed=f"config.json with model_type {INSTRUCTBLIP}, {_CLIP} or {_CLIP_VISION}",
            hint="set encoder.source to an InstructBLIP or CLIP folder or hub id",
        )
    pixels = pixel_statistics(repository, CLIP_PIXELS)
    return OpenedEncoder(repository, family, described, pixels, config.layer, random_seed)


def _clip_vision_config(repository: Repository, family: str) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    described = repository.json("config.json")
    with loading("configuration", repository.source):
        if family == _CLIP:
            return CLIPConfig.from_dict(described).vision_config
        return CLIPVisionConfig.from_dict(described)
