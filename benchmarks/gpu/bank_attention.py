"""Two other ways than `model.qformer.paged_attention` to attend to a memory bank from a chunk of frames, all at once.

Both begin with a table of everything that ever stands in the bank while the chunk goes by: the slots carried in, the
frames, and what merges make of them. Each entry is the mean of neighbours in time, so its keys and values are a
difference of two prefix sums, and no merge waits for the one before. An entry is seen by the frames from its birth
until it is merged away.

    gather   every frame's entries are copied side by side, some frames at a time, for one plain attention
    flex     all frames attend to the whole table, under a mask of birth and death (FlexAttention)

They are here to be timed. Their gradient also reaches the inputs of remembered frames, which the model detaches.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@dataclass(frozen=True)
class Table:
    """Of each entry e at token position n, all [B, E, N]: the run of neighbours that it is the mean of, and its life.

    `weights` [B, m + c + 1, N] are the prefix sums of how many frames each neighbour stands for.
    """

    first: Tensor
    last: Tensor
    birth: Tensor
    death: Tensor
    weights: Tensor

    def seen(self, frames):
        """The entries that each frame sees: [B, c, K, N]; all frames must see equally many."""
        frame = torch.arange(frames, device=self.birth.device)[:, None, None]
        visible = (self.birth[:, None] <= frame) & (frame < self.death[:, None])  # [B, c, E, N]
        counts = visible.sum(2)
        assert counts.min() == counts.max(), "the bank must be full when the chunk begins"
        return visible.byte().argsort(dim=2, descending=True, stable=True)[:, :, : int(counts.max())]


def table_of(plan, counts):
    """Follow a `MergePlan` over the pages of a bank whose slots stand for `counts` [B, m, N] frames."""
    batch, frames, tokens = plan.own.shape
    atoms, merges = plan.carried + frames, plan.left.shape[1]
    entry = torch.arange(atoms + merges, device=plan.own.device)[None, :, None].expand(batch, -1, tokens)
    first, last = entry.clone(), entry + 1
    birth, death = (entry - plan.carried).clamp(min=0), torch.full_like(entry, frames)
    page = torch.zeros(batch, plan.num_pages, tokens, dtype=torch.int64, device=plan.own.device)
    page[:, : plan.carried] = entry[:, : plan.carried]
    for frame in range(frames):
        page.scatter_(1, plan.own[:, frame, None], entry[:, plan.carried + frame, None])
        merge = plan.merge_after(frame)
        if merge is None:
            continue
        made = atoms + merge
        left, right = (page.gather(1, side[:, merge, None]) for side in (plan.left, plan.right))
        death.scatter_(1, left, frame + 1).scatter_(1, right, frame + 1)
        first[:, made], last[:, made] = first.gather(1, left)[:, 0], last.gather(1, right)[:, 0]
        birth[:, made] = frame + 1
        page.scatter_(1, plan.left[:, merge, None], entry[:, made, None])
    ones = torch.ones(batch, frames, tokens, device=counts.device)
    weights = F.pad(torch.cat([counts, ones], dim=1).cumsum(1), (0, 0, 1, 0))
    return Table(first, last, birth, death, weights)


def entries_of(table, own, slots, counts):
    """Keys and values of every entry [B, E, N, 2 H] from the frames' [B, c, N, 2 H] and the slots' [B, m, N, 2 H]."""
    summed = F.pad(torch.cat([slots * counts[..., None], own.float()], dim=1).cumsum(1), (0, 0, 0, 0, 1, 0))
    difference = _rows(summed, table.last) - _rows(summed, table.first)
    share = table.weights.gather(1, table.last) - table.weights.gather(1, table.first)
    return (difference / share[..., None]).to(own.dtype)


def _rows(values, entry):
    """Entries [B, ..., N] of values [B, E, N, W], row by row: [B, ..., N, W]."""
    batch, entries, tokens, width = values.shape
    place = torch.arange(batch, device=entry.device).view(-1, *[1] * (entry.ndim - 1)) * entries
    rows = (place + entry) * tokens + torch.arange(tokens, device=entry.device)
    return values.flatten(0, 2).index_select(0, rows.flatten()).view(*entry.shape, width)


def gather(query, entries, seen, heads, *, frames_at_once=10):
    """Queries [B, c, n, H] to the entries that each frame sees [B, c, K, N] -> context [B, c, n, H]."""
    parts = []
    for asked, places in zip(query.split(frames_at_once, 1), seen.split(frames_at_once, 1), strict=True):
        keys, values = _rows(entries, places).flatten(2, 3).chunk(2, dim=-1)  # [B, c, K N, H]
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1) for part in (asked, keys, values))
        context = F.scaled_dot_product_attention(q, k, v)
        parts.append(context.transpose(1, 2).flatten(2).unflatten(0, asked.shape[:2]))
    return torch.cat(parts, dim=1)


def flex_mask(table, queries, frames):
    """FlexAttention's mask: the queries of frame t see an entry from its birth until its death."""
    birth, death = table.birth.flatten(1), table.death.flatten(1)

    def alive(batch, _head, query, key):
        frame = query // queries
        return (birth[batch, key] <= frame) & (frame < death[batch, key])

    return create_block_mask(alive, len(birth), None, frames * queries, birth.shape[1], device=str(birth.device))


@cache
def compiled_flex():
    """FlexAttention as one kernel; without compilation it computes every score."""
    return torch.compile(flex_attention, dynamic=False)


def flex(query, entries, mask, heads, *, attend=flex_attention):
    """Queries [B, c, n, H] to the whole table under its mask -> context [B, c, n, H]."""
    keys, values = entries.flatten(1, 2).chunk(2, dim=-1)  # [B, E N, H]
    asked = query.flatten(1, 2)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (asked, keys, values))
    context = attend(q, k.contiguous(), v.contiguous(), block_mask=mask)
    return context.transpose(1, 2).flatten(2).view_as(query)
