"""Dropout whose masks do not depend on how a batch is cut: each value's draw is a hash of what the value belongs to.

A step gives every clip a seed. From it, and from layer, frame and token, both sides of a mask are numbered at random:
its rows (a token, or a head's query) and its columns (a channel, or a remembered key). A value is kept if the product
of row xor column and a constant, modulo 2^32, is large enough. Any two draws are independent, and the same clip loses
the same values in whichever part of a batch, chunk of frames or process it comes, and on every device.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from model.qformer.memory import MergePlan

# SplitMix64: the step of its counter, and the two factors of its finaliser, as signed numbers.
_STEP, _FACTORS = -0x61C8864680B583EB, (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_PRODUCT = -0x61C8864F  # odd, so that multiplying is one to one


@dataclass(frozen=True)
class AttentionDraws:
    """What decides which attention weights of a chunk of c frames are kept.

    Attributes:
        rate: share of them that is dropped.
        rows: [c, h, B, n, 1] int32, a number for every head's query.
        columns: [c, B, pages, N] int32, one for every key, by the run of frames that it stands for, wherever it is.
    """

    rate: float
    rows: Tensor
    columns: Tensor

    def scale(self, frame: int, used: int) -> Tensor:
        """What the weights of a frame, which sees `used` pages, are multiplied with: [h B, n, used N] float32."""
        columns = self.columns[frame, :, :used].flatten(1)[:, None]
        return (_kept(self.rows[frame], columns, self.rate) * (1 / (1 - self.rate))).flatten(0, 1)


class Place(IntEnum):
    """Where in a layer values are dropped."""

    EMBEDDINGS = 0
    SELF_ATTENTION = 1
    AFTER_SELF_ATTENTION = 2
    CROSS_ATTENTION = 3
    AFTER_CROSS_ATTENTION = 4
    QUERIES = 5
    WORDS = 6


@dataclass(frozen=True)
class Draws:
    """The draws of one layer for one chunk of frames.

    Attributes:
        seeds: [B] int64, one for every clip; None drops nothing.
        first_frame: index in the clip of the chunk's first frame.
        layer: number of the layer.
    """

    seeds: Tensor | None
    first_frame: int
    layer: int = 0

    def drop(self, values: Tensor, rate: float, place: Place) -> Tensor:
        """Drop hidden states [B, c, n, H]."""
        if self.seeds is None or not rate:
            return values
        keys = self._keys(self.seeds, place, values.shape[1])
        rows, columns = (_numbers(keys, side, size) for side, size in enumerate(values.shape[2:]))
        return values * (_kept(rows[..., None], columns[:, :, None], rate) * (1 / (1 - rate))).to(values.dtype)

    def of_attention(
        self, plan: MergePlan, heads: int, queries: int, rate: float, place: Place
    ) -> AttentionDraws | None:
        """The draws of an attention of that many queries to the tokens of a bank; None where nothing is dropped."""
        if self.seeds is None or not rate:
            return None
        keys = self._keys(self.seeds, place, plan.num_frames).T  # [c, B]
        of_heads = _folded(_folded(keys, 0)[:, None], torch.arange(heads, device=keys.device)[:, None])  # [c, h, B]
        token = torch.arange(plan.first.shape[3], device=keys.device)
        runs = _folded(_folded(keys, 1)[..., None, None], plan.first.transpose(0, 1).long())
        return AttentionDraws(rate, _numbers(of_heads, 0, queries)[..., None], _short(_folded(runs, token)))

    def _keys(self, seeds: Tensor, place: Place, frames: int) -> Tensor:
        """A number for every clip and frame, [B, c] int64."""
        frame = torch.arange(self.first_frame, self.first_frame + frames, device=seeds.device)
        return _folded(_folded(seeds, self.layer * len(Place) + place)[:, None], frame)


def _numbers(keys: Tensor, side: int, size: int) -> Tensor:
    """So many random numbers for each key: [..., size] int32."""
    return _short(_folded(_folded(keys, side)[..., None], torch.arange(size, device=keys.device)))


def _folded(key: Tensor, index: Tensor | int) -> Tensor:
    """The `index`-th number of the sequence that begins at `key`, int64."""
    steps = (index + 1) * _STEP
    value = key + (steps if isinstance(steps, Tensor) else (steps + 2**63) % 2**64 - 2**63)
    value = (value ^ (value >> 30)) * _FACTORS[0]
    value = (value ^ (value >> 27)) * _FACTORS[1]
    return value ^ (value >> 31)


def _short(value: Tensor) -> Tensor:
    return (value >> 32).to(torch.int32)


def _kept(rows: Tensor, columns: Tensor, rate: float) -> Tensor:
    """Which values are kept, bool, all but `rate` of them."""
    return (rows ^ columns).mul_(_PRODUCT) >= round(rate * 2**32) - 2**31
