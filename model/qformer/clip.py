"""The clip form of the memory-bank Q-Former: a chunk of c frames at once instead of a loop over frames.

Why this is possible: a layer's bank holds that layer's own inputs at earlier frames, so layer l at frame t needs layer
l-1 at frames <= t and nothing else, as in a causal transformer. Only the merge decisions are sequential, and they are
cosines (`model.qformer.memory.plan_merges`). Why it is fast: a slot is a mean of frames and projections are linear, so
each frame is projected once and the projected keys and values are merged (`model.qformer.paged_attention`), where the
loop projects up to M + 1 frames' worth at every frame. Between the chunks of a clip the projected slots are handed on.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.qformer.dropout import Draws, Place
from model.qformer.memory import MergePlan, plan_merges
from model.qformer.paged_attention import PagedAttention, Remembered, project
from model.qformer.parts import QFormerMemory, QFormerParts, TextTokens, without_graph


@dataclass(frozen=True)
class LayerSlots:
    """The slots of one layer's banks, projected: as `model.qformer.paged_attention.Remembered.projected`.

    Attributes:
        words: the layer's own past inputs, for self-attention.
        visual: past frames, for cross-attention; None where the layer has none.
    """

    words: Tensor
    visual: Tensor | None


@dataclass(frozen=True)
class Carried:
    """What one chunk of a clip hands to the next.

    Attributes:
        memory: as the plain form has it.
        slots: per layer, the same slots projected with the present weights; graphs end here.
    """

    memory: QFormerMemory
    slots: tuple[LayerSlots, ...]


@without_graph()
def carry(model: QFormerParts, memory: QFormerMemory) -> Carried:
    """Project what was seen before a clip."""
    pairs = zip(model.layers, memory.layers, strict=True)
    return Carried(memory, tuple(_project_banks(layer, bank.slots, memory.visual.slots) for layer, bank in pairs))


def forward_chunk(
    model: QFormerParts,
    carried: Carried,
    features: Tensor,
    text: TextTokens,
    *,
    seeds: Tensor | None = None,
    feed_only: bool = False,
) -> tuple[tuple[Tensor, ...], Carried]:
    """Compute all levels for the chunk's frames and what the next chunk needs.

    Args:
        carried: from the chunk before.
        features: [B, c, P, C] frozen visual features.
        seeds: [B] int64, of each clip's dropout; None drops nothing.
        feed_only: return no levels and skip the last layer, whose output no bank remembers.

    Returns:
        levels, each [B, c, N, H] (empty if feed_only), and what is carried on.
    """
    memory, frames = carried.memory, features.shape[1]
    embedded, valid = model.embed(text)
    masked = None if valid.all() else valid
    visual = _Visual(model, memory, features)
    hidden = embedded[:, None].expand(-1, frames, -1, -1)  # [B, c, N, H]
    draws = Draws(seeds, memory.frames_seen)
    hidden = draws.drop(hidden, model.qformer.embeddings.dropout.p, Place.EMBEDDINGS)
    levels, banks, slots = [hidden], [], []
    for number, (layer, bank, before) in enumerate(zip(model.layers, memory.layers, carried.slots, strict=True)):
        plan = plan_merges(bank, hidden, model.config.memory_slots)
        banks.append(plan.bank)
        if feed_only and len(banks) == len(memory.layers):
            slots.append(_project_banks(layer, plan.bank.slots, visual.plan.bank.slots))
            break
        draws = Draws(seeds, memory.frames_seen, number)
        paged = _paged(layer.attention, plan, masked, draws, hidden.shape[2], Place.SELF_ATTENTION)
        remembered = Remembered(bank.slots, before.words)
        context, words = _attend(layer.attention, paged, hidden, hidden, remembered, positions=None)
        attended = _closed(layer.attention.output, context, hidden, draws, Place.AFTER_SELF_ATTENTION)
        queries, text_tokens = model.split(attended)
        queries, seen = visual.attend(layer, queries, before.visual, draws)
        queries = _closed(layer.output_query, layer.intermediate_query(queries), queries, draws, Place.QUERIES)
        text_tokens = _closed(layer.output, layer.intermediate(text_tokens), text_tokens, draws, Place.WORDS)
        hidden = torch.cat([queries, text_tokens], dim=2)
        slots.append(LayerSlots(words, seen))
        levels.append(hidden)
    after = QFormerMemory(visual.plan.bank, tuple(banks), memory.frames_seen + frames)
    return () if feed_only else tuple(levels), Carried(after, tuple(slots))


class _Visual:
    """The chunk's frames and the bank of earlier ones, shared by every cross-attention layer."""

    def __init__(self, model: QFormerParts, memory: QFormerMemory, features: Tensor) -> None:
        self.bank = memory.visual.slots
        self.positions = model.frame_positions_of(memory.frames_seen, features.shape[1])  # [c, C]
        self.inputs = (features.to(self.positions.dtype) + self.positions[:, None]).detach()  # [B, c, P, C]
        self.plan = plan_merges(memory.visual, self.inputs, model.config.memory_slots)

    def attend(self, layer: Any, queries: Tensor, slots: Tensor | None, draws: Draws) -> tuple[Tensor, Tensor | None]:
        """One layer's cross-attention of queries [B, c, Q, H], and its projected bank after the chunk.

        Queries and bank come back as they are where the layer has none.
        """
        if not layer.has_cross_attention:
            return queries, slots
        assert slots is not None
        attention = layer.crossattention
        paged = _paged(attention, self.plan, None, draws, queries.shape[2], Place.CROSS_ATTENTION)
        remembered = Remembered(self.bank, slots)
        context, after = _attend(attention, paged, queries, self.inputs, remembered, self.positions)
        return _closed(attention.output, context, queries, draws, Place.AFTER_CROSS_ATTENTION), after


