"""Diff-LMM put together: frozen features in, losses or answers out.

Trained: Q-Former with its queries and temporal table, language projection, and, while distilling, the alignment
heads and gate. Frozen: the language model. The visual encoder and the teacher are not here at all; they ran in Stage 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from model.alignment import Alignment, AlignmentReport, total_loss
from model.language import AnswerTokens, FrozenLanguageModel, build_projection
from model.qformer.parts import QFormerChunk, QFormerMemory, TextTokens
from model.qformer.qformer import MemoryQFormer
from model.spans import ALIGNMENT, BACKWARD, LANGUAGE, QFORMER, spanned

LANGUAGE_PREFIX = "language."


@dataclass(frozen=True)
class Clips:
    """A training batch.

    Attributes:
        features: [B, T, P, C] from the cache.
        targets: y* [B, T, D] float32; None when nothing is distilled.
        question: the question in Q-Former tokens.
        answer: prompt and answer in tokens of the language model.
    """

    features: Tensor
    targets: Tensor | None
    question: TextTokens
    answer: AnswerTokens


@dataclass(frozen=True)
class Losses:
    """One batch's losses; the terms are detached scalars.

    Attributes:
        total: Eq. 9; from `DiffLMM.forward` it carries the graph.
        answer: Eq. 8.
        kd: Eq. 7; None when nothing is distilled.
        alignment: per-level detail of the distillation; None when nothing is distilled.
    """

    total: Tensor
    answer: Tensor
    kd: Tensor | None
    alignment: AlignmentReport | None

    @classmethod
    def summed(cls, parts: Sequence["Losses"], clips: Sequence[int]) -> "Losses":
        """The losses of a step from those of its parts, which carry their `LossWeights` and had so many clips each."""
        total, answer = (torch.stack([getattr(part, name) for part in parts]).sum() for name in ("total", "answer"))
        kd = [part.kd for part in parts if part.kd is not None]
        reports = [part.alignment for part in parts if part.alignment is not None]
        if not kd:
            return cls(total, answer, kd=None, alignment=None)
        return cls(total, answer, torch.stack(kd).sum(), AlignmentReport.mean(reports, clips))


@dataclass(frozen=True)
class LossWeights:
    """What part of a training step's batch some of its clips are, so that gradients of the parts add up to the whole's.

    Eq. 8 is a mean over answer tokens, Eq. 7 one over clips, so the two have shares of their own.

    Attributes:
        answer: with which the mean over the clips' answer tokens is multiplied; or [B] float32, with which every answer
            token of a clip is.
        kd: with which the mean over clips is multiplied.
    """

    answer: float | Tensor
    kd: float


WHOLE = LossWeights(answer=1.0, kd=1.0)


@dataclass(frozen=True)
class _Part:
    """What one chunk of frames adds to a batch's losses; all but the report carry a graph."""

    answer: Tensor | None
    kd: Tensor | None
    report: AlignmentReport | None
    distilled: int

    def total(self, kd_weight: float) -> Tensor:
        """Its part of Eq. 9."""
        zero = torch.zeros((), device=next(term for term in (self.answer, self.kd) if term is not None).device)
        return total_loss(zero if self.answer is None else self.answer, zero if self.kd is None else self.kd, kd_weight)


