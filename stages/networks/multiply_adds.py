"""How many multiply-adds Stage 2's networks take for one clip, counted from their shapes.

Products of matrices only: norms, softmax, dropout and the search for merges are left out. On the way back a product is
made twice where both of its factors need a gradient, and once where one of them is frozen or remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from model.alignment import Alignment
from model.qformer.parts import QFormerParts
from model.qformer.qformer import frames_per_chunk_of, split_runs
from stages.networks.memory_law import head_width


@dataclass(frozen=True)
class _Attention:
    """One attention of the clip form: `asking` tokens of width `hidden` attend to `seen` tokens of `width` a page."""

    asking: int
    seen: int
    width: int
    hidden: int
    is_cross: bool

    @property
    def keys(self) -> int:
        """Keys and values of one frame, or of one slot."""
        return 2 * self.seen * self.width * self.hidden

    def forward(self, frames: int, pages: int) -> int:
        """Of so many frames, which see so many pages in all: query and output, keys and values, scores and means."""
        linear = 2 * self.asking * self.hidden**2
        return frames * (linear + self.keys) + pages * 2 * self.asking * self.seen * self.hidden

    def backward(self, frames: int, pages: int, carried: int) -> int:
        """Scores are computed again; `carried` slots and a frame's visual inputs send gradient to the weights alone."""
        linear = 4 * self.asking * self.hidden**2
        to_inputs = 2 * self.hidden * self.width if self.is_cross else self.keys  # of the temporal table: one row
        products = pages * 5 * self.asking * self.seen * self.hidden
        return frames * (linear + self.keys + to_inputs) + products + carried * self.keys


def qformer_multiply_adds(
    model: QFormerParts,
    *,
    frames: int,
    patches: int,
    words: int,
    wanted: Sequence[int] | None = None,
    frames_per_chunk: int | None = None,
    backward: bool,
) -> int:
    """Of the Q-Former in its clip form (`model.qformer.clip`).

    Args:
        model: whose widths; it may lie on the meta device.
        frames: T.
        patches: P.
        words: L.
        wanted: frames that carry a loss, as in `MemoryQFormer.forward`; None means all.
        frames_per_chunk: as there.
        backward: whether the chunks of wanted frames go back, too.
    """
    shape, slots = model.qformer.config, model.config.memory_slots
    hidden, tokens = shape.hidden_size, model.num_queries + words
    own = _Attention(tokens, tokens, hidden, hidden, is_cross=False)
    cross = _Attention(model.num_queries, patches, shape.encoder_hidden_size, hidden, is_cross=True)
    layers = [[own, cross] if layer.has_cross_attention else [own] for layer in model.layers]
    feed_forward = 2 * tokens * hidden * shape.intermediate_size
    longest = frames_per_chunk or frames_per_chunk_of(slots)
    total = 0
    for start, stop, needed in split_runs(range(frames) if wanted is None else wanted, frames, longest):
        count, pages = stop - start, sum(min(frame, slots) + 1 for frame in range(start, stop))
        back = backward and needed
        if not needed:  # the last layer only projects what it remembers
            total += min(stop, slots) * sum(attention.keys for attention in layers[-1])
        for layer in layers if needed else layers[:-1]:
            total += count * feed_forward * (3 if back else 1)
            for attention in layer:
                total += attention.forward(count, pages)
                total += attention.backward(count, pages, min(start, slots)) if back else 0
    return total


def language_multiply_adds(model: nn.Module, config: Any, tokens: int, *, backward: bool) -> int:
    """Of a frozen causal language model over a sequence, every position's scores of the vocabulary included.

    Args:
        model: it may lie on the meta device.
        config: its configuration, of transformers.
        tokens: S.
        backward: whether a gradient goes back to its inputs, too: as much again, and twice the attention's products.
    """
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    scores = 2 * config.num_hidden_layers * config.num_attention_heads * head_width(config) * tokens**2
    return tokens * linear * (2 if backward else 1) + scores * (3 if backward else 1)


def alignment_multiply_adds(model: Alignment, *, frames: int, tokens: int) -> int:
    """Of heads and gates, forward and backward, for so many distilled frames with so many tokens that are pooled."""

    def values(network: nn.Module) -> int:
        return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))

    levels, pooling = len(model.config.levels), model.config.pooling
    heads = sum(map(values, model.heads)) * (levels // len(model.heads))
    gates = sum(map(values, model.gates)) * (levels // max(1, len(model.gates)))
    return 3 * frames * (heads * (1 if pooling == "before" else tokens) + gates * (tokens if pooling == "loss" else 1))
