"""Teaching the tiny language model to read: a caption that lists answers, a question, the one answer it asks for.

A language model with random weights cannot be told anything through its input embeddings. Seconds of training on
made-up captions of the synthetic data set's labels give it what Stage 2 relies on in the full model: to answer a
question from what stands before it. It sees no video and no sample of the data set.
"""

import random
from typing import TYPE_CHECKING

import torch

from stages.cards import load_card

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.card_schema import Card

_STEPS, _BATCH, _LR = 300, 32, 2e-3
# The rate rises over the first steps and falls over the last third.
_WARMUP, _DECAY = 20, 100
_IGNORED = -100


def teach_to_answer(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, end_id: int, seed: int) -> None:
    """Train `model` in place; the same seed gives the same weights on one machine."""
    threads = torch.get_num_threads()
    # One thread: faster for matrices this small, and the order of additions does not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.0)
        for step, (ids, mask, labels) in enumerate(_batches(load_card("synthetic"), tokenizer, end_id, seed)):
            optimizer.param_groups[0]["lr"] = _LR * min(1.0, (step + 1) / _WARMUP, (_STEPS - step) / _DECAY)
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    finally:
        torch.set_num_threads(threads)


def _batches(
    card: "Card", tokenizer: "PreTrainedTokenizerBase", end_id: int, seed: int
) -> "Iterator[tuple[Tensor, Tensor, Tensor]]":
    rng = random.Random(seed)  # noqa: S311  # makes training text, not secrets
    for _ in range(_STEPS):
        texts = [_example(card, rng) for _ in range(_BATCH)]
        captions, prompts, answers = (
            tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*texts, strict=True)
        )
        yield _pad(
            [
                ([*caption, end_id, *prompt], [*answer, end_id])
                for caption, prompt, answer in zip(captions, prompts, answers, strict=True)
            ],
            end_id,
        )


def _example(card: "Card", rng: random.Random) -> tuple[str, str, str]:
    """A caption that names the answers to some tasks in any order, a task's question, and its answer."""
    labels = {name: rng.choice(task.labels or ()) for name, task in card.tasks.items()}
    asked = rng.choice(list(labels))
    others = rng.sample([name for name in labels if name != asked], k=rng.randrange(len(labels)))
    named = [asked, *others]
    rng.shuffle(named)
    return " ".join(labels[name] for name in named), card.tasks[asked].prompt, labels[asked]


def _pad(rows: list[tuple[list[int], list[int]]], end_id: int) -> "tuple[Tensor, Tensor, Tensor]":
    """(given, to predict) -> ids, mask and labels [B, S], padded on the right."""
    length = max(len(given) + len(predicted) for given, predicted in rows)
    ids = torch.full((len(rows), length), end_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, _IGNORED)
    for row, (given, predicted) in enumerate(rows):
        stop = len(given) + len(predicted)
        ids[row, :stop] = torch.tensor(given + predicted)
        mask[row, :stop] = 1
        labels[row, len(given) : stop] = torch.tensor(predicted)
    return ids, mask, labels
