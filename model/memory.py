"""The memory bank of MA-LMM (FACTS.md C.5): past inputs, at most M slots per token position, most similar merged.

Every slot holds the mean of a run of consecutive frames. When a bank outgrows its slots, each token position merges,
on its own, the adjacent pair with the highest cosine similarity, weighted by how many frames each side stands for.
Banks are values: nothing here changes its arguments, and no module keeps one.

`append` is the plain form, one frame at a time. `plan_merges` makes the same decisions for a run of frames at once
and returns them as a table, for the clip form in `model.clip`.
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
    return F.normalize(left, dim=-1).sub(F.normalize(right, dim=-1)).square().sum(dim=-1).div(-2)


def weighted_mean(left: Tensor, count_left: Tensor, right: Tensor, count_right: Tensor) -> Tensor:
    """(count_l left + count_r right) / (count_l + count_r); values [..., C], counts [...]."""
    total = count_left + count_right
    return (left * count_left[..., None] + right * count_right[..., None]) / total[..., None]


@dataclass(frozen=True)
class MergePlan:
    """Every slot that a bank holds at some time during a run of c frames, and when.

    The entries are, in this order, the m slots carried in, the c frames themselves and the R merges made on the way:
    E = m + c + R with R = max(0, m + c - M), so the table grows with the run, not with the clip.

    Attributes:
        birth: [B, E, N] int64; frame i of the run sees an entry from i = birth on.
        death: [B, E, N] int64; and no longer from i = death on.
        mixing: [B, N, R, m + c] float32; each merge as a mean of carried slots and frames, rows sum to 1. A linear map
            of a merge is the same mixture of the mapped slots and frames: keys and values are projected once.
        bank: the bank after the run.
    """

    birth: Tensor
    death: Tensor
    mixing: Tensor
    bank: MemoryBank


@torch.no_grad()
def plan_merges(bank: MemoryBank, frames: Tensor, max_slots: int) -> MergePlan:
    """Decide all merges that appending `frames` [B, c, N, C] one by one to `bank` would make.

    Equal to c calls of `append`, decision by decision; each merge costs O(B N C) whatever M is, because only the two
    similarities beside a merge change.
    """
    return _MergePlanner(bank, frames.detach().float(), max_slots).plan()


class _MergePlanner:
    """The table under construction; lives for one call of `plan_merges`."""

    def __init__(self, bank: MemoryBank, frames: Tensor, max_slots: int) -> None:
        batch, run, tokens, width = frames.shape
        self.carried, self.run, self.max_slots = bank.num_slots, run, max_slots
        self.num_base = self.carried + run
        num_merges = max(0, self.num_base - max_slots)
        ones = torch.ones(batch, run + num_merges, tokens, device=frames.device)
        room = frames.new_empty(batch, num_merges, tokens, width)
        self.values = torch.cat([bank.slots, frames, room], dim=1)  # [B, E, N, C]
        self.counts = torch.cat([bank.counts, ones], dim=1)  # [B, E, N]
        entries = torch.arange(self.num_base + num_merges, device=frames.device)
        self.first = entries[None, :, None].repeat(batch, 1, tokens)  # first and last base entry of each run of frames
        self.last = self.first.clone()
        self.birth = (self.first - self.carried + 1).clamp(min=0)
        self.death = torch.full_like(self.first, run)
        self.live = self.first[:, : self.carried]  # [B, m, N] entries in the bank, oldest first
        self.similarity = alikeness(bank.slots[:, :-1], bank.slots[:, 1:])  # [B, m-1, N]

    def plan(self) -> MergePlan:
        for frame in range(self.run):
            self._append(self.carried + frame)
            if self.live.shape[1] > self.max_slots:
                self._merge(born=frame + 1)
        return MergePlan(
            self.birth, self.death, self._mixing(), MemoryBank(self._value(self.live), self.counts.gather(1, self.live))
        )

    def _value(self, entry: Tensor) -> Tensor:
        return _pick(self.values, entry)

    def _append(self, entry: int) -> None:
        new = torch.full_like(self.first[:, :1], entry)
        if self.live.shape[1]:
            beside = alikeness(self._value(self.live[:, -1:]), self.values[:, entry : entry + 1])
            self.similarity = torch.cat([self.similarity, beside], dim=1)
        self.live = torch.cat([self.live, new], dim=1)

    def _merge(self, born: int) -> None:
        entry = self.num_base + born - 1 - (self.max_slots - self.carried)
        left = self.similarity.argmax(dim=1, keepdim=True)
        parent_left, parent_right = self.live.gather(1, left), self.live.gather(1, left + 1)
        counts = self.counts.gather(1, parent_left), self.counts.gather(1, parent_right)
        merged = weighted_mean(self._value(parent_left), counts[0], self._value(parent_right), counts[1])
        self.values[:, entry : entry + 1] = merged
        self.counts[:, entry : entry + 1] = counts[0] + counts[1]
        self.first[:, entry : entry + 1] = self.first.gather(1, parent_left)
        self.last[:, entry : entry + 1] = self.last.gather(1, parent_right)
        self.birth[:, entry] = born
        for parent in (parent_left, parent_right):
            self.death.scatter_(1, parent, born)
        kept = _without_right_of(left, self.live.shape[1])
        self.live = self.live.gather(1, kept).scatter(1, left, entry)
        self._renew_similarity(left, merged)

    def _renew_similarity(self, left: Tensor, merged: Tensor) -> None:
        """Drop the merged pair's similarity and compute anew the two beside it, where there are any."""
        if self.live.shape[1] < 2:
            self.similarity = self.similarity[:, :0]
            return
        last_pair = self.live.shape[1] - 2
        similarity = self.similarity.gather(1, _without_right_of(left - 1, self.similarity.shape[1]))
        for pair, neighbour in ((left - 1, left - 1), (left, left + 1)):
            exists = (pair >= 0) & (pair <= last_pair)
            pair, neighbour = pair.clamp(0, last_pair), neighbour.clamp(0, last_pair + 1)
            fresh = alikeness(self._value(self.live.gather(1, neighbour)), merged)
            similarity = similarity.scatter(1, pair, torch.where(exists, fresh, similarity.gather(1, pair)))
        self.similarity = similarity

    def _mixing(self) -> Tensor:
        """Weights of the base entries in each merge: count of the base over that of the merge, zero outside its run."""
        base = torch.arange(self.num_base, device=self.first.device)
        first, last = (bound[:, self.num_base :, :, None] for bound in (self.first, self.last))
        inside = (first <= base) & (base <= last)  # [B, R, N, m+c]
        share = self.counts[:, : self.num_base].transpose(1, 2)[:, None] / self.counts[:, self.num_base :, :, None]
        return torch.where(inside, share, 0.0).transpose(1, 2)


def _as_index(entry: Tensor, values: Tensor) -> Tensor:
    return entry[..., None].expand(*entry.shape, values.shape[-1])


def _pick(values: Tensor, entry: Tensor) -> Tensor:
    """Entries [B, k, N] of a table [B, E, N, C] -> [B, k, N, C]."""
    return values.gather(1, _as_index(entry, values))


def _without_right_of(left: Tensor, length: int) -> Tensor:
    """Positions 0..length-1 without position left + 1, per token: [B, length - 1, N]."""
    positions = torch.arange(length - 1, device=left.device)[None, :, None]
    return positions + (positions > left)
