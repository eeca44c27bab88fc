"""A small LLaMA with random weights, and the whole model around it."""

import torch
from tiny_qformer import HIDDEN, LEVELS, build_qformer, randomise
from transformers import LlamaConfig, LlamaForCausalLM

from model.alignment import Alignment
from model.config import AlignmentConfig
from model.diff_lmm import DiffLMM
from model.language import FrozenLanguageModel, SpecialTokens

VOCABULARY, WIDTH, START, END = 50, 16, 2, 3
TARGET_WIDTH = 12
KD_WEIGHT = 0.7


def build_llama():
    """Weights large enough that no two next tokens are about equally likely."""
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        # As in the published checkpoint, these are wrong: the tokenizer's ids are passed explicitly.
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    return LlamaForCausalLM(shape).eval()


def build_language():
    return FrozenLanguageModel(build_llama(), SpecialTokens(START, END))


def build_model(levels=(8, 9, 10, 11, 12, 13), **qformer):
    qformer = build_qformer(**qformer)
    alignment = Alignment(
        AlignmentConfig(levels=levels, gate_width=6),
        hidden_width=HIDDEN,
        target_width=TARGET_WIDTH,
        num_levels=LEVELS,
    )
    model = DiffLMM(qformer, build_language(), alignment, KD_WEIGHT)
    randomise(model.alignment)
    randomise(model.language_projection)
    return model
