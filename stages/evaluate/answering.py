"""Answering every sample of a split; `stages.evaluate.scoring` says how good the answers are.

There are two ways of answering: beam search, which is the paper's, and ranking of a classification's candidates by
their log-likelihood, which cannot give a text that is no candidate (docs/evaluation.md).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM
from model.language import FrozenLanguageModel
from stages.batches.windows import Batch, bad_inputs
from stages.config import EvaluateConfig
from stages.data.manifest import Sample
from stages.device import autocast, move
from stages.errors import UserError
from stages.evaluate.at_once import MOST_SAMPLES, AtOnce, too_little_memory
from stages.evaluate.scoring import METHODS, Method, Prediction, answer_type_of
from stages.networks.tokens import Tokenizers

Scored = tuple[tuple[str, ...], tuple[float, ...]]
"""Answers, best first, and their scores."""


@dataclass(frozen=True)
class Asked:
    """What the language model is asked with: queries [B, Q, W], prompt [B, L'] and its mask."""

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
    at_once: AtOnce | None = None,
) -> Iterator[Prediction]:
    """Answer batch after batch by beam search; the model is in eval mode afterwards."""
    for found in answer_batches(model, batches, tokenizers, config, EvaluateConfig(), device, dtype, at_once):
        yield found["generate"]


def methods_of(config: EvaluateConfig, *, candidates: bool = True) -> tuple[Method, ...]:
    """The ways of answering that the configuration asks for, in the order in which they are shown.

    Both are one where no sample has `candidates` to rank.
    """
    if config.method == "both":
        return METHODS if candidates else ("generate",)
    return (config.method,)


def first_words(text: str, words: int | None) -> str:
    """The text up to its `words`-th space (MA-LMM:lavis/tasks/vqa.py:139-160 takes one word); None: all of it."""
    return text if words is None else " ".join(text.split(" ")[:words])


def require_candidates(samples: Iterable[Sample]) -> None:
    """UserError for the first sample that has no candidates to rank."""
    for sample in samples:
        if sample.candidates is None:
            raise UserError(
                f"task {sample.task!r} has open answers, so there are no candidates to rank",
                where=f"sample {sample.id!r}",
                hint="generate the answers, or, with evaluate.method=both, rank the samples that have candidates",
            )


def answer_batches(
    model: DiffLMM,
    batches: Iterable[Batch],
    tokenizers: Tokenizers,
    language: LanguageConfig,
    config: EvaluateConfig,
    device: torch.device,
    dtype: torch.dtype,
    at_once: AtOnce | None = None,
) -> Iterator[dict[Method, Prediction]]:
    """Answer batch after batch in every way asked for, watching each clip once; one dictionary for each sample.

    Asked for both ways, a sample without candidates has the generated answer alone. The model is in eval mode
    afterwards. A batch that does not fit into the memory is answered in parts; `at_once` then has their size.

    Raises:
        UserError: candidates are to be ranked and a sample has none; features are not finite; or the memory does not
            hold one sample.
    """
    model.eval()
    at_once = at_once or AtOnce.of(config)

    def answered(part: Batch) -> list[dict[Method, Prediction]]:
        with autocast(device, dtype):
            return _answer(model, part, tokenizers, language, config, at_once)

    for batch in batches:
        for part in at_once.parts(batch, answered):
            yield from part


