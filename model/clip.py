"""The clip form of the memory-bank Q-Former: a run of c frames at once instead of a loop over frames (DESIGN.md 4.1).

Why this is possible: a layer's bank holds that layer's own inputs at earlier frames, so layer l at frame t needs layer
l-1 at frames <= t and nothing else, as in a causal transformer. Only the merge decisions are sequential, and they are
cosines (`model.memory.plan_merges`). Why it is fast: a slot is a mean of frames and projections are linear, so each
frame is projected once and the projected keys and values are mixed, where the loop projects up to M + 1 frames' worth
at every frame.

A run's keys are a table of E entries (slots carried in, frames, merges) that all its frames share; frame i sees entry
e while birth_e <= i < death_e. Behind them come the frames' own inputs once more, each seen by its own frame only:
they alone carry gradient to the layer's input, because banks are detached.

Working memory of one layer over a run of c frames with m <= M slots carried in: the table holds at most M + 2c entries
and the own inputs c more, so keys and values take 2 (M + 3c) P H numbers per clip for cross-attention (N for P in
self-attention) and the mask c (M + 3c) P. Neither depends on T.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from model.attention import attend, project_heads, split_heads
from model.memory import MergePlan, plan_merges

if TYPE_CHECKING:
    from model.memory import MemoryBank
    from model.qformer import MemoryQFormer, QFormerMemory


def forward_run(
    model: "MemoryQFormer",
    memory: "QFormerMemory",
    features: Tensor,
    embedded: Tensor,
    valid: Tensor,
    *,
    feed_only: bool = False,
) -> tuple[tuple[Tensor, ...], "QFormerMemory"]:
    """Compute all levels for the run's frames and the memory after them.

    Args:
        model: whose weights.
        memory: what was seen before the run.
        features: [B, c, P, C] frozen visual features.
        embedded: [B, N, H] queries and question, equal for every frame.
        valid: [B, N] bool, False on padding.
        feed_only: return no levels and skip the last layer, whose output no bank remembers.

    Returns:
        levels, each [B, c, Q, H] (empty if feed_only), and the memory after the run.
    """
    slots = model.config.memory_slots
    frames = features.shape[1]
    visual = model.add_frame_positions(features, memory.frames_seen)  # [B, c, P, C]
    visual_plan = plan_merges(memory.visual, visual, slots)
    visual_mask = _run_mask(visual_plan, frames, valid=None)
    hidden = model.qformer.embeddings.dropout(embedded[:, None].expand(-1, frames, -1, -1))  # [B, c, N, H]
    levels, banks = [hidden], []
    for index, (layer, bank) in enumerate(zip(model.layers, memory.layers, strict=True)):
        plan = plan_merges(bank, hidden, slots)
        banks.append(plan.bank)
        if feed_only and index == len(memory.layers) - 1:
            break
        attended = _attend_run(layer.attention, hidden, hidden, bank, plan, _run_mask(plan, frames, valid))

        def cross(queries: Tensor, layer: Any = layer) -> Tensor:
            by_frame = queries.unflatten(0, (-1, frames))
            return _attend_run(layer.crossattention, by_frame, visual, memory.visual, visual_plan, visual_mask).flatten(
                0, 1
            )

        hidden = model.after_self_attention(layer, attended.flatten(0, 1), cross).unflatten(0, (-1, frames))
        levels.append(hidden)
    after = type(memory)(visual_plan.bank, tuple(banks), memory.frames_seen + frames)
    return () if feed_only else tuple(level[:, :, : model.num_queries] for level in levels), after


def _attend_run(
    attention: Any, hidden: Tensor, inputs: Tensor, bank: "MemoryBank", plan: MergePlan, mask: Tensor
) -> Tensor:
    """Attention block over a run: hidden [B, c, n, H] asks; inputs [B, c, N, width] and the bank answer."""
    inner = attention.attention
    heads = inner.num_attention_heads
    context = attend(
        inner,
        project_heads(inner.query, hidden.flatten(1, 2), heads),
        split_heads(_project_table(inner.key, inputs, bank, plan), heads),
        split_heads(_project_table(inner.value, inputs, bank, plan), heads),
        _repeat_for_queries(mask, hidden.shape[2]),
    )
    output: Tensor = attention.output(context.unflatten(1, hidden.shape[1:3]), hidden)
    return output


def _project_table(linear: nn.Linear, inputs: Tensor, bank: "MemoryBank", plan: MergePlan) -> Tensor:
    """Project each frame once and mix the projections into merges: [B, (E + c) N, H], table first, own inputs last."""
    own = linear(inputs)  # [B, c, N, H]
    base = _OnlyToWeights.apply(own.detach(), inputs.detach(), linear.weight, linear.bias)
    if bank.num_slots:
        base = torch.cat([linear(bank.slots.to(inputs.dtype)), base], dim=1)  # [B, m+c, N, H]
    merged = torch.einsum("bnrk,bknh->brnh", plan.mixing.to(base.dtype), base)
    return torch.cat([base, merged, own], dim=1).flatten(1, 2)


class _OnlyToWeights(torch.autograd.Function):
    """A linear layer's output used a second time, with gradient to weight and bias but not to the input.

    Equal to `linear(inputs.detach())` without computing the product again.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(inputs)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor]:
        (inputs,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return None, None, rows.T @ inputs.flatten(0, -2).to(rows.dtype), rows.sum(0)


def _run_mask(plan: MergePlan, frames: int, valid: Tensor | None) -> Tensor:
    """Which keys each frame sees: [B, c, (E + c) N] bool; padded text tokens are never seen."""
    time = torch.arange(frames, device=plan.birth.device)[None, :, None, None]
    seen = (plan.birth[:, None] <= time) & (time < plan.death[:, None])  # [B, c, E, N]
    batch, _, tokens = plan.birth.shape
    own = torch.eye(frames, dtype=torch.bool, device=seen.device)[None, :, :, None].expand(batch, -1, -1, tokens)
    mask = torch.cat([seen, own], dim=2)
    if valid is not None:
        mask = mask & valid[:, None, None]
    return mask.flatten(2)


def _repeat_for_queries(mask: Tensor, queries: int) -> Tensor:
    """[B, c, K] -> [B, 1, c n, K], the same row for each of a frame's n query positions."""
    return mask[:, None, :, None].expand(-1, -1, -1, queries, -1).flatten(2, 3)
