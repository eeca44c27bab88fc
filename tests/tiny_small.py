"""Tiny checkpoints of the architectures of preset `small`, in the files in which the real ones are published."""

import json

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from stages.weights.repository import Repository

WORDS = "what is the scene of the movie? airport hotel office prison friend\n" * 20
END, PADDING, START_OF_TURN = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
VISUAL_WIDTH, PATCHES, QWEN_WIDTH = 96, 5, 32


def save_instructblip(folder):
    """In shards: `config.json`, weights whose language model lies in files of its own, both tokenizers."""
    torch.manual_seed(0)
    small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = InstructBlipConfig(
        vision_config={**small, "hidden_size": VISUAL_WIDTH, "image_size": 28, "patch_size": 14},
        qformer_config={**small, "num_hidden_layers": 12, "vocab_size": 500},
        text_config=LlamaConfig(**small, vocab_size=430).to_dict(),
        num_query_tokens=4,
    )
    InstructBlipForConditionalGeneration(config).save_pretrained(folder, max_shard_size="40KB")
    bundled = Repository("bundled:tiny-instructblip").folder
    (folder / "qformer_tokenizer").mkdir()
    for path in (bundled / "qformer_tokenizer").iterdir():
        (folder / "qformer_tokenizer" / path.name).write_bytes(path.read_bytes())
    return folder


def save_qwen(folder):
    """Biased queries, keys and values, grouped keys, tied embeddings; a byte-level tokenizer with a chat template."""
    tokenizer = ByteLevelBPETokenizer()
    specials = [PADDING, START_OF_TURN, END]
    tokenizer.train_from_iterator(WORDS.splitlines(), vocab_size=300)
    tokenizer.add_special_tokens(specials)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PADDING,
        "unk_token": None,
        "additional_special_tokens": [START_OF_TURN, END],
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size() + 8,  # as published: more rows than tokens
        hidden_size=QWEN_WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.bias"):
                parameter.normal_()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder
