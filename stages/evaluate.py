"""Answering every sample of a split; `stages.scoring` says how good the answers are.

There are two ways of answering: beam search, which is the paper's, and ranking of a classification's candidates by
their log-likelihood, which cannot give a text that is no candidate (FACTS.md C.6).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM
from model.language import FrozenLanguageModel
from stages.config import EvaluateConfig
from stages.device import autocast, move
from stages.errors import UserError
from stages.manifest import Sample
from stages.scoring import METHODS, Method, Prediction, answer_type_of
from stages.tokens import Tokenizers
from stages.windows import Batch, bad_inputs

# Answers, best first, and their scores.
_Scored = tuple[tuple[str, ...], tuple[float, ...]]


@dataclass(frozen=True)
class _Asked:
    """What the language model is told: queries [B, Q, W], prompt [B, L'] and its mask."""

    queries: Tensor
    prompt: Tensor
    mask: Tensor


def predict_batches(
    model: DiffLMM,
    batches: Iterable[Batch],
    tokenizers: Tokenizers,
    config: LanguageConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Prediction]:
    """Answer batch after batch by beam search; the model is in eval mode afterwards."""
    for found in answer_batches(model, batches, tokenizers, config, EvaluateConfig(), device, dtype):
        yield found["generate"]


def methods_of(config: EvaluateConfig) -> tuple[Method, ...]:
    """The ways of answering that the configuration asks for, in the order in which they are shown."""
    return METHODS if config.method == "both" else (config.method,)


def first_words(text: str, words: int | None) -> str:
    """The text up to its `words`-th space (MA-LMM, lavis/tasks/vqa.py, takes one word); None: all of it."""
    return text if words is None else " ".join(text.split(" ")[:words])


def require_candidates(samples: Iterable[Sample]) -> None:
    """UserError for the first sample that has no candidates to rank."""
    for sample in samples:
        if sample.candidates is None:
            raise UserError(
                f"task {sample.task!r} has open answers, so there are no candidates to rank",
                where=f"sample {sample.id!r}",
                hint="evaluate it with evaluate.method=generate",
            )


def answer_batches(
    model: DiffLMM,
    batches: Iterable[Batch],
    tokenizers: Tokenizers,
    language: LanguageConfig,
    config: EvaluateConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[dict[Method, Prediction]]:
    """Answer batch after batch in every way asked for, watching each clip once; one dictionary for each sample.

    The model is in eval mode afterwards.

    Raises:
        UserError: candidates are to be ranked and a sample has none; or features are not finite.
    """
    model.eval()
    for batch in batches:
        clips = batch.on(device)
        prompts = [tokenizers.fitted(sample.question, sample.prompt) for sample in batch.samples]
        prompt, mask = tokenizers.prompts(prompts)
        found: dict[Method, list[_Scored]] = {}
        with autocast(device, dtype):
            queries, _ = model.watch(clips.features, clips.question)
            # Whatever is wrong in the cache comes through, and the queries are fewer than the features.
            if not queries.isfinite().all() and (planted := batch.not_finite()):
                videos = [sample.video for sample in planted]
                raise bad_inputs([sample.id for sample in planted], videos, "these cannot be answered")
            asked = _Asked(queries, prompt.to(device), mask.to(device))
            for method in methods_of(config):
                if method == "generate":
                    found[method] = _generate(model.language, asked, tokenizers, language)
                else:
                    found[method] = _rank(model.language, asked, batch.samples, tokenizers, config)
        for index, sample in enumerate(batch.samples):
            yield {
                method: Prediction(
                    sample.id,
                    sample.video,
                    sample.task,
                    prompts[index],
                    sample.answer,
                    *answers[index],
                    answer_type=answer_type_of(sample),
                )
                for method, answers in found.items()
            }


def _generate(
    model: FrozenLanguageModel, asked: _Asked, tokenizers: Tokenizers, config: LanguageConfig
) -> list[_Scored]:
    """Every sample's beams, best first, each cut to the words that count."""
    found = model.generate(asked.queries, asked.prompt, asked.mask, config)
    texts = [tuple(first_words(beam, config.answer_words) for beam in beams) for beams in tokenizers.decode(found.ids)]
    return [(beams, tuple(scores)) for beams, scores in zip(texts, found.log_probability.tolist(), strict=True)]


def _rank(
    model: FrozenLanguageModel,
    asked: _Asked,
    samples: Sequence[Sample],
    tokenizers: Tokenizers,
    config: EvaluateConfig,
) -> list[_Scored]:
    """Every sample's candidates, most likely first; samples with the same candidates are ranked together."""
    require_candidates(samples)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.candidates or (), []).append(index)
    found: dict[int, _Scored] = {}
    for answers, rows in groups.items():
        candidates = move(tokenizers.candidates(answers), asked.prompt.device)
        chosen = (asked.queries[rows], asked.prompt[rows], asked.mask[rows])
        scores = model.rank(*chosen, candidates, normalise=config.rank_score, rows=config.rank_rows)
        best = scores.sort(dim=1, descending=True, stable=True)
        for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            found[row] = (tuple(answers[index] for index in indices), tuple(values))
    return [found[index] for index in range(len(samples))]


@torch.no_grad()
def summed_answer_loss(
    model: DiffLMM,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, int]:
    """Eq. 8 in eval mode, without the distillation: the batches' means, each times its samples, and the samples."""
    model.eval()
    total, samples = 0.0, 0
    for batch in batches:
        clips = batch.on(device)
        with autocast(device, dtype):
            queries, _ = model.watch(clips.features, clips.question)
            loss = model.language.answer_loss(queries, clips.answer)
        total += loss.item() * len(batch.samples)
        samples += len(batch.samples)
    return total, samples