def _answer(
    model: DiffLMM,
    batch: Batch,
    tokenizers: Tokenizers,
    language: LanguageConfig,
    config: EvaluateConfig,
    at_once: AtOnce,
) -> list[dict[Method, Prediction]]:
    """One batch's answers, a dictionary for each sample."""
    device = next(iter(model.parameters())).device
    clips = batch.on(device)
    prompts = [tokenizers.fitted(sample.question, sample.prompt) for sample in batch.samples]
    prompt, mask = tokenizers.prompts(prompts)
    found: dict[Method, dict[int, Scored]] = {}
    queries, _ = model.watch(clips.features, clips.question)
    # Whatever is wrong in the cache comes through, and the queries are fewer than the features.
    if not queries.isfinite().all() and (planted := batch.not_finite()):
        videos = [sample.video for sample in planted]
        raise bad_inputs([sample.id for sample in planted], videos, "these cannot be answered")
    asked = Asked(queries, prompt.to(device), mask.to(device))
    for method in methods_of(config):
        if method == "generate":
            found[method] = dict(enumerate(_generate(model.language, asked, tokenizers, language)))
        else:
            found[method] = _rank(model.language, asked, batch.samples, tokenizers, config, at_once)
    return [
        {
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
            if index in answers
        }
        for index, sample in enumerate(batch.samples)
    ]


def _generate(model: FrozenLanguageModel, asked: Asked, tokenizers: Tokenizers, config: LanguageConfig) -> list[Scored]:
    """Every sample's beams, best first, each cut to the words that count."""
    found = model.generate(asked.queries, asked.prompt, asked.mask, config)
    texts = [tuple(first_words(beam, config.answer_words) for beam in beams) for beams in tokenizers.decode(found.ids)]
    return [(beams, tuple(scores)) for beams, scores in zip(texts, found.log_probability.tolist(), strict=True)]


def _rank(
    model: FrozenLanguageModel,
    asked: Asked,
    samples: Sequence[Sample],
    tokenizers: Tokenizers,
    config: EvaluateConfig,
    at_once: AtOnce,
) -> dict[int, Scored]:
    """The candidates of every sample that has some; samples with the same candidates are ranked together."""
    if config.method != "both":
        require_candidates(samples)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        if sample.candidates is not None:
            groups.setdefault(sample.candidates, []).append(index)
    found: dict[int, Scored] = {}
    for answers, rows in groups.items():
        chosen = Asked(asked.queries[rows], asked.prompt[rows], asked.mask[rows])
        found.update(zip(rows, rank_answers(model, chosen, answers, tokenizers, config, at_once), strict=True))
    return found


def rank_answers(
    model: FrozenLanguageModel,
    asked: Asked,
    answers: Sequence[str],
    tokenizers: Tokenizers,
    config: EvaluateConfig,
    at_once: AtOnce | None = None,
) -> list[Scored]:
    """The same answers for each of what is asked, most likely first, with their log-likelihoods.

    Raises:
        MemoryError: one candidate of each does not fit.
        UserError: likewise, of what is one sample.
    """
    candidates = move(tokenizers.candidates(answers), asked.prompt.device)
    at_once = at_once or AtOnce.of(config)

    def scored(rows: int) -> Tensor:
        return model.rank(asked.queries, asked.prompt, asked.mask, candidates, normalise=config.rank_score, rows=rows)

    scores = at_once.ranked(scored, samples=len(asked.prompt))
    if scores is None:
        raise too_little_memory(1) if len(asked.prompt) == 1 else MemoryError("a candidate of each sample")
    best = scores.sort(dim=1, descending=True, stable=True)
    return [
        (tuple(answers[index] for index in indices), tuple(values))
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def summed_answer_loss(
    model: DiffLMM,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    at_once: AtOnce | None = None,
) -> tuple[float, int]:
    """Eq. 8 in eval mode, without the distillation: the sum over all answer tokens, and their number."""
    model.eval()

    def loss_of(part: Batch) -> float:
        clips = part.on(device)
        with autocast(device, dtype):
            queries, _ = model.watch(clips.features, clips.question)
            return model.language.answer_loss(queries, clips.answer, torch.ones(len(queries), device=device)).item()

    at_once = at_once or AtOnce(MOST_SAMPLES)
    total, tokens = 0.0, 0
    for batch in batches:
        total += sum(at_once.parts(batch, loss_of))
        tokens += int(batch.stored.answer.answer_mask.sum())
    return total, tokens
