"""The networks of Stage 1 from their checkpoints: visual encoder and teacher, described or loaded."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.config import EncoderConfig, TeacherConfig
from stages.instructblip import instructblip_config, naming
from stages.weights import Repository

if TYPE_CHECKING:
    from model.teacher import DiTTeacher
    from model.vision import VisionEncoder

# What each frozen network reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_ENCODER_PREFIXES = ("vision_model.",)
_VAE_PREFIXES = ("encoder.", "quant_conv.")


@dataclass(frozen=True)
class FrozenSource:
    """A frozen network's checkpoint, opened but not loaded.

    Attributes:
        size_px: side of the square picture the network takes.
        digest: SHA-256 over the weights that the network reads.
    """

    size_px: int
    digest: str


def describe_encoder(config: EncoderConfig) -> FrozenSource:
    """Input size and weight digest of the visual encoder, without building it."""
    repository = Repository(config.source)
    size = instructblip_config(repository).vision_config.image_size
    return FrozenSource(int(size), repository.tensors().digest(_ENCODER_PREFIXES))


def load_encoder(config: EncoderConfig) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those."""
    from model.vision import VisionEncoder

    repository = Repository(config.source)
    described = instructblip_config(repository).vision_config.to_dict()
    with naming(config.source):
        return VisionEncoder.from_tensors(described, repository.tensors())


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it."""
    repository = Repository(config.source)
    dit, vae = repository.json("transformer/config.json"), repository.json("vae/config.json")
    with naming(config.source):
        config.require_fits(dit)
    size = dit["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    blocks = tuple(f"transformer_blocks.{index}." for index in range(config.block))
    digests = (
        repository.tensors("transformer").digest(("pos_embed.", *blocks)),
        repository.tensors("vae").digest(_VAE_PREFIXES),
    )
    return FrozenSource(size, "-".join(digests))


def load_teacher(config: TeacherConfig) -> "DiTTeacher":
    """Build the teacher and read the weights of its blocks and of the VAE's encoder, and only those."""
    from model.teacher import DiTTeacher

    repository = Repository(config.source)
    with naming(config.source):
        return DiTTeacher(
            config,
            dit_config=repository.json("transformer/config.json"),
            dit_tensors=repository.tensors("transformer"),
            vae_config=repository.json("vae/config.json"),
            vae_tensors=repository.tensors("vae"),
        )
