"""The tokenizers of the tiny networks: byte-level BPE of the words of the world's questions and answers."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from stages.data.cards import load_card

_SIZE = 600


def write_tokenizer(folder: Path, *, bert_style: bool) -> PreTrainedTokenizerBase:
    """Write the tokenizer of the Q-Former's questions (BERT's special tokens) or of the language model (LLaMA's)."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]"] if bert_style else ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if bert_style:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
        )
        names = {
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "bos_token": "[DEC]",
        }
    else:
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.save_pretrained(folder)
    return wrapped


def _corpus() -> list[str]:
    """Every prompt and label of the synthetic card, several times, so that each word becomes one token."""
    card = load_card("synthetic")
    lines = [task.prompt for task in card.tasks.values()]
    lines += [label for task in card.tasks.values() for label in task.labels or ()]
    return lines * 10