class DiffLMM(nn.Module):
    """The model of Stage 2.

    Args:
        alignment: heads and gate; None to train without distillation.
        kd_weight: lambda of Eq. 9.
    """

    def __init__(
        self,
        qformer: MemoryQFormer,
        language: FrozenLanguageModel,
        alignment: Alignment | None = None,
        kd_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.qformer = qformer
        self.language_projection = build_projection(qformer.query_tokens.shape[2], language.width)
        self.alignment = alignment
        self.language = language
        self.kd_weight = kd_weight

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Everything that Stage 2 trains, by name."""
        return {name: p for name, p in self.named_parameters() if not name.startswith(LANGUAGE_PREFIX)}

    def trained_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the trained parameters, and the running mean of y*, by name."""
        return {name: t for name, t in self.state_dict().items() if not name.startswith(LANGUAGE_PREFIX)}

    @torch.no_grad()
    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Take trained parameters from a checkpoint; alignment heads may be absent on either side.

        Raises:
            ValueError: a parameter of the Q-Former or the projection is missing, unknown or misshapen.
        """
        own = self.trained_tensors()
        needed = {name for name in own if not name.startswith("alignment.")}
        missing = sorted(needed - tensors.keys())
        unknown = sorted(name for name in tensors.keys() - own.keys() if not name.startswith("alignment."))
        if missing or unknown:
            raise ValueError(f"checkpoint does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
        for name in own.keys() & tensors.keys():
            if own[name].shape != tensors[name].shape:
                raise ValueError(f"{name}: checkpoint {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}")
            own[name].copy_(tensors[name])

    def forward(
        self, clips: Clips, *, kd_frames: Sequence[int] | None = None, frames_per_chunk: int | None = None
    ) -> Losses:
        """Losses of a batch (Eq. 8, 7, 9), with the graph of every frame that carries one.

        Args:
            kd_frames: frames that carry L_kd; None means every frame. The answer always comes from the last frame.
            frames_per_chunk: frames computed at once, see `MemoryQFormer.forward`.

        Raises:
            ValueError: the model distils, but the batch has no targets.
        """
        self._observe(clips)
        parts = list(self._parts(clips, kd_frames, frames_per_chunk, WHOLE))
        total = torch.stack([part.total(self.kd_weight) for part in parts]).sum()
        return _joined(total, parts)

    def forward_backward(
        self,
        clips: Clips,
        *,
        kd_frames: Sequence[int] | None = None,
        frames_per_chunk: int | None = None,
        share: LossWeights | None = None,
        seeds: Tensor | None = None,
    ) -> Losses:
        """The losses of `forward`, with their gradients added to the parameters chunk by chunk.

        Equal to `forward(...).total.backward()`. The graph of one chunk of frames is gone before the next is built, so
        that the memory it takes is bounded by `frames_per_chunk`, not by T.

        Args and errors are those of `forward`; and
            share: the clips' part in their step, with which every loss is multiplied, once `alignment.observe_mean` has
                taken in the targets of all its parts. None: they are the whole step.
            seeds: [B] int64, one for each clip's dropout; None draws them.
        """
        parts = []
        totals = []
        if share is None:
            self._observe(clips)
        for part in self._parts(clips, kd_frames, frames_per_chunk, share or WHOLE, seeds):
            total = part.total(self.kd_weight)
            # Autocast would reach into the backward pass too, and round what the forward pass computed in float32.
            with record_function(BACKWARD), torch.autocast(total.device.type, enabled=False):
                total.backward()
            totals.append(total.detach())
            parts.append(_detached(part))
        return _joined(torch.stack(totals).sum(), parts)

    def _observe(self, clips: Clips) -> None:
        if self.training and self.alignment is not None and clips.targets is not None:
            self.alignment.observe(clips.targets)

    def _parts(
        self,
        clips: Clips,
        kd_frames: Sequence[int] | None,
        frames_per_chunk: int | None,
        share: LossWeights,
        seeds: Tensor | None = None,
    ) -> Iterator[_Part]:
        """The terms of every chunk of frames that carries a loss, one after the other."""
        last = clips.features.shape[1] - 1
        distilled = self._distilled_frames(clips, kd_frames)
        wanted = sorted({*distilled, last})
        chunks = self.qformer.chunks(
            clips.features, clips.question, wanted_frames=wanted, frames_per_chunk=frames_per_chunk, seeds=seeds
        )
        for chunk in spanned(QFORMER, chunks):
            answer = None
            if last in chunk.frames:
                with record_function(LANGUAGE):
                    queries = self.language_projection(chunk.levels[-1][:, -1])
                    answer = self._answer_loss(queries, clips, share)
            with record_function(ALIGNMENT):
                part = self._part(chunk, answer, clips, distilled, share)
            yield part

    def _answer_loss(self, queries: Tensor, clips: Clips, share: LossWeights) -> Tensor:
        if isinstance(share.answer, Tensor):
            return self.language.answer_loss(queries, clips.answer, share.answer)
        return share.answer * self.language.answer_loss(queries, clips.answer)

    def _part(
        self, chunk: QFormerChunk, answer: Tensor | None, clips: Clips, distilled: Sequence[int], share: LossWeights
    ) -> _Part:
        frames = [frame for frame in chunk.frames if frame in set(distilled)]
        if self.alignment is None or clips.targets is None or not frames:
            return _Part(answer, kd=None, report=None, distilled=0)
        levels, valid = chunk.levels, None
        if self.alignment.config.tokens == "all":
            levels = tuple(torch.cat(pair, dim=2) for pair in zip(chunk.levels, chunk.words, strict=True))
            valid = torch.cat([clips.question.mask.new_ones(chunk.levels[0].shape[::2]), clips.question.mask], dim=1)
        if len(frames) < len(chunk.frames):
            places = [frame - chunk.start for frame in frames]
            levels = tuple(level[:, places] for level in levels)
        kd, report = self.alignment(levels, clips.targets[:, frames], valid)
        part = share.kd * self.alignment.part_of(len(frames), len(distilled))
        return _Part(answer, kd * part, report, len(frames))

    def _distilled_frames(self, clips: Clips, kd_frames: Sequence[int] | None) -> list[int]:
        if self.alignment is None:
            return []
        if clips.targets is None:
            raise ValueError("the model distils, but the batch has no targets y*")
        return sorted(range(clips.features.shape[1]) if kd_frames is None else kd_frames)

    @torch.no_grad()
    def watch(
        self, features: Tensor, question: TextTokens, memory: QFormerMemory | None = None
    ) -> tuple[Tensor, QFormerMemory]:
        """Take in frames [B, T, P, C] and return the language model's queries [B, Q, W] and the memory.

        Called again with the returned memory, it goes on where it stopped; this is how a stream is followed.
        """
        out = self.qformer(features, question, wanted_frames=[features.shape[1] - 1], memory=memory)
        return self.language_projection(out.levels[-1][:, -1]), out.memory


def _detached(part: _Part) -> _Part:
    answer, kd = (None if term is None else term.detach() for term in (part.answer, part.kd))
    return _Part(answer, kd, part.report, part.distilled)


def _joined(total: Tensor, parts: Sequence[_Part]) -> Losses:
    """The losses of a batch from those of its chunks."""
    (answer,) = (part.answer for part in parts if part.answer is not None)
    distilled = [part for part in parts if part.report is not None]
    if not distilled:
        return Losses(total, answer.detach(), kd=None, alignment=None)
    kd = torch.stack([part.kd for part in distilled if part.kd is not None]).sum()
    reports = [part.report for part in distilled if part.report is not None]
    report = AlignmentReport.mean(reports, [part.distilled for part in distilled])
    return Losses(total, answer.detach(), kd.detach(), report)
