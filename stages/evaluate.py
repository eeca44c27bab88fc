"""Answering every sample of a split, and scoring the answers by exact match (FACTS.md A.6).

There are two ways of answering: beam search, which is the paper's, and ranking of a classification's candidates by
their log-likelihood, which cannot give a text that is no candidate (FACTS.md C.6).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM
from model.language import FrozenLanguageModel
from stages.config import EvaluateConfig
from stages.device import autocast, move
from stages.errors import UserError
from stages.manifest import Sample
from stages.metrics import majority_floor, wilson_interval
from stages.tokens import Tokenizers
from stages.windows import Batch

Method = Literal["generate", "rank"]
METHODS: tuple[Method, ...] = ("generate", "rank")
# How many of the ranked candidates are kept: as many as beam search gives by default.
SHOWN = 5
# Answers, best first, and their scores.
_Scored = tuple[tuple[str, ...], tuple[float, ...]]


@dataclass(frozen=True)
class _Asked:
    """What the language model is told: queries [B, Q, W], prompt [B, L'] and its mask."""

    queries: Tensor
    prompt: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Prediction:
    """The answers to one sample.

    Attributes:
        sample: id of the sample.
        video: id of its video.
        task: its task.
        question: the prompt as the model read it.
        gold: the right answer.
        answers: the beams' texts, or the most likely candidates, best first.
        log_probability: of each beam, summed over tokens and divided by length ** length_penalty; of each candidate,
            its log-likelihood as `evaluate.rank_score` says.
    """

    sample: str
    video: str
    task: str
    question: str
    gold: str
    answers: tuple[str, ...]
    log_probability: tuple[float, ...]

    @property
    def correct(self) -> bool:
        """Whether the best answer is the right one, letter for letter."""
        return self.answers[0] == self.gold


@dataclass(frozen=True)
class TaskScore:
    """How one task went.

    Attributes:
        n: samples.
        correct: best answer equal to the right one.
        top1: correct / n.
        top5: share of samples with the right answer among the returned ones.
        ci95: Wilson 95 % interval of top1.
        floor: accuracy of always giving the split's most frequent answer.
    """

    n: int
    correct: int
    top1: float
    top5: float
    ci95: tuple[float, float]
    floor: float


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
        UserError: candidates are to be ranked and a sample has none.
    """
    model.eval()
    for batch in batches:
        clips = move(batch.clips, device)
        prompt, mask = tokenizers.prompts([sample.prompt_text for sample in batch.samples])
        found: dict[Method, list[_Scored]] = {}
        with autocast(device, dtype):
            queries, _ = model.watch(clips.features, clips.question)
            asked = _Asked(queries, prompt.to(device), mask.to(device))
            for method in methods_of(config):
                if method == "generate":
                    found[method] = _generate(model.language, asked, tokenizers, language)
                else:
                    found[method] = _rank(model.language, asked, batch.samples, tokenizers, config)
        for index, sample in enumerate(batch.samples):
            yield {
                method: Prediction(
                    sample.id, sample.video, sample.task, sample.prompt_text, sample.answer, *answers[index]
                )
                for method, answers in found.items()
            }


def _generate(
    model: FrozenLanguageModel, asked: _Asked, tokenizers: Tokenizers, config: LanguageConfig
) -> list[_Scored]:
    """Every sample's beams, best first."""
    found = model.generate(asked.queries, asked.prompt, asked.mask, config)
    texts = tokenizers.decode(found.ids)
    return [(tuple(beams), tuple(scores)) for beams, scores in zip(texts, found.log_probability.tolist(), strict=True)]


def _rank(
    model: FrozenLanguageModel,
    asked: _Asked,
    samples: Sequence[Sample],
    tokenizers: Tokenizers,
    config: EvaluateConfig,
) -> list[_Scored]:
    """Every sample's most likely candidates, best first; samples with the same candidates are ranked together."""
    require_candidates(samples)
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.candidates or (), []).append(index)
    found: dict[int, _Scored] = {}
    for answers, rows in groups.items():
        candidates = move(tokenizers.candidates(answers), asked.prompt.device)
        chosen = (asked.queries[rows], asked.prompt[rows], asked.mask[rows])
        scores = model.rank(*chosen, candidates, normalise=config.rank_score, rows=config.rank_rows)
        best = scores.topk(min(SHOWN, len(answers)), dim=1)
        for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
            found[row] = (tuple(answers[index] for index in indices), tuple(values))
    return [found[index] for index in range(len(samples))]


def score(predictions: Sequence[Prediction]) -> dict[str, TaskScore]:
    """Score each task on its own, in order of appearance."""
    tasks: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        tasks.setdefault(prediction.task, []).append(prediction)
    return {task: _score_task(rows) for task, rows in tasks.items()}


def _score_task(rows: Sequence[Prediction]) -> TaskScore:
    correct = sum(row.correct for row in rows)
    return TaskScore(
        n=len(rows),
        correct=correct,
        top1=correct / len(rows),
        top5=sum(row.gold in row.answers for row in rows) / len(rows),
        ci95=wilson_interval(correct, len(rows)),
        floor=majority_floor([row.gold for row in rows]),
    )


@torch.no_grad()
def mean_answer_loss(
    model: DiffLMM,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Eq. 8 averaged over batches by their samples, in eval mode and without the distillation."""
    model.eval()
    total, samples = 0.0, 0
    for batch in batches:
        clips = move(batch.clips, device)
        with autocast(device, dtype):
            queries, _ = model.watch(clips.features, clips.question)
            loss = model.language.answer_loss(queries, clips.answer)
        total += loss.item() * len(batch.samples)
        samples += len(batch.samples)
    return total / samples
