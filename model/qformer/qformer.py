"""The Q-Former with a memory bank (MA-LMM; paper, section 3.1), in two forms over one set of weights.

`MemoryQFormer.step` takes one frame and a memory and returns the next memory: the plain form, for streaming and as the
reference. `MemoryQFormer.forward` takes a clip and computes chunks of frames at once (`model.qformer.clip`). Both give
the same hidden states and gradients.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.qformer import clip
from model.qformer.memory import append
from model.qformer.parts import QFormerChunk, QFormerMemory, QFormerOutput, QFormerParts, TextTokens, without_graph


class MemoryQFormer(QFormerParts):
    """The Q-Former with a memory bank, in both forms."""

    def step(self, memory: QFormerMemory, frame: Tensor, text: TextTokens) -> QFormerOutput:
        """Take in one frame's features [B, P, C], exactly as published: remembered inputs are projected again.

        Returns levels of shape [B, 1, Q, H].
        """
        visual = self.add_frame_positions(frame[:, None], memory.frames_seen)[:, 0]  # [B, P, C]
        seen = torch.cat([memory.visual.slots.to(visual.dtype), visual[:, None]], dim=1).flatten(1, 2)
        embedded, valid = self.embed(text)
        hidden = self.qformer.embeddings.dropout(embedded)
        levels, banks = [hidden], []
        for layer, bank in zip(self.layers, memory.layers, strict=True):
            remembered = torch.cat([bank.slots.to(hidden.dtype), hidden[:, None]], dim=1).flatten(1, 2)
            key_mask = valid.repeat(1, bank.num_slots + 1)[:, None, None]  # [B, 1, 1, (m+1) N]
            banks.append(append(bank, hidden, self.config.memory_slots))
            queries, words = self.split(_attend_plain(layer.attention, hidden, remembered, key_mask))
            if layer.has_cross_attention:
                queries = _attend_plain(layer.crossattention, queries, seen, None)
            hidden = torch.cat([layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(words)], dim=1)
            levels.append(hidden)
        memory = QFormerMemory(
            append(memory.visual, visual, self.config.memory_slots), tuple(banks), memory.frames_seen + 1
        )
        return QFormerOutput(*self._split_levels([level[:, None] for level in levels]), memory)

    def forward(
        self,
        features: Tensor,
        text: TextTokens,
        *,
        wanted_frames: Sequence[int] | None = None,
        frames_per_chunk: int | None = None,
        memory: QFormerMemory | None = None,
        seeds: Tensor | None = None,
    ) -> QFormerOutput:
        """Take in a clip's features [B, T, P, C] and return the hidden states of the wanted frames, in time order.

        Frames that are not wanted only feed the memory: they build no graph and skip the last layer.

        Args:
            features: frozen visual features; they never get a gradient.
            text: the question.
            wanted_frames: indices into the clip; None means all.
            frames_per_chunk: frames computed at once; None means twice the number of slots. It changes no value.
            memory: what was seen before this clip; None means nothing. One made under `torch.inference_mode` cannot be
                used where gradients are taken.
            seeds: [B] int64, one for each clip's dropout in training; None draws them.

        Raises:
            ValueError: no frame is wanted, an index is out of range, or the clip is longer than the temporal table.
        """
        chunks = self._chunks(features, text, wanted_frames, frames_per_chunk, memory, seeds)
        outputs = []
        for chunk, carried in chunks:
            after = carried
            if chunk is not None:
                outputs.append(chunk)
        levels, words = (
            tuple(torch.cat(parts, dim=1) for parts in zip(*column, strict=True))
            for column in ([chunk.levels for chunk in outputs], [chunk.words for chunk in outputs])
        )
        return QFormerOutput(levels, words, after.memory)

    def chunks(
        self,
        features: Tensor,
        text: TextTokens,
        *,
        wanted_frames: Sequence[int] | None = None,
        frames_per_chunk: int | None = None,
        memory: QFormerMemory | None = None,
        seeds: Tensor | None = None,
    ) -> Iterator[QFormerChunk]:
        """Like `forward`, one chunk of wanted frames after the other, so that a training step can go back through each.

        Because banks are detached, the chunks' graphs do not depend on one another. When each chunk's loss is sent back
        and its graph let go before the next is asked for, activations are bounded by the chunk's frames, whatever T;
        `stages.networks.memory_law` has the law.

        Args and errors are those of `forward`.
        """
        for chunk, _ in self._chunks(features, text, wanted_frames, frames_per_chunk, memory, seeds):
            if chunk is not None:
                yield chunk

    def _chunks(
        self,
        features: Tensor,
        text: TextTokens,
        wanted_frames: Sequence[int] | None,
        frames_per_chunk: int | None,
        memory: QFormerMemory | None,
        seeds: Tensor | None,
    ) -> Iterator[tuple[QFormerChunk | None, clip.Carried]]:
        """Every chunk, None where no frame of it is wanted, with what is known after it."""
        batch, frames, patches, _ = features.shape
        wanted = _check_wanted(wanted_frames, frames)
        if frames_per_chunk is not None and frames_per_chunk < 1:
            raise ValueError(f"frames_per_chunk is {frames_per_chunk}; it must be at least 1")
        if memory is None:
            memory = self.empty_memory(batch, patches, text.ids.shape[1])
        self.require_room(memory.frames_seen + frames)
        if not self.training:
            seeds = None
        elif seeds is None:
            seeds = torch.randint(2**62, (batch,)).to(features.device)
        carried = clip.carry(self, memory)
        for start, stop, needed in split_runs(
            wanted, frames, frames_per_chunk or frames_per_chunk_of(self.config.memory_slots)
        ):
            with nullcontext() if needed else without_graph():
                levels, carried = clip.forward_chunk(
                    self, carried, features[:, start:stop], text, seeds=seeds, feed_only=not needed
                )
            yield QFormerChunk(start, *self._split_levels(levels)) if needed else None, carried

    def _split_levels(self, levels: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Levels [B, T', N, H] -> those of the queries and those of the question's tokens."""
        queries, words = zip(*map(self.split, levels), strict=True)
        return queries, words


