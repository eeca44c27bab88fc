"""The vision towers of InstructBLIP and CLIP, opened from their checkpoints but not loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.config import EncoderConfig
from model.pixels import CLIP_PIXELS, PixelStatistics
from stages.cache.fingerprint import Scalar
from stages.errors import UserError
from stages.frozen.pixels import pixel_statistics
from stages.frozen.source import FrozenSource, random_digest
from stages.weights.instructblip import INSTRUCTBLIP, instructblip_config, loading
from stages.weights.repository import CheckpointTensors, LoadingReport, Repository

# What a tower reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_VISION_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.patch_embedding.",
    "embeddings.position_embedding",
    "pre_layrnorm.",  # CLIP's, spelt like this
)

_CLIP, _CLIP_VISION = "clip", "clip_vision_model"
TOWER_FAMILY = (INSTRUCTBLIP, _CLIP, _CLIP_VISION)


@dataclass(frozen=True)
class OpenedEncoder:
    """A vision tower's configuration object of transformers, and where its tensors are, unless they are random."""

    family: str
    described: Any
    tensors: CheckpointTensors | None
    prefix: str
    pixels: PixelStatistics

    def describe(self, layer: int | None, random_seed: int | None = None) -> FrozenSource:
        """Of the tower up to a layer, or up to its end."""
        if self.tensors is None:
            assert random_seed is not None
            digest = random_digest(random_seed, self.described.to_dict())
        else:
            layers = range(layer or self.described.num_hidden_layers)
            names = (*_VISION_EMBEDDINGS, *(f"encoder.layers.{index}." for index in layers))
            if self.family == INSTRUCTBLIP and layer is None:
                names = (*names, "post_layernorm.")
            digest = self.tensors.digest(self.prefix + name for name in names)
        facts: dict[str, Scalar] = {"family": self.family, "pixels": str(self.pixels)}
        return FrozenSource(int(self.described.image_size), digest, facts, self.loading())

    def stored(self) -> Mapping[str, Tensor]:
        """The checkpoint's tensors by name, unread."""
        return {} if self.tensors is None else self.tensors

    def loading(self) -> tuple[LoadingReport, ...]:
        """What has been read of the checkpoint."""
        return () if self.tensors is None else (self.tensors.loading(),)


def open_encoder(config: EncoderConfig, *, trained: bool = True) -> OpenedEncoder:
    """Look into a repository of one of `TOWER_FAMILY`; without its tensors unless `trained`.

    Raises:
        UserError: it is of another family.
    """
    repository = Repository(config.source)
    family = repository.json("config.json").get("model_type")
    tensors = repository.tensors() if trained else None
    prefix = "vision_model."
    if family == INSTRUCTBLIP:
        described = instructblip_config(repository).vision_config
    elif family in (_CLIP, _CLIP_VISION):
        described = _clip_vision_config(repository, family)
        # transformers 5 writes a bare vision model without the prefix, earlier versions with it.
        prefix = prefix if any(name.startswith(prefix) for name in tensors or ()) else ""
        family = _CLIP
    else:
        raise UserError(
            "not a visual encoder that is known here",
            where=config.source,
            received=family,
            allowed=f"config.json with model_type {INSTRUCTBLIP}, {_CLIP} or {_CLIP_VISION}",
            hint="set encoder.source to an InstructBLIP or CLIP folder or hub id",
        )
    return OpenedEncoder(family, described, tensors, prefix, pixel_statistics(repository, CLIP_PIXELS))


def _clip_vision_config(repository: Repository, family: str) -> Any:
    from transformers import CLIPConfig, CLIPVisionConfig

    described = repository.json("config.json")
    with loading("configuration", repository.source):
        if family == _CLIP:
            return CLIPConfig.from_dict(described).vision_config
        return CLIPVisionConfig.from_dict(described)
