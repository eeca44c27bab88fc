"""Attention of a chunk of frames to a memory bank kept on pages: every frame projected once, no mask, no gathering.

A bank's slots, projected to keys and values, lie on at most M + 1 pages (`model.qformer.memory.MergePlan`). Going
through the chunk, a frame is written to its page, attends to the pages in use, and one merge rewrites one page per
token position: the published loop projects up to M + 1 frames' worth of tokens at every frame instead.

The backward pass goes through the frames in reverse with the pages as each frame saw them, so that what is kept
for it are the chunk's own queries, inputs, keys and values, not the M + 1 pages that every frame attends to. Banks are
detached: keys and values that were remembered send gradient to the projection only, a frame's own also to its input.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.qformer.dropout import AttentionDraws
from model.qformer.memory import MergePlan


@dataclass(frozen=True)
class Remembered:
    """A bank as one attention layer knows it.

    Attributes:
        inputs: [B, m, N, W] the slots, oldest first.
        projected: [2 h, B, m, N, H / h] float32 their keys (the first h) and values.
    """

    inputs: Tensor
    projected: Tensor


@dataclass(frozen=True)
class PagedAttention:
    """What one attention layer does with one chunk.

    Attributes:
        plan: of the bank that is attended to.
        heads: h.
        valid: [B, N] bool, False on tokens that are never attended to; None if there are none.
        draws: which attention weights are dropped; None if none is.
    """

    plan: MergePlan
    heads: int
    valid: Tensor | None
    draws: AttentionDraws | None = None

    def __call__(
        self,
        query: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        remembered: Remembered,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; queries [B, c, n, H] to inputs [B, c, N, W] projected by weight [2 H, W] and bias [2 H].

        Args:
            query: projected queries; their dtype is that of the arithmetic.
            inputs: what keys and values are made of.
            weight: rows of the key projection, then those of the value projection.
            bias: likewise.
            remembered: the bank before the chunk.
            positions: [c, W], already part of the inputs; where it is given, gradient goes to it, not to the inputs,
                which saves a projection back to every token.

        Returns:
            context [B, c, n, H], and the bank after the chunk as `Remembered.projected`.
        """
        context, after = _Attend.apply(
            query, inputs, weight, bias, positions, remembered.inputs, remembered.projected, self
        )
        return context, after


