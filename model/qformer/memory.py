"""The memory bank of MA-LMM: past inputs, at most M slots per token position, most similar merged.

Every slot holds the mean of a run of consecutive frames. When a bank outgrows its slots, each token position merges,
on its own, the adjacent pair with the highest cosine similarity, weighted by how many frames each side stands for
(MA-LMM:lavis/models/blip2_models/blip2.py:352-392).
Banks are values: nothing here changes its arguments, and no module keeps one.

`append` is the plain form, one frame at a time. `plan_merges` makes the same decisions for a chunk of frames at once
and returns them as a plan, for the clip form in `model.qformer.clip`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class MemoryBank:
    """Slots of one bank, oldest first.

    Attributes:
        slots: [B, m, N, C] float32, detached; m <= M.
        counts: [B, m, N] float32, frames each slot is the mean of.
    """

    slots: Tensor
    counts: Tensor

    @classmethod
    def empty(cls, batch: int, tokens: int, width: int, device: torch.device | str | None = None) -> "MemoryBank":
        """Return the bank before the first frame."""
        return cls(torch.zeros(batch, 0, tokens, width, device=device), torch.zeros(batch, 0, tokens, device=device))

    @property
    def num_slots(self) -> int:
        """Slots in use, m."""
        return self.slots.shape[1]


def append(bank: MemoryBank, frame: Tensor, max_slots: int) -> MemoryBank:
    """Add one frame's tokens [B, N, C] and merge once if the bank then holds more than `max_slots`."""
    slots = torch.cat([bank.slots, frame.detach().float()[:, None]], dim=1)
    counts = torch.cat([bank.counts, torch.ones_like(frame[:, None, :, 0], dtype=torch.float32)], dim=1)
    grown = MemoryBank(slots, counts)
    return grown if grown.num_slots <= max_slots else merge_most_similar(grown)


def merge_most_similar(bank: MemoryBank) -> MemoryBank:
    """Replace, per token position, the most similar adjacent pair of slots by its mean weighted by frame counts.

    Equal similarities merge the oldest pair.
    """
    left = alikeness(bank.slots[:, :-1], bank.slots[:, 1:]).argmax(dim=1, keepdim=True)  # [B, 1, N]
    count_left, count_right = bank.counts.gather(1, left), bank.counts.gather(1, left + 1)
    merged = weighted_mean(_pick(bank.slots, left), count_left, _pick(bank.slots, left + 1), count_right)
    kept = _without_right_of(left, bank.num_slots)
    slots = _pick(bank.slots, kept).scatter(1, _as_index(left, bank.slots), merged)
    counts = bank.counts.gather(1, kept).scatter(1, left, count_left + count_right)
    return MemoryBank(slots, counts)


def alikeness(left: Tensor, right: Tensor) -> Tensor:
    """Cosine similarity minus 1, [..., C] -> [...], as half the squared distance between the unit vectors.

    Slots next to each other are often so alike that their cosines all round to 1, and rounding would choose the pair;
    the distance keeps what tells them apart. Two zero vectors are as alike as two equal ones.
    """
    return _alikeness_of_units(F.normalize(left, dim=-1), F.normalize(right, dim=-1))


def _alikeness_of_units(left: Tensor, right: Tensor) -> Tensor:
    return left.sub(right).square().sum(dim=-1).div(-2)


def weighted_mean(left: Tensor, count_left: Tensor, right: Tensor, count_right: Tensor) -> Tensor:
    """(count_l left + count_r right) / (count_l + count_r); values [..., C], counts [...]."""
    total = count_left + count_right
    return (left * count_left[..., None] + right * count_right[..., None]) / total[..., None]


