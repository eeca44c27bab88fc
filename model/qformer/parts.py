"""What both forms of the memory-bank Q-Former share: its weights, embeddings, temporal table and feed-forwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from model.config import QFormerConfig
from model.qformer.memory import MemoryBank

# What both forms use of transformers' Q-Former beyond its documented interface, of the model, of a layer that has
# cross-attention and of each attention.
_MODEL_PARTS = "embeddings.word_embeddings embeddings.position_embeddings embeddings.layernorm embeddings.dropout"
_LAYER_PARTS = "has_cross_attention feed_forward_chunk feed_forward_chunk_query intermediate intermediate_query"
_ATTENTION_PARTS = "query key value num_attention_heads config.attention_probs_dropout_prob"
# And of what ends each attention and each feed-forward.
_CLOSING_PARTS = "dense dropout LayerNorm"


@contextmanager
def without_graph() -> Iterator[None]:
    """No graph in the block, and no use of the block's casts where there is one.

    Before torch 2.11, autocast remembers a weight that it has cast without a graph, and gives it to whoever builds one.
    """
    with torch.no_grad():
        yield
    if torch.is_grad_enabled():
        torch.clear_autocast_cache()


@dataclass(frozen=True)
class QFormerMemory:
    """Everything the Q-Former knows of past frames; a value, passed in and returned.

    Attributes:
        visual: bank of past frame features f_t, shared by all cross-attention layers; token axis P, width C.
        layers: per layer, the bank of that layer's own past inputs; token axis N = Q + L, width H.
        frames_seen: how many frames have been taken in, which is the next frame's index t.
    """

    visual: MemoryBank
    layers: tuple[MemoryBank, ...]
    frames_seen: int


@dataclass(frozen=True)
class QFormerOutput:
    """The Q-Former's output for the frames asked for.

    Attributes:
        levels: 13 tensors [B, T', Q, H] for 12 layers; level u of the paper is `levels[u - 1]`, the embeddings first.
        words: the same levels of the question's tokens, [B, T', L, H].
        memory: the memory after the last frame.
    """

    levels: tuple[Tensor, ...]
    words: tuple[Tensor, ...]
    memory: QFormerMemory


@dataclass(frozen=True)
class QFormerChunk:
    """The Q-Former's output for one chunk of consecutive wanted frames.

    Attributes:
        start: index in the clip of the chunk's first frame.
        levels: as of `QFormerOutput`, for the chunk's frames.
        words: likewise.
    """

    start: int
    levels: tuple[Tensor, ...]
    words: tuple[Tensor, ...]

    @property
    def frames(self) -> range:
        """Indices in the clip of the chunk's frames."""
        return range(self.start, self.start + self.levels[0].shape[1])


@dataclass(frozen=True)
class TextTokens:
    """A question in Q-Former tokens: ids [B, L] int64 and mask [B, L] bool, True on real tokens."""

    ids: Tensor
    mask: Tensor


class QFormerParts(nn.Module):
    """Q-Former, query tokens and temporal table: the trained part between frozen features and the language model.

    The parameters are those of `transformers`' `InstructBlipQFormerModel`, so that its state dict loads unchanged.

    Args:
        qformer_config: the `qformer_config` of an InstructBLIP checkpoint.
        num_query_tokens: Q.

    Raises:
        RuntimeError: the installed transformers has another Q-Former than this code knows.
    """

    def __init__(self, qformer_config: InstructBlipQFormerConfig, num_query_tokens: int, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.qformer = InstructBlipQFormerModel(qformer_config)
        _require_known(self.qformer)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, qformer_config.hidden_size))
        # Eq. 1's PE: learned, zero at the start, so that training begins from the image model, as in MA-LMM
        # (lavis/models/blip2_models/blip2_vicuna_instruct.py, `image_pe`).
        self.frame_positions = nn.Embedding(config.max_frames, qformer_config.encoder_hidden_size)
        nn.init.zeros_(self.frame_positions.weight)
        nn.init.normal_(self.query_tokens, std=qformer_config.initializer_range)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.query_tokens.shape[1]

    @property
    def num_levels(self) -> int:
        """Levels of hidden states, the embeddings included: 13 for 12 layers."""
        return len(self.layers) + 1

    @property
    def layers(self) -> list[Any]:
        """The Q-Former's layers; Any, because transformers gives their parts no types."""
        return list(self.qformer.encoder.layer)

    def empty_memory(self, batch: int, patches: int, text_length: int) -> QFormerMemory:
        """Return the memory before the first frame of B clips with P patch tokens and L text tokens."""
        device = self.query_tokens.device
        tokens, width = self.num_queries + text_length, self.query_tokens.shape[2]
        layer = MemoryBank.empty(batch, tokens, width, device)
        visual = MemoryBank.empty(batch, patches, self.frame_positions.embedding_dim, device)
        return QFormerMemory(visual, (layer,) * (self.num_levels - 1), frames_seen=0)

    def frame_positions_of(self, first_frame: int, frames: int) -> Tensor:
        """PE(t) of Eq. 1 for that many frames from `first_frame` on: [frames, C].

        Raises:
            ValueError: the clip is longer than the temporal table.
        """
        self.require_room(first_frame + frames)
        index = torch.arange(first_frame, first_frame + frames, device=self.query_tokens.device)
        table: Tensor = self.frame_positions(index)
        return table

    def require_room(self, frames: int) -> None:
        """ValueError unless the temporal table holds that many frames."""
        if frames > self.config.max_frames:
            raise ValueError(f"clip of {frames} frames is longer than qformer.max_frames = {self.config.max_frames}")

    def add_frame_positions(self, features: Tensor, first_frame: int) -> Tensor:
        """Eq. 1: f_t = s_t + PE(t); features [B, T, P, C] of frames first_frame, first_frame + 1, ...

        Raises:
            ValueError: the clip is longer than the temporal table.
        """
        positions = self.frame_positions_of(first_frame, features.shape[1])
        return features.to(positions.dtype) + positions[:, None]

    def embed(self, text: TextTokens) -> tuple[Tensor, Tensor]:
        """Queries and question before the first layer, without dropout: [B, N, H], and their mask [B, N] bool."""
        embeddings = self.qformer.embeddings
        batch, length = text.ids.shape
        words = embeddings.word_embeddings(text.ids) + embeddings.position_embeddings.weight[:length]
        joined = torch.cat([self.query_tokens.expand(batch, -1, -1), words], dim=1)
        valid = torch.cat([text.mask.new_ones(batch, self.num_queries), text.mask], dim=1)
        return embeddings.layernorm(joined), valid

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [..., N, H] -> those of the queries [..., Q, H] and those of the question [..., L, H]."""
        return tokens[..., : self.num_queries, :], tokens[..., self.num_queries :, :]


def _require_known(qformer: Any) -> None:
    """RuntimeError with one sentence if transformers' Q-Former lacks a part that is used here."""
    try:
        attrgetter(*_MODEL_PARTS.split())(qformer)
        layer = next(layer for layer in qformer.encoder.layer if layer.has_cross_attention)
        attrgetter(*_LAYER_PARTS.split())(layer)
        for attention in (layer.attention.attention, layer.crossattention.attention):
            attrgetter(*_ATTENTION_PARTS.split())(attention)
        for block in (layer.attention.output, layer.crossattention.output, layer.output, layer.output_query):
            attrgetter(*_CLOSING_PARTS.split())(block)
    except AttributeError as error:
        message = f"transformers {transformers.__version__} has another Q-Former than this code knows: {error}"
        raise RuntimeError(message) from error
