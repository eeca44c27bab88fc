"""A language model as lmsys publishes Vicuna: its tokenizer is a SentencePiece model alone; and what may be wrong."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from model.config import LanguageConfig
from pipeline.settings.config import resolve
from stages.errors import UserError
from stages.networks.build import load_language
from stages.networks.tokens import Tokenizers
from stages.weights.repository import Repository

WORDS = ("the", "kitchen", "is", "where", "two", "friends", "talk", "about", "a", "red", "car", "what", "who", "how")
TEXTS = ("what is the kitchen? Short answer:", "two friends", "Zürich 7, naïve — 🙂", "  a  red\ncar ")
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'9' * 64}\nsize 499723\n".encode()


def special(content):
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": content, **flags}


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    """The content of a small SentencePiece model of LLaMA's kind: byte pairs, bytes for what is unknown."""
    chance, prefix = random.Random(0), tmp_path_factory.mktemp("sentencepiece") / "tokenizer"
    lines = [" ".join(chance.choice(WORDS) for _ in range(8)) for _ in range(300)]
    options = {"vocab_size": 400, "hard_vocab_limit": False, "model_type": "bpe", "byte_fallback": True}
    ids = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), minloglevel=2, num_threads=1, **options, **ids
    )
    return prefix.with_suffix(".model").read_bytes()


@pytest.fixture
def folder(tmp_path, sentencepiece):
    """The files of `lmsys/vicuna-7b-v1.1` as they are named there, with a small model."""
    made = tmp_path / "vicuna"
    config = LlamaConfig(
        vocab_size=400, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(made)
    (made / "tokenizer.model").write_bytes(sentencepiece)
    settings = {
        **{"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False},
        **{"bos_token": special("<s>"), "eos_token": special("</s>"), "unk_token": special("<unk>")},
        **{"model_max_length": 2048, "pad_token": None, "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"},
    }
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    (made / "special_tokens_map.json").write_text(json.dumps(tokens))
    return made


def tokenizers(folder):
    return Tokenizers.load(resolve(preset="tiny", overrides=[f"language.source={folder}"]).config)


def language(folder):
    return load_language(LanguageConfig(source=str(folder)), torch.float32)


def the_one_line(folder, read):
    with pytest.raises(UserError) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_folder_loads_and_gives_the_ids_of_llamas_own_tokenizer(folder):
    loaded = tokenizers(folder)
    theirs, plain = LlamaTokenizer.from_pretrained(folder), SentencePieceProcessor(str(folder / "tokenizer.model"))
    for text in TEXTS:
        ids = loaded.language(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert loaded.language(text)["input_ids"] == theirs(text)["input_ids"] == [1, *ids]
    assert loaded.language(TEXTS[0], add_special_tokens=False)["input_ids"] == plain.encode(TEXTS[0])
    assert (loaded.special.start_id, loaded.special.end_id) == (1, 2)
    assert language(folder).config.vocab_size == 400


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "config.json"])
def test_a_git_lfs_pointer_in_the_place_of_a_tokenizer_file_is_named_as_such(folder, name):
    (folder / name).write_bytes(POINTER)
    line = the_one_line(folder, tokenizers)
    assert line.startswith(f"{folder / name}: a git-lfs pointer that stands for 499,723 bytes, not the file itself. ")
    assert "git lfs pull" in line


def test_a_git_lfs_pointer_in_the_place_of_weights_is_named_as_such(folder):
    (folder / "model.safetensors").write_bytes(POINTER)
    assert "model.safetensors: a git-lfs pointer" in the_one_line(folder, language)
    assert "git-lfs pointer" in the_one_line(folder, lambda _: Repository(str(folder)).tensors())


def test_of_several_shards_the_one_that_is_a_pointer_or_cut_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shard_of = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(names)}
    for shard in set(shard_of.values()):
        part = {name: tensors[name] for name in names if shard_of[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert language(folder).config.vocab_size == 400
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    for damaged, words in ((POINTER, "a git-lfs pointer"), (content[:-9], "cut short, or not a safetensors file")):
        second.write_bytes(damaged)
        assert the_one_line(folder, language).startswith(f"{second}: {words}")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", None], ids=["empty", "a page", "cut"])
def test_a_tokenizer_model_that_is_none_is_named(folder, sentencepiece, content):
    (folder / "tokenizer.model").write_bytes(sentencepiece[:2000] if content is None else content)
    words = "the file is empty" if content == b"" else "cut short, or not a SentencePiece model"
    assert the_one_line(folder, tokenizers).startswith(f"{folder / 'tokenizer.model'}: {words}")


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    """transformers makes one of the three special tokens alone, to which every word is unknown."""
    (folder / "tokenizer.model").unlink()
    line = the_one_line(folder, tokenizers)
    assert line.startswith(
        f"{folder}: the tokenizer has no vocabulary; allowed: one of tokenizer.json, tokenizer.model"
    )
    assert "hf download" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[1]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Nope"}}'),
        ("config.json", '{"model_type": "llama", "hidden_size": "many"}'),
        ("config.json", '{"model_type": "no-such-network"}'),
    ],
)
def test_whatever_transformers_raises_is_one_line_that_names_the_folder_and_what_to_do(folder, name, content):
    (folder / name).write_text(content)
    line = the_one_line(folder, tokenizers)
    assert line.startswith(str(folder))
    assert "ownload" in line


def test_a_package_that_transformers_asks_for_is_passed_on(folder, monkeypatch):
    def ask(*_arguments, **_options):
        raise ImportError("\nLlamaTokenizer requires the SentencePiece library:\n run `pip install sentencepiece`\n")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", ask)
    line = the_one_line(folder, tokenizers)
    assert "no tokenizer: LlamaTokenizer requires the SentencePiece library: run `pip install sentencepiece`" in line