@dataclass(frozen=True)
class MergePlan:
    """Where each frame of a chunk of c frames is kept, and what is merged after it.

    A bank lives on at most M + 1 pages per token position; their order does not matter to attention. The m slots
    carried in stand on pages 0...m-1, oldest first. Frame i is written to page `own[:, i]` and sees it together with
    every page in use. If the bank is then over its slots, page `left` becomes the mean of `left` and `right`, and
    `right` is where the next frame goes. A linear map of the slots merges with the same shares: keys and values are
    projected once per frame.

    Attributes:
        carried: m, slots in use before the chunk.
        own: [B, c, N] int64, page of each frame.
        left: [B, R, N] int64; merge r follows frame c - R + r of the chunk.
        right: [B, R, N] int64.
        share: [B, R, N] float32, weight of the left page in the merge; the right one has 1 - share.
        first: [B, c, pages, N] int32, of the frames that a page stands for while each frame attends, the first one's
            index in the clip; it names a slot wherever that is. 0 on pages that are not in use.
        order: [B, m', N] int64, pages in use after the chunk, oldest first.
        bank: the bank after the chunk.
    """

    carried: int
    own: Tensor
    left: Tensor
    right: Tensor
    share: Tensor
    first: Tensor
    order: Tensor
    bank: MemoryBank

    @property
    def num_frames(self) -> int:
        """Frames of the chunk, c."""
        return self.own.shape[1]

    @property
    def num_pages(self) -> int:
        """Pages in use at the chunk's fullest moment, frames included while they are attended to."""
        return self.order.shape[1] + bool(self.left.shape[1])

    def pages_seen(self, frame: int) -> int:
        """Pages in use while frame `frame` of the chunk attends, its own included."""
        return min(self.carried + frame + 1, self.num_pages)

    def merge_after(self, frame: int) -> int | None:
        """Index r of the merge after frame `frame`; None if there is none."""
        merge = frame - (self.num_frames - self.left.shape[1])
        return merge if merge >= 0 else None


@torch.no_grad()
def plan_merges(bank: MemoryBank, frames: Tensor, max_slots: int) -> MergePlan:
    """Decide all merges that appending `frames` [B, c, N, C] one by one to `bank` would make.

    Equal to c calls of `append`, decision by decision; each merge costs O(B N C) whatever M is, because only the two
    similarities beside a merge change.
    """
    return _MergePlanner(bank, frames.detach().float(), max_slots).plan()


