"""The networks of Stage 2 from their checkpoints: the language model, and the Q-Former with all that is trained."""

import logging
from typing import TYPE_CHECKING

import torch

from model.config import LanguageConfig, ModelConfig, QFormerConfig
from model.frozen import load_named
from stages.errors import UserError
from stages.instructblip import INSTRUCTBLIP, instructblip_config, naming
from stages.weights import CheckpointTensors, Repository

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from model.diff_lmm import DiffLMM
    from model.language import SpecialTokens
    from model.qformer import MemoryQFormer

_LOG = logging.getLogger(__name__)

_PROJECTION = "language_projection."


def load_language(config: LanguageConfig, dtype: torch.dtype) -> "PreTrainedModel":
    """Read the frozen causal language model out of an InstructBLIP checkpoint, or any of transformers' own."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    repository = Repository(config.source)
    if repository.json("config.json").get("model_type") != INSTRUCTBLIP:
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                repository.folder or config.source, dtype=dtype
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no language model: {reason}", where=config.source) from error
        return model
    with naming(config.source), no_init_weights():
        model = AutoModelForCausalLM.from_config(instructblip_config(repository).text_config, dtype=dtype)
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
    with naming(config.qformer.source):
        load_named(model.language_projection, start, prefix=_PROJECTION)
    return model


def _start_qformer(config: QFormerConfig, visual_width: int) -> tuple["MemoryQFormer", CheckpointTensors]:
    from model.qformer import MemoryQFormer

    repository = Repository(config.source)
    described = instructblip_config(repository)
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
    with naming(config.source):
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