def _paged(
    attention: Any, plan: MergePlan, valid: Tensor | None, draws: Draws, queries: int, place: Place
) -> PagedAttention:
    inner = attention.attention
    heads = inner.num_attention_heads
    rate = inner.config.attention_probs_dropout_prob
    return PagedAttention(plan, heads, valid, draws.of_attention(plan, heads, queries, rate, place))


def _attend(
    attention: Any,
    paged: PagedAttention,
    hidden: Tensor,
    inputs: Tensor,
    remembered: Remembered,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The context of hidden [B, c, n, H], which asks inputs [B, c, N, W] and the bank; and the bank afterwards."""
    return paged(attention.attention.query(hidden), inputs, *_key_value(attention), remembered, positions)


def _closed(block: Any, values: Tensor, residual: Tensor, draws: Draws, place: Place) -> Tensor:
    """The end of an attention or a feed-forward: projection, dropout, residual and LayerNorm."""
    closed: Tensor = block.LayerNorm(draws.drop(block.dense(values), block.dropout.p, place) + residual)
    return closed


def _key_value(attention: Any) -> tuple[Tensor, Tensor]:
    """Weight [2 H, W] and bias [2 H] of the key projection and, behind it, the value projection."""
    key, value = attention.attention.key, attention.attention.value
    return torch.cat([key.weight, value.weight]), torch.cat([key.bias, value.bias])


def _project_banks(layer: Any, words: Tensor, visual: Tensor) -> LayerSlots:
    """Project slots [B, m, N, H] and [B, m, P, C] as the layer's attentions do."""
    parts = [(layer.attention, words), *([(layer.crossattention, visual)] if layer.has_cross_attention else [])]
    projected = []
    for attention, slots in parts:
        weight, bias = _key_value(attention)
        projected.append(project(slots.to(weight.dtype), weight, bias, attention.attention.num_attention_heads).float())
    return LayerSlots(projected[0], projected[1] if len(projected) > 1 else None)