def project(inputs: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Keys and values of inputs [B, k, N, W] -> [2 h, B, k, N, H / h]."""
    return F.linear(inputs, weight, bias).unflatten(-1, (2 * heads, -1)).permute(3, 0, 1, 2, 4)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor,
        positions: Tensor | None,
        slot_inputs: Tensor,
        slots: Tensor,
        layer: PagedAttention,
    ) -> tuple[Tensor, Tensor]:
        plan, dtype = layer.plan, query.dtype
        with torch.autocast(query.device.type, enabled=False):
            own = project(inputs.to(dtype), weight.to(dtype), bias.to(dtype), layer.heads)
            own = own.transpose(1, 2).transpose(0, 1).contiguous()  # [c, 2h, B, N, d]
            asked = _by_frame(query, layer.heads)
            pages = _Pages(slots, plan, dtype)
            context = torch.empty_like(asked)
            for frame in range(plan.num_frames):
                pages.write(frame, own[frame])
                context[frame] = _attend(layer, asked[frame], pages.seen(frame), frame)
                pages.merge(frame)
            after = pages.in_order()
        ctx.save_for_backward(asked, own, inputs, weight, slot_inputs, slots)
        ctx.layer, ctx.with_positions = layer, positions is not None
        ctx.mark_non_differentiable(after)
        ctx.set_materialize_grads(False)
        return _by_clip(context, layer.heads), after

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _after: None) -> tuple[Tensor | None, ...]:
        asked, own, inputs, weight, slot_inputs, slots = ctx.saved_tensors
        with torch.autocast(grad.device.type, enabled=False):
            g_asked, g_own, g_banked, g_slots = _backward_through_pages(
                ctx.layer, asked, own, slots, _by_frame(grad, ctx.layer.heads)
            )
            g_weight, g_bias = _to_projection(g_banked.add_(g_own), inputs, asked.dtype)
            if slot_inputs.shape[1]:
                more = _to_projection(g_slots.permute(2, 0, 1, 3, 4), slot_inputs, asked.dtype)
                g_weight, g_bias = g_weight + more[0], g_bias + more[1]
            g_inputs = g_positions = None
            if ctx.with_positions:
                g_positions = _rows(g_own).sum(dim=(0, 2)) @ weight.float()
            elif ctx.needs_input_grad[1]:
                g_inputs = (_rows(g_own).to(asked.dtype) @ weight.to(asked.dtype)).to(inputs.dtype)
        return (
            _by_clip(g_asked, ctx.layer.heads),
            g_inputs,
            g_weight.to(weight.dtype),
            g_bias.to(weight.dtype),
            g_positions,
            None,
            None,
            None,
        )


class _Pages:
    """Keys and values of a bank while a chunk goes by; changed in place.

    Merged values are kept in float32: rounded to bfloat16 at each of many merges they would drift from the mean.
    """

    def __init__(self, slots: Tensor, plan: MergePlan, dtype: torch.dtype) -> None:
        rows, batch, carried, tokens, width = slots.shape
        self.plan = plan
        self.exact = slots.new_empty(rows, batch, plan.num_pages, tokens, width)
        self.exact[:, :, :carried] = slots
        self.shown = self.exact if dtype == self.exact.dtype else self.exact.to(dtype)
        place = torch.arange(batch, device=slots.device)[:, None, None] * plan.num_pages
        token = torch.arange(tokens, device=slots.device)
        self.own, self.left, self.right, self.order = (
            ((place + pages) * tokens + token).transpose(0, 1).flatten(1)  # [c or R or m', B N]
            for pages in (plan.own, plan.left, plan.right, plan.order)
        )
        self.share = plan.share.transpose(0, 1).flatten(1)[:, :, None]  # [R, B N, 1]

    def take(self, rows: Tensor) -> Tensor:
        """Keys and values on the pages at `rows` [B N] -> [2 h, B N, H / h] float32."""
        return self.exact.flatten(1, 3).index_select(1, rows)

    def put(self, rows: Tensor, values: Tensor) -> None:
        self.exact.flatten(1, 3).index_copy_(1, rows, values.to(self.exact.dtype))
        if self.shown is not self.exact:
            self.shown.flatten(1, 3).index_copy_(1, rows, values.to(self.shown.dtype))

    def write(self, frame: int, own: Tensor) -> None:
        self.put(self.own[frame], own.flatten(1, 2))

    def merge(self, frame: int) -> tuple[Tensor, Tensor] | None:
        """Make the merge after the frame, if there is one, and return the two sides as they were."""
        merge = self.plan.merge_after(frame)
        if merge is None:
            return None
        left, right = self.take(self.left[merge]), self.take(self.right[merge])
        self.put(self.left[merge], torch.lerp(right, left, self.share[merge]))
        return left, right

    def undo(self, frame: int, sides: tuple[Tensor, Tensor]) -> None:
        """Go back to before the merge after the frame."""
        merge = self.plan.merge_after(frame)
        self.put(self.left[merge], sides[0])
        self.put(self.right[merge], sides[1])

    def seen(self, frame: int) -> Tensor:
        """Keys and, behind them, values that the frame attends to: [2 h B, k N, H / h]."""
        return _first_pages(self.shown, self.plan.pages_seen(frame))

    def in_order(self) -> Tensor:
        """All pages in use, oldest first: [2 h, B, m', N, H / h] float32."""
        batch, tokens = self.exact.shape[1], self.exact.shape[3]
        taken = self.take(self.order.flatten()).unflatten(1, (-1, batch, tokens))
        return taken.transpose(1, 2).contiguous()


def _backward_through_pages(
    layer: PagedAttention, asked: Tensor, own: Tensor, slots: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, of the frames' keys and values as their own and as remembered ones, and of the slots."""
    plan = layer.plan
    pages = _Pages(slots, plan, asked.dtype)
    merged = []
    for frame in range(plan.num_frames):
        pages.write(frame, own[frame])
        merged.append(pages.merge(frame))
    g_pages = torch.zeros_like(pages.exact)
    flat = g_pages.flatten(1, 3)
    g_asked = torch.empty_like(asked)
    g_own, g_banked = (torch.empty(own.shape, dtype=torch.float32, device=own.device) for _ in range(2))
    for frame in reversed(range(plan.num_frames)):
        sides = merged.pop()
        if sides is not None:
            pages.undo(frame, sides)
            _unmerge(flat, pages, frame)
        rows = pages.own[frame]
        # The frame's page so far holds what later frames, to whom it is a memory, sent; now comes its own share.
        g_banked[frame] = flat.index_select(1, rows).view_as(own[frame])
        flat.index_fill_(1, rows, 0.0)
        g_seen = _first_pages(g_pages, plan.pages_seen(frame))
        g_asked[frame] = _attend_backward(layer, asked[frame], pages.seen(frame), grad[frame], g_seen, frame)
        g_own[frame] = flat.index_select(1, rows).view_as(own[frame])
        flat.index_fill_(1, rows, 0.0)
    return g_asked, g_own, g_banked, g_pages[:, :, : plan.carried]


def _first_pages(pages: Tensor, used: int) -> Tensor:
    """A view of [2 h, B, pages, N, d] as [2 h B, used N, d]."""
    rows, batch, _, tokens, width = pages.shape
    return pages.flatten(0, 1)[:, :used].view(rows * batch, used * tokens, width)


def _unmerge(g_pages: Tensor, pages: _Pages, frame: int) -> None:
    """Share a merged page's gradient between the two pages that it was made of."""
    merge = pages.plan.merge_after(frame)
    g_merged = g_pages.index_select(1, pages.left[merge])
    to_left = g_merged * pages.share[merge]
    g_pages.index_copy_(1, pages.left[merge], to_left)
    g_pages.index_copy_(1, pages.right[merge], g_merged - to_left)


def _attend(layer: PagedAttention, query: Tensor, pages: Tensor, frame: int) -> Tensor:
    """Queries [h B, n, d] to keys and values [2 h B, k N, d] -> [h B, n, d]."""
    keys, values = pages.chunk(2)
    _, dropped, _ = _weights(layer, query, keys, frame)
    return torch.bmm(dropped, values)


def _attend_backward(
    layer: PagedAttention, query: Tensor, pages: Tensor, grad: Tensor, g_pages: Tensor, frame: int
) -> Tensor:
    """Gradient of the queries; those of keys and values are added to `g_pages` [2 h B, k N, d] float32.

    Written out: autograd would make gradients of the pages' full size at every frame only to add them up.
    """
    keys, values = pages.chunk(2)
    g_keys, g_values = g_pages.chunk(2)
    weights, dropped, kept = _weights(layer, query, keys, frame)
    g_weights = torch.bmm(grad, values.mT)
    if kept is not None:
        g_weights.mul_(kept)
    _add_product(g_values, dropped.mT, grad)
    product = g_weights * weights
    g_scores = product - weights * product.sum(-1, keepdim=True, dtype=torch.float32).to(weights.dtype)
    g_scores.mul_(query.shape[-1] ** -0.5)
    _add_product(g_keys, g_scores.mT, query)
    return torch.bmm(g_scores, keys)


def _weights(layer: PagedAttention, query: Tensor, keys: Tensor, frame: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Attention weights [h B, n, k N] before dropout and after it, in the queries' dtype, and what it multiplies with.

    The last is float32, None without dropout: 1 / 0.9 is 1.1094 in bfloat16, and every step would lose 0.15 %.
    """
    scores = torch.bmm(query * query.shape[-1] ** -0.5, keys.mT)
    if layer.valid is not None:
        unseen = ~layer.valid.repeat(1, keys.shape[1] // layer.valid.shape[1])[:, None]  # [B, 1, k N]
        scores.unflatten(0, (layer.heads, -1)).masked_fill_(unseen, float("-inf"))
    exact = torch.softmax(scores, dim=-1, dtype=torch.float32)
    weights = exact.to(query.dtype)
    if layer.draws is None:
        return weights, weights, None
    kept = layer.draws.scale(frame, layer.plan.pages_seen(frame))
    return weights, (exact * kept).to(query.dtype), kept


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, batch by batch; total is float32, the factors may be lower."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total.add_(torch.bmm(left, right))


def _to_projection(grad: Tensor, inputs: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradient of weight and bias from that of keys and values [c, 2h, B, N, d] of inputs [B, c, N, W]."""
    rows = _rows(grad).flatten(0, 2)
    return rows.to(dtype).T @ inputs.flatten(0, 2).to(dtype), rows.sum(0)


def _rows(grad: Tensor) -> Tensor:
    """[c, 2h, B, N, d] -> [B, c, N, 2H]."""
    return grad.permute(2, 0, 3, 1, 4).flatten(3)


def _by_frame(tensor: Tensor, heads: int) -> Tensor:
    """[B, c, n, H] -> [c, h B, n, d]."""
    return tensor.unflatten(-1, (heads, -1)).permute(1, 3, 0, 2, 4).flatten(1, 2).contiguous()


def _by_clip(tensor: Tensor, heads: int) -> Tensor:
    """[c, h B, n, d] -> [B, c, n, H]."""
    return tensor.unflatten(1, (heads, -1)).permute(2, 0, 3, 1, 4).flatten(3)
