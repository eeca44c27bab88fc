"""The published sizes, built without memory for a single weight, have the published numbers of parameters (C.1)."""

import pytest
import torch
from transformers import (
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from model.config import QFormerConfig
from model.diff_lmm import DiffLMM
from model.language import FrozenLanguageModel, SpecialTokens
from model.qformer.qformer import MemoryQFormer

MILLION = 10**6
LAYERS, CROSS_LAYERS, H, FFN, C = 12, 6, 768, 3072, 1408  # cross-attention in every other layer
VOCABULARY, TEXT_POSITIONS, QUERIES, FRAMES = 30_523, 512, 32, 120
VISION_LAYERS, VISION_FFN, PATCHES = 39, 6144, 257
W, LLAMA_LAYERS, LLAMA_FFN = 4096, 32, 11_008
LN_VISION = 2 * C


def linear(inputs, outputs):
    return inputs * outputs + outputs


def norm(width):
    return 2 * width


def attention(width):
    """Query, key and value, the last two over tokens of `width`; output and its norm."""
    return linear(H, H) + 2 * linear(width, H) + linear(H, H) + norm(H)


FEED_FORWARD = linear(H, FFN) + linear(FFN, H) + norm(H)
EMBEDDINGS = (VOCABULARY + TEXT_POSITIONS) * H + norm(H)
# Every layer has two feed-forwards: one for the queries, one for the text.
QFORMER = EMBEDDINGS + LAYERS * (attention(H) + 2 * FEED_FORWARD) + CROSS_LAYERS * attention(C)
PROJECTION = linear(H, W)


@pytest.fixture(scope="module")
def model():
    """What Stage 2 trains, and the language model, at full width; heads and gate are the method's, not counted."""
    with torch.device("meta"):
        qformer = MemoryQFormer(
            InstructBlipQFormerConfig(
                vocab_size=VOCABULARY,
                hidden_size=H,
                num_hidden_layers=LAYERS,
                intermediate_size=FFN,
                encoder_hidden_size=C,
            ),
            QUERIES,
            QFormerConfig(max_frames=FRAMES),
        )
        llama = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32_000,
                hidden_size=W,
                intermediate_size=LLAMA_FFN,
                num_hidden_layers=LLAMA_LAYERS,
                num_attention_heads=32,
            )
        )
        return DiffLMM(qformer, FrozenLanguageModel(llama, SpecialTokens(2, 2)))


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def test_no_weight_takes_memory(model):
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_the_qformer_has_185_66_million(model):
    found = count(model.qformer.qformer.parameters())
    assert found == QFORMER == 185_660_160
    assert round(found / MILLION, 2) == 185.66


def test_trained_are_188_84_million_and_the_temporal_table(model):
    """MA-LMM trains the visual tower's last norm too; here it is frozen (E.12) and counts among the tower's."""
    trained = model.trained_parameters()
    table = trained.pop("qformer.frame_positions.weight").numel()
    assert table == FRAMES * C == 168_960
    assert round(table / MILLION, 2) == 0.17
    found = count(trained.values())
    assert found == QFORMER + QUERIES * H + PROJECTION == 188_834_560
    assert round((found + LN_VISION) / MILLION, 2) == 188.84


def test_the_projection_has_3_15_million(model):
    assert count(model.language_projection.parameters()) == PROJECTION == 3_149_824


def test_the_visual_tower_has_986_million():
    with torch.device("meta"):
        vision = InstructBlipVisionModel(
            InstructBlipVisionConfig(
                hidden_size=C,
                intermediate_size=VISION_FFN,
                num_hidden_layers=VISION_LAYERS,
                num_attention_heads=16,
                patch_size=14,
                image_size=224,
            )
        )
    block = linear(C, 3 * C) + linear(C, C) + linear(C, VISION_FFN) + linear(VISION_FFN, C) + 2 * norm(C)
    embeddings = C + PATCHES * C + linear(3 * 14 * 14, C)
    found = count(vision.parameters())
    assert found == VISION_LAYERS * block + embeddings + LN_VISION
    assert round(found / MILLION, 1) == 986.0


def test_the_language_model_has_6738_million(model):
    layer = 4 * W * W + 3 * W * LLAMA_FFN + 2 * W
    found = count(model.language.parameters())
    assert found == LLAMA_LAYERS * layer + 2 * 32_000 * W + W == 6_738_415_616
    assert not any(parameter.requires_grad for parameter in model.language.parameters())