def frames_per_chunk_of(memory_slots: int) -> int:
    """Frames computed at once by default.

    A chunk pays for the gradient of the slots carried in once, whatever its length, and keeps memory by its length.
    """
    return 2 * memory_slots


def split_runs(wanted: Sequence[int], frames: int, longest: int) -> list[tuple[int, int, bool]]:
    """Cut frames 0..frames-1 into chunks (start, stop, wanted) of one kind each and at most `longest` frames."""
    with_loss = set(wanted)
    kinds = [index in with_loss for index in range(frames)]
    chunks: list[tuple[int, int, bool]] = []
    start = 0
    for index in range(1, frames + 1):
        if index == frames or kinds[index] != kinds[start] or index - start == longest:
            chunks.append((start, index, kinds[start]))
            start = index
    return chunks


def _check_wanted(wanted: Sequence[int] | None, frames: int) -> Sequence[int]:
    if not frames:
        raise ValueError("the clip has no frames")
    if wanted is None:
        return range(frames)
    if not wanted:
        raise ValueError("wanted_frames is empty; name at least one frame")
    outside = [index for index in wanted if not 0 <= index < frames]
    if outside:
        raise ValueError(f"wanted_frames {outside} are outside the clip of {frames} frames")
    return wanted


def _project_heads(linear: nn.Linear, inputs: Tensor, heads: int) -> Tensor:
    """Project [B, K, width] and split into heads: [B, heads, K, H / heads]."""
    projected: Tensor = linear(inputs)
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(inner: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over heads, joined again: [B, N, H].

    `inner` is an `InstructBlipQFormerMultiHeadAttention`, asked only for its dropout. The mask is boolean, True where
    a key is seen, and broadcasts to [B, heads, N, K].
    """
    dropout = inner.config.attention_probs_dropout_prob if inner.training else 0.0
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


def _attend_plain(attention: Any, hidden: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Attention block with residual and LayerNorm; hidden [B, N, H], keys [B, K, width], mask [B, 1, 1, K] or None."""
    inner = attention.attention
    context = _attend(
        inner,
        _project_heads(inner.query, hidden, inner.num_attention_heads),
        _project_heads(inner.key, keys, inner.num_attention_heads),
        _project_heads(inner.value, keys, inner.num_attention_heads),
        mask,
    )
    output: Tensor = attention.output(context, hidden)
    return output
