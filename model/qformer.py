"""The Q-Former with a memory bank (MA-LMM; paper section 3.1 and FACTS.md C.5), in two forms over one set of weights.

`MemoryQFormer.step` takes one frame and a memory and returns the next memory: the plain form, for streaming and as the
reference. `MemoryQFormer.forward` takes a clip and computes runs of frames at once (`model.clip`). Both give the same
hidden states and gradients.

The parameters are those of `transformers`' `InstructBlipQFormerModel`, so that its state dict loads unchanged; only
the attention differs, which there has no place for remembered keys.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

from model import clip
from model.attention import attend, project_heads
from model.config import QFormerConfig
from model.memory import MemoryBank, append


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
    """What the Q-Former says about the frames asked for.

    Attributes:
        levels: 13 tensors [B, T', Q, H] for 12 layers; level u of the paper is `levels[u - 1]`, the embeddings first.
        words: the same levels of the question's tokens, [B, T', L, H].
        memory: the memory after the last frame.
    """

    levels: tuple[Tensor, ...]
    words: tuple[Tensor, ...]
    memory: QFormerMemory


@dataclass(frozen=True)
class QFormerRun:
    """What the Q-Former says about one run of consecutive wanted frames.

    Attributes:
        start: index in the clip of the run's first frame.
        levels: as of `QFormerOutput`, for the run's frames.
        words: likewise.
    """

    start: int
    levels: tuple[Tensor, ...]
    words: tuple[Tensor, ...]

    @property
    def frames(self) -> range:
        """Indices in the clip of the run's frames."""
        return range(self.start, self.start + self.levels[0].shape[1])


@dataclass(frozen=True)
class TextTokens:
    """A question in Q-Former tokens: ids [B, L] int64 and mask [B, L] bool, True on real tokens."""

    ids: Tensor
    mask: Tensor


