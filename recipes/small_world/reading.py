"""The language model: learns to read a caption that lists answers, a question, and to give the one it asks for.

That is what Stage 2 relies on in the full model: to answer a question from what stands before it. It sees no picture
and no sample of the data set.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from recipes.small_world.optimise import Trained, optimise
from recipes.small_world.settings import ReadingSettings
from stages.data.card_schema import Card
from stages.data.cards import load_card

_IGNORED = -100
_MAX_POSITIONS = 256


def llama_config(settings: ReadingSettings, vocabulary: int) -> LlamaConfig:
    """The language model's configuration; first and last token are those of `vocabulary.write_tokenizer`."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=_MAX_POSITIONS,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def teach_to_read(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: ReadingSettings, *, seed: int
) -> Trained:
    """Train `model` in place on made-up captions of the synthetic card's labels."""
    rng = random.Random(seed)  # noqa: S311  # makes training text, not secrets
    card = load_card("synthetic")

    def loss_of(_: int) -> Tensor:
        ids, mask, labels = _batch([example(card, rng) for _ in range(settings.batch)], tokenizer)
        loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    return optimise("language", model.parameters(), loss_of, steps=settings.steps, lr=settings.lr)


@torch.no_grad()
def reading_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, seed: int, count: int) -> float:
    """Share of captions drawn with `seed` whose question is answered right, every token of it the likeliest."""
    rng, card = random.Random(seed), load_card("synthetic")  # noqa: S311  # makes test text, not secrets
    ids, mask, labels = _batch([example(card, rng) for _ in range(count)], tokenizer)
    guessed = model(input_ids=ids, attention_mask=mask).logits[:, :-1].argmax(-1)
    right = (guessed == labels[:, 1:]) | (labels[:, 1:] == _IGNORED)
    return float(right.all(-1).float().mean())


def example(card: Card, rng: random.Random) -> tuple[str, str, str]:
    """A caption that names the answers to some tasks in any order, a task's question, and its answer."""
    labels = {name: rng.choice(task.labels or ()) for name, task in card.tasks.items()}
    asked = rng.choice(list(labels))
    others = rng.sample([name for name in labels if name != asked], k=rng.randrange(len(labels)))
    named = [asked, *others]
    rng.shuffle(named)
    return " ".join(labels[name] for name in named), card.tasks[asked].prompt, labels[asked]


def _batch(
    examples: Sequence[tuple[str, str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, Tensor]:
    """Caption, question, answer -> ids, mask and labels [B, S], padded on the right; labels of only the answer."""
    end = tokenizer.eos_token_id
    captions, prompts, answers = (
        tokenizer(list(part), add_special_tokens=False)["input_ids"] for part in zip(*examples, strict=True)
    )
    given = [[*caption, end, *prompt] for caption, prompt in zip(captions, prompts, strict=True)]
    predicted = [[*answer, end] for answer in answers]
    length = max(len(before) + len(after) for before, after in zip(given, predicted, strict=True))
    ids = torch.full((len(examples), length), end)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, _IGNORED)
    for row, (before, after) in enumerate(zip(given, predicted, strict=True)):
        stop = len(before) + len(after)
        ids[row, :stop] = torch.tensor(before + after)
        mask[row, :stop] = 1
        labels[row, len(before) : stop] = torch.tensor(after)
    return ids, mask, labels