class _MergePlanner:
    """The pages under construction; lives for one call of `plan_merges`."""

    def __init__(self, bank: MemoryBank, frames: Tensor, max_slots: int) -> None:
        batch, chunk, tokens, width = frames.shape
        self.frames, self.carried, self.max_slots = frames, bank.num_slots, max_slots
        num_pages = min(self.carried + chunk, max_slots + 1)
        self.values = frames.new_zeros(batch, num_pages, tokens, width)
        self.values[:, : self.carried] = bank.slots
        self.units = F.normalize(self.values, dim=-1)  # what similarities are taken between
        self.frame_units = F.normalize(frames, dim=-1)
        self.counts = torch.ones(batch, num_pages, tokens, device=frames.device)
        self.counts[:, : self.carried] = bank.counts
        pages = torch.arange(num_pages, device=frames.device)
        self.fresh = pages[None, :, None].expand(batch, -1, tokens)
        self.order = self.fresh[:, : self.carried]  # [B, k, N] pages in use, oldest first
        carried = self.units[:, : self.carried]
        self.similarity = _alikeness_of_units(carried[:, :-1], carried[:, 1:])  # [B, k - 1, N]
        ends = bank.counts.cumsum(1).int()  # of the frames that each slot stands for
        self.seen = bank.counts.sum(1, keepdim=True).int()  # [B, 1, N] frames before the chunk
        self.first = torch.zeros(batch, num_pages, tokens, dtype=torch.int32, device=frames.device)
        self.first[:, : self.carried] = ends - bank.counts.int()
        self.firsts: list[Tensor] = []
        self.own: list[Tensor] = []
        self.merges: list[tuple[Tensor, Tensor, Tensor]] = []  # left, right, share

    def plan(self) -> MergePlan:
        for index in range(self.frames.shape[1]):
            self._append(index)
            if self.order.shape[1] > self.max_slots:
                self._merge()
        nothing = self.order[:, :0]
        left, right, share = (
            torch.cat(column, dim=1)
            for column in (zip(*self.merges, strict=True) if self.merges else [[nothing], [nothing], [nothing.float()]])
        )
        bank = MemoryBank(_pick(self.values, self.order), self.counts.gather(1, self.order))
        own, first = torch.cat(self.own, dim=1), torch.stack(self.firsts, dim=1)
        return MergePlan(self.carried, own, left, right, share, first, self.order, bank)

    def _append(self, index: int) -> None:
        """Put frame `index` on the page that the last merge set free, or else on the next one."""
        used = self.order.shape[1]
        page = self.merges[-1][1] if self.merges else self.fresh[:, used : used + 1]
        unit = self.frame_units[:, index : index + 1]
        if used:
            beside = _alikeness_of_units(_pick(self.units, self.order[:, -1:]), unit)
            self.similarity = torch.cat([self.similarity, beside], dim=1)
        self._write(page, self.frames[:, index : index + 1], unit, torch.ones_like(self.counts[:, :1]))
        self.order = torch.cat([self.order, page], dim=1)
        # A merged slot stays on its left page, whose first frame is that of both.
        self.first = self.first.scatter(1, page, self.seen + index)
        self.firsts.append(self.first)
        self.own.append(page)

    def _merge(self) -> None:
        position = self.similarity.argmax(dim=1, keepdim=True)
        left, right = self.order.gather(1, position), self.order.gather(1, position + 1)
        counts = self.counts.gather(1, left), self.counts.gather(1, right)
        merged = weighted_mean(_pick(self.values, left), counts[0], _pick(self.values, right), counts[1])
        total = counts[0] + counts[1]
        unit = F.normalize(merged, dim=-1)
        self._write(left, merged, unit, total)
        self.order = self.order.gather(1, _without_right_of(position, self.order.shape[1]))
        self.merges.append((left, right, counts[0] / total))
        self._renew_similarity(position, unit)

    def _write(self, page: Tensor, values: Tensor, units: Tensor, counts: Tensor) -> None:
        index = _as_index(page, self.values)
        self.values.scatter_(1, index, values)
        self.units.scatter_(1, index, units)
        self.counts.scatter_(1, page, counts)

    def _renew_similarity(self, position: Tensor, unit: Tensor) -> None:
        """Drop the merged pair's similarity and compute the two beside it again, where there are any."""
        if self.order.shape[1] < 2:
            self.similarity = self.similarity[:, :0]
            return
        last_pair = self.order.shape[1] - 2
        similarity = self.similarity.gather(1, _without_right_of(position - 1, self.similarity.shape[1]))
        for pair, neighbour in ((position - 1, position - 1), (position, position + 1)):
            exists = (pair >= 0) & (pair <= last_pair)
            pair, neighbour = pair.clamp(0, last_pair), neighbour.clamp(0, last_pair + 1)
            fresh = _alikeness_of_units(_pick(self.units, self.order.gather(1, neighbour)), unit)
            similarity = similarity.scatter(1, pair, torch.where(exists, fresh, similarity.gather(1, pair)))
        self.similarity = similarity


def _as_index(entry: Tensor, values: Tensor) -> Tensor:
    return entry[..., None].expand(*entry.shape, values.shape[-1])


def _pick(values: Tensor, entry: Tensor) -> Tensor:
    """Entries [B, k, N] of a table [B, E, N, C] -> [B, k, N, C]."""
    return values.gather(1, _as_index(entry, values))


def _without_right_of(left: Tensor, length: int) -> Tensor:
    """Positions 0..length-1 without position left + 1, per token: [B, length - 1, N]."""
    positions = torch.arange(length - 1, device=left.device)[None, :, None]
    return positions + (positions > left)
