"""Answering every sample of a split by beam search, and scoring the answers by exact match (FACTS.md A.6)."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from model.config import LanguageConfig
from model.diff_lmm import DiffLMM
from stages.device import autocast, move
from stages.metrics import majority_floor, wilson_interval
from stages.tokens import Tokenizers
from stages.windows import Batch


@dataclass(frozen=True)
class Prediction:
    """The answers to one sample.

    Attributes:
        sample: id of the sample.
        video: id of its video.
        task: its task.
        question: the prompt as the model read it.
        gold: the right answer.
        answers: the beams' texts, best first.
        log_probability: of each beam, summed over tokens and divided by length ** length_penalty.
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
        """Whether the best beam is the right answer, letter for letter."""
        return self.answers[0] == self.gold


@dataclass(frozen=True)
class TaskScore:
    """How one task went.

    Attributes:
        n: samples.
        correct: best beam equal to the right answer.
        top1: correct / n.
        top5: share of samples with the right answer among the returned beams.
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
    """Answer batch after batch; the model is in eval mode afterwards."""
    model.eval()
    for batch in batches:
        clips = move(batch.clips, device)
        prompt, mask = tokenizers.prompts([sample.prompt_text for sample in batch.samples])
        with autocast(device, dtype):
            found = model.answer(clips.features, clips.question, prompt.to(device), mask.to(device), config)
        texts = tokenizers.decode(found.ids)
        for sample, beams, scores in zip(batch.samples, texts, found.log_probability.tolist(), strict=True):
            yield Prediction(
                sample.id, sample.video, sample.task, sample.prompt_text, sample.answer, tuple(beams), tuple(scores)
            )


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