class MemoryQFormer(nn.Module):
    """Q-Former, query tokens and temporal table: the trained part between frozen features and the language model.

    Args:
        qformer_config: the `qformer_config` of an InstructBLIP checkpoint.
        num_query_tokens: Q.
        config: slots of the memory, longest clip.
    """

    def __init__(self, qformer_config: InstructBlipQFormerConfig, num_query_tokens: int, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.qformer = InstructBlipQFormerModel(qformer_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_tokens, qformer_config.hidden_size))
        # Eq. 1's PE: learned, zero at the start, so that training begins from the image model (FACTS.md C.5).
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
        self._require_room(first_frame + frames)
        index = torch.arange(first_frame, first_frame + frames, device=self.query_tokens.device)
        table: Tensor = self.frame_positions(index)
        return table

    def _require_room(self, frames: int) -> None:
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

    def step(self, memory: QFormerMemory, frame: Tensor, text: TextTokens) -> QFormerOutput:
        """Take in one frame's features [B, P, C], exactly as published: remembered inputs are projected anew.

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
            attended = _attend_plain(layer.attention, hidden, remembered, key_mask)
            hidden = self.after_self_attention(layer, attended, partial(_cross_plain, layer, seen=seen))
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
        frames_per_run: int | None = None,
        memory: QFormerMemory | None = None,
    ) -> QFormerOutput:
        """Take in a clip's features [B, T, P, C] and return the hidden states of the wanted frames, in time order.

        Frames that are not wanted only feed the memory: they build no graph and skip the last layer.

        Args:
            features: frozen visual features; they never get a gradient.
            text: the question.
            wanted_frames: indices into the clip; None means all.
            frames_per_run: frames computed at once; None means twice the number of slots. It changes no value.
            memory: what was seen before this clip; None means nothing. One made under `torch.inference_mode` cannot be
                used where gradients are taken.

        Raises:
            ValueError: no frame is wanted, an index is out of range, or the clip is longer than the temporal table.
        """
        runs = self._runs(features, text, wanted_frames, frames_per_run, memory)
        outputs = []
        for run, carried in runs:
            after = carried
            if run is not None:
                outputs.append(run)
        levels, words = (
            tuple(torch.cat(parts, dim=1) for parts in zip(*column, strict=True))
            for column in ([run.levels for run in outputs], [run.words for run in outputs])
        )
        return QFormerOutput(levels, words, after.memory)

    def runs(
        self,
        features: Tensor,
        text: TextTokens,
        *,
        wanted_frames: Sequence[int] | None = None,
        frames_per_run: int | None = None,
        memory: QFormerMemory | None = None,
    ) -> Iterator[QFormerRun]:
        """Like `forward`, one run of wanted frames after the other, so that a training step can go back through each.

        Because banks are detached, the runs' graphs do not depend on one another. When each run's loss is sent back
        and its graph let go before the next is asked for, activations are bounded by the run's frames, whatever T; the
        law stands in `model.activation_memory`.

        Args and errors are those of `forward`.
        """
        for run, _ in self._runs(features, text, wanted_frames, frames_per_run, memory):
            if run is not None:
                yield run

    def _runs(
        self,
        features: Tensor,
        text: TextTokens,
        wanted_frames: Sequence[int] | None,
        frames_per_run: int | None,
        memory: QFormerMemory | None,
    ) -> Iterator[tuple[QFormerRun | None, clip.Carried]]:
        """Every run, None where no frame of it is wanted, with what is known after it."""
        batch, frames, patches, _ = features.shape
        wanted = _check_wanted(wanted_frames, frames)
        if frames_per_run is not None and frames_per_run < 1:
            raise ValueError(f"frames_per_run is {frames_per_run}; it must be at least 1")
        if memory is None:
            memory = self.empty_memory(batch, patches, text.ids.shape[1])
        self._require_room(memory.frames_seen + frames)
        carried = clip.carry(self, memory)
        for start, stop, needed in split_runs(
            wanted, frames, frames_per_run or frames_per_run_of(self.config.memory_slots)
        ):
            with nullcontext() if needed else torch.no_grad():
                levels, carried = clip.forward_run(self, carried, features[:, start:stop], text, feed_only=not needed)
            yield QFormerRun(start, *self._split_levels(levels)) if needed else None, carried

    def _split_levels(self, levels: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Levels [B, T', N, H] -> those of the queries and those of the question's tokens."""
        queries = self.num_queries
        return tuple(level[:, :, :queries] for level in levels), tuple(level[:, :, queries:] for level in levels)

    def after_self_attention(self, layer: Any, attended: Tensor, cross: Callable[[Tensor], Tensor]) -> Tensor:
        """The rest of a layer: cross-attention for the queries where the layer has it, then the two feed-forwards.

        attended [R, N, H] with R any number of rows; `cross` maps the queries [R, Q, H] to their attended visual input.
        """
        queries, words = attended[:, : self.num_queries], attended[:, self.num_queries :]
        if layer.has_cross_attention:
            queries = cross(queries)
        return torch.cat([layer.feed_forward_chunk_query(queries), layer.feed_forward_chunk(words)], dim=1)


def frames_per_run_of(memory_slots: int) -> int:
    """Frames computed at once where nothing is said.

    A run pays for the gradient of the slots carried in once, whatever its length, and keeps memory by its length.
    """
    return 2 * memory_slots


def split_runs(wanted: Sequence[int], frames: int, longest: int) -> list[tuple[int, int, bool]]:
    """Cut frames 0..frames-1 into runs (start, stop, wanted) of one kind each and at most `longest` frames."""
    kinds = [index in set(wanted) for index in range(frames)]
    runs: list[tuple[int, int, bool]] = []
    start = 0
    for index in range(1, frames + 1):
        if index == frames or kinds[index] != kinds[start] or index - start == longest:
            runs.append((start, index, kinds[start]))
            start = index
    return runs


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


def _attend_plain(attention: Any, hidden: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """Attention block with residual and LayerNorm; hidden [B, N, H], keys [B, K, width], mask [B, 1, 1, K] or None."""
    inner = attention.attention
    context = attend(
        inner,
        project_heads(inner.query, hidden, inner.num_attention_heads),
        project_heads(inner.key, keys, inner.num_attention_heads),
        project_heads(inner.value, keys, inner.num_attention_heads),
        mask,
    )
    output: Tensor = attention.output(context, hidden)
    return output


def _cross_plain(layer: Any, queries: Tensor, *, seen: Tensor) -> Tensor:
    return _attend_plain(layer.crossattention, queries, seen, None)
