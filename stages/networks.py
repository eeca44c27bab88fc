"""From configuration to networks with weights: one path for published checkpoints, local folders and tiny networks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from model.config import EncoderConfig, LanguageConfig, ModelConfig, QFormerConfig, TeacherConfig
from model.frozen import load_named
from stages.errors import UserError
from stages.weights import CheckpointTensors, Repository

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from model.diff_lmm import DiffLMM
    from model.language import SpecialTokens
    from model.qformer import MemoryQFormer
    from model.teacher import DiTTeacher
    from model.vision import VisionEncoder

_LOG = logging.getLogger(__name__)

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
    size = _vision_config(repository)["image_size"]
    return FrozenSource(int(size), repository.tensors().digest(_ENCODER_PREFIXES))


def load_encoder(config: EncoderConfig) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those."""
    from model.vision import VisionEncoder

    repository = Repository(config.source)
    with _naming(config.source):
        return VisionEncoder.from_tensors(_vision_config(repository), repository.tensors())


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it."""
    repository = Repository(config.source)
    dit, vae = repository.json("transformer/config.json"), repository.json("vae/config.json")
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
    with _naming(config.source):
        return DiTTeacher(
            config,
            dit_config=repository.json("transformer/config.json"),
            dit_tensors=repository.tensors("transformer"),
            vae_config=repository.json("vae/config.json"),
            vae_tensors=repository.tensors("vae"),
        )


def load_language(config: LanguageConfig, dtype: torch.dtype) -> "PreTrainedModel":
    """Read the frozen causal language model out of an InstructBLIP checkpoint, or any of transformers' own."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    repository = Repository(config.source)
    described = repository.json("config.json")
    if described.get("model_type") != "instructblip":
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(repository.folder or config.source, dtype=dtype)
        return model
    text = dict(described["text_config"])
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text), dtype=dtype)
    with _naming(config.source):
        load_named(model, repository.tensors(), prefix="language_model.")
    return model


def build_diff_lmm(
    config: ModelConfig,
    *,
    language: "PreTrainedModel",
    special: "SpecialTokens",
    visual_width: int,
    target_width: int | None,
    seed: int,
) -> "DiffLMM":
    """Build Stage 2's model as training starts it.

    Args:
        config: the networks.
        language: the frozen language model, weights loaded.
        special: its `SpecialTokens`.
        visual_width: C of the cached features.
        target_width: D of the cached targets; None to build no alignment heads whatever lambda says.
        seed: of every weight that no checkpoint gives.
    """
    from model.alignment import Alignment
    from model.diff_lmm import DiffLMM
    from model.language import FrozenLanguageModel

    torch.manual_seed(seed)
    qformer, start = _start_qformer(config.qformer, visual_width)
    alignment = None
    if config.alignment.kd_weight > 0 and target_width is not None:
        alignment = Alignment(
            config.alignment,
            hidden_width=qformer.query_tokens.shape[2],
            target_width=target_width,
            num_levels=qformer.num_levels,
        )
    frozen = FrozenLanguageModel(language, special)
    model = DiffLMM(qformer, frozen, alignment, config.alignment.kd_weight)
    if start["language_projection.weight"].shape == model.language_projection.weight.shape:
        load_named(model.language_projection, start, prefix="language_projection.")
    else:
        _LOG.warning("language_projection starts at random: %s fits another language model", config.qformer.source)
    return model


def _start_qformer(config: QFormerConfig, visual_width: int) -> tuple["MemoryQFormer", CheckpointTensors]:
    from transformers import InstructBlipQFormerConfig

    from model.qformer import MemoryQFormer

    repository = Repository(config.source)
    described = repository.json("config.json")
    shape = {**described["qformer_config"], "encoder_hidden_size": described["vision_config"]["hidden_size"]}
    if shape["encoder_hidden_size"] != visual_width:
        raise UserError(
            f"the Q-Former takes features of width {shape['encoder_hidden_size']}, the cache holds {visual_width}",
            where=f"qformer.source {config.source}",
            hint="train from the checkpoint whose vision tower made the cache",
        )
    qformer = MemoryQFormer(InstructBlipQFormerConfig(**shape), described["num_query_tokens"], config)
    tensors = repository.tensors()
    with _naming(config.source):
        load_named(qformer.qformer, tensors, prefix="qformer.")
    qformer.query_tokens.data.copy_(tensors["query_tokens"])
    return qformer, tensors


def _vision_config(repository: Repository) -> dict[str, Any]:
    described = repository.json("config.json")
    if "vision_config" not in described:
        raise UserError(
            "not an InstructBLIP checkpoint: config.json has no vision_config",
            where=repository.source,
            hint="set encoder.source to an InstructBLIP folder or hub id",
        )
    vision: dict[str, Any] = described["vision_config"]
    return vision


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=source) from error
