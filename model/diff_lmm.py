"""Diff-LMM put together: frozen features in, losses or answers out.

Trained: Q-Former with its queries and temporal table, language projection, and, while distilling, the alignment
heads and gate. Frozen: the language model. The visual encoder and the teacher are not here at all; they ran in Stage 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.alignment import Alignment, AlignmentReport, total_loss
from model.config import LanguageConfig
from model.language import Answers, AnswerTokens, FrozenLanguageModel, build_projection
from model.qformer import MemoryQFormer, QFormerMemory, TextTokens

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
    """One batch's losses: `total` carries the graph, the terms are detached scalars.

    Attributes:
        total: Eq. 9.
        answer: Eq. 8.
        kd: Eq. 7; None when nothing is distilled.
        alignment: per-level detail of the distillation; None when nothing is distilled.
    """

    total: Tensor
    answer: Tensor
    kd: Tensor | None
    alignment: AlignmentReport | None


class DiffLMM(nn.Module):
    """The model of Stage 2.

    Args:
        qformer: memory-bank Q-Former.
        language: frozen language model.
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

    def load_trained(self, tensors: dict[str, Tensor]) -> None:
        """Take trained parameters from a checkpoint; alignment heads may be absent on either side.

        Raises:
            ValueError: a parameter of the Q-Former or the projection is missing, unknown or misshapen.
        """
        own = self.trained_parameters()
        needed = {name for name in own if not name.startswith("alignment.")}
        missing = sorted(needed - tensors.keys())
        unknown = sorted(name for name in tensors.keys() - own.keys() if not name.startswith("alignment."))
        if missing or unknown:
            raise ValueError(f"checkpoint does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
        for name in own.keys() & tensors.keys():
            if own[name].shape != tensors[name].shape:
                raise ValueError(f"{name}: checkpoint {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}")
            own[name].data.copy_(tensors[name])

    def forward(
        self, clips: Clips, *, kd_frames: Sequence[int] | None = None, frames_per_run: int | None = None
    ) -> Losses:
        """Losses of a batch (Eq. 8, 7, 9).

        Args:
            clips: the batch.
            kd_frames: frames that carry L_kd; None means every frame. The answer always comes from the last frame.
            frames_per_run: frames computed at once, see `MemoryQFormer.forward`.
        """
        last = clips.features.shape[1] - 1
        distilled = self._distilled_frames(clips, kd_frames)
        wanted = sorted({*distilled, last})
        out = self.qformer(clips.features, clips.question, wanted_frames=wanted, frames_per_run=frames_per_run)
        answer = self.language.answer_loss(self.language_projection(out.levels[-1][:, -1]), clips.answer)
        if self.alignment is None or clips.targets is None:
            return Losses(total=answer, answer=answer.detach(), kd=None, alignment=None)
        positions = [wanted.index(frame) for frame in distilled]
        levels = [level[:, positions] for level in out.levels]
        kd, report = self.alignment(levels, clips.targets[:, distilled])
        return Losses(total_loss(answer, kd, self.kd_weight), answer.detach(), kd.detach(), report)

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
        """Take in frames [B, T, P, C] and return what the language model is told, [B, Q, W], and memory.

        Called again with the returned memory, it goes on where it stopped; this is how a stream is followed.
        """
        out = self.qformer(features, question, wanted_frames=[features.shape[1] - 1], memory=memory)
        return self.language_projection(out.levels[-1][:, -1]), out.memory

    @torch.no_grad()
    def answer(
        self, features: Tensor, question: TextTokens, prompt: Tensor, prompt_mask: Tensor, config: LanguageConfig
    ) -> Answers:
        """Beam search answers for clips [B, T, P, C]; prompt as in `FrozenLanguageModel.generate`."""
        queries, _ = self.watch(features, question)
        return self.language.generate(queries, prompt, prompt_mask, config)
