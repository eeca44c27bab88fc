"""From configuration to networks with weights: one path for published checkpoints, local folders and tiny networks."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.config import EncoderConfig, LanguageConfig, ModelConfig, QFormerConfig, TeacherConfig
from model.frozen import load_named
from stages.errors import UserError
from stages.weights import CheckpointTensors, Repository

if TYPE_CHECKING:
    from transformers import InstructBlipConfig, PreTrainedModel

    from model.diff_lmm import DiffLMM
    from model.language import SpecialTokens
    from model.qformer import MemoryQFormer
    from model.teacher import DiTTeacher
    from model.vision import VisionEncoder

_LOG = logging.getLogger(__name__)

# What each frozen network reads from its checkpoint, by name: the digest in the cache's fingerprint covers just this.
_ENCODER_PREFIXES = ("vision_model.",)
_VAE_PREFIXES = ("encoder.", "quant_conv.")
_INSTRUCTBLIP = "instructblip"
_PROJECTION = "language_projection."


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
    size = _instructblip_config(repository).vision_config.image_size
    return FrozenSource(int(size), repository.tensors().digest(_ENCODER_PREFIXES))


def load_encoder(config: EncoderConfig) -> "VisionEncoder":
    """Build the visual encoder and read its weights, and only those."""
    from model.vision import VisionEncoder

    repository = Repository(config.source)
    described = _instructblip_config(repository).vision_config.to_dict()
    with _naming(config.source):
        return VisionEncoder.from_tensors(described, repository.tensors())


def describe_teacher(config: TeacherConfig) -> FrozenSource:
    """Input size and weight digest of the teacher, without building it."""
    repository = Repository(config.source)
    dit, vae = repository.json("transformer/config.json"), repository.json("vae/config.json")
    with _naming(config.source):
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
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    repository = Repository(config.source)
    if repository.json("config.json").get("model_type") != _INSTRUCTBLIP:
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                repository.folder or config.source, dtype=dtype
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no language model: {reason}", where=config.source) from error
        return model
    with _naming(config.source), no_init_weights():
        model = AutoModelForCausalLM.from_config(_instructblip_config(repository).text_config, dtype=dtype)
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
    stored = start.get(f"{_PROJECTION}weight")
    if stored is not None and stored.shape != model.language_projection.weight.shape:
        _LOG.warning("language_projection starts at random: %s fits another language model", config.qformer.source)
        return model
    with _naming(config.qformer.source):
        load_named(model.language_projection, start, prefix=_PROJECTION)
    return model


def _start_qformer(config: QFormerConfig, visual_width: int) -> tuple["MemoryQFormer", CheckpointTensors]:
    from model.qformer import MemoryQFormer

    repository = Repository(config.source)
    described = _instructblip_config(repository)
    # transformers sets encoder_hidden_size to the vision tower's width, whatever the file says.
    if described.qformer_config.encoder_hidden_size != visual_width:
        raise UserError(
            f"the Q-Former takes features of width {described.qformer_config.encoder_hidden_size}, "
            f"the cache holds {visual_width}",
            where=f"qformer.source {config.source}",
            hint="train from the checkpoint whose vision tower made the cache",
        )
    qformer = MemoryQFormer(described.qformer_config, described.num_query_tokens, config)
    tensors = repository.tensors()
    with _naming(config.source):
        load_named(qformer.qformer, tensors, prefix="qformer.")
        _load_parameter(qformer.query_tokens, tensors, "query_tokens")
    return qformer, tensors


def _load_parameter(parameter: torch.nn.Parameter, tensors: CheckpointTensors, name: str) -> None:
    """Fill one parameter that belongs to no module of its own; ValueError as `load_named`."""
    if name not in tensors:
        raise ValueError(f"checkpoint lacks {name}")
    stored = tensors[name]
    if stored.shape != parameter.shape:
        raise ValueError(f"{name}: checkpoint {tuple(stored.shape)}, model {tuple(parameter.shape)}")
    parameter.data.copy_(stored)


def _instructblip_config(repository: Repository) -> "InstructBlipConfig":
    """The repository's configuration, complete: published files leave out what equals transformers' defaults.

    Raises:
        UserError: the repository describes another kind of network.
    """
    from transformers import InstructBlipConfig

    described = repository.json("config.json")
    if described.get("model_type") != _INSTRUCTBLIP:
        raise UserError(
            "not an InstructBLIP checkpoint",
            where=repository.source,
            received=described.get("model_type"),
            allowed=f"config.json with model_type {_INSTRUCTBLIP}",
            hint="set the source to an InstructBLIP folder or hub id",
        )
    return InstructBlipConfig.from_dict(described)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn a checkpoint that does not fit into one line that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error), where=source) from error
