"""Multiply-adds by arithmetic against those that torch counts while the real networks run, on small ones."""

import math

import pytest
import torch
from tiny_language import TARGET_WIDTH, build_llama
from tiny_qformer import HIDDEN, PATCHES, QUERIES, M, build_qformer, loss_on, random_features, random_text
from torch.utils.flop_counter import FlopCounterMode

from model.alignment import Alignment
from model.config import AlignmentConfig
from stages.networks.multiply_adds import alignment_multiply_adds, language_multiply_adds, qformer_multiply_adds

WORDS = 5


def added_product(_total, left, right, **_):
    """Operations of a product that is added in place, which the counter overlooks by itself."""
    return 2 * math.prod(left) * right[-1]


def counted(work):
    """Multiply-adds of `work()` as torch's own counter has them, two operations each."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_product}) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("frames", [1, M, 4 * M + 1])
@pytest.mark.parametrize("frames_per_chunk", [None, 2, 5])
def test_a_clip_forward_and_backward_takes_what_is_counted(frames, frames_per_chunk):
    model, features, text = build_qformer(), random_features(1, frames), random_text(WORDS)
    shape = {"frames": frames, "patches": PATCHES, "words": WORDS, "frames_per_chunk": frames_per_chunk}

    def step():
        for chunk in model.chunks(features, text, frames_per_chunk=frames_per_chunk):
            loss_on(chunk.levels, chunk.frames).backward()

    assert qformer_multiply_adds(model, **shape, backward=True) == counted(step)
    with torch.no_grad():
        forward = counted(lambda: model(features, text, frames_per_chunk=frames_per_chunk))
    assert qformer_multiply_adds(model, **shape, backward=False) == forward


@pytest.mark.parametrize("wanted", [[4 * M], [0, 5, 6, 4 * M]])
def test_frames_without_a_loss_skip_the_last_layer_and_the_way_back(wanted):
    model, features, text = build_qformer(), random_features(1, 4 * M + 1), random_text(WORDS)

    def step():
        for chunk in model.chunks(features, text, wanted_frames=wanted):
            loss_on(chunk.levels, chunk.frames).backward()

    found = qformer_multiply_adds(model, frames=4 * M + 1, patches=PATCHES, words=WORDS, wanted=wanted, backward=True)
    assert found == counted(step)


@pytest.mark.parametrize("backward", [False, True])
def test_a_frozen_language_model_takes_what_is_counted(backward):
    model = build_llama().requires_grad_(requires_grad=False)
    model.set_attn_implementation("eager")  # the counter knows no fused attention on a CPU
    inputs = torch.randn(1, 20, model.config.hidden_size, requires_grad=backward)

    def work():
        logits = model(inputs_embeds=inputs, use_cache=False).logits
        if backward:
            logits.sum().backward()

    # Older versions of transformers work out the angles of the rotary embedding by a product.
    angles = 20 * model.config.head_dim // 2
    found = language_multiply_adds(model, model.config, 20, backward=backward)
    assert counted(work) in (found, found + angles)


@pytest.mark.parametrize("pooling", ["before", "after", "loss"])
@pytest.mark.parametrize("shared", [False, True])
def test_heads_and_gates_take_what_is_counted(pooling, shared):
    config = AlignmentConfig(levels=(2, 3), gate_width=6, pooling=pooling, shared_head=shared, shared_gate=shared)
    model = Alignment(config, hidden_width=HIDDEN, target_width=TARGET_WIDTH, num_levels=3)
    levels = [torch.randn(1, 4, QUERIES, HIDDEN, requires_grad=True) for _ in range(3)]
    targets = torch.randn(1, 4, TARGET_WIDTH)
    found = counted(lambda: model(levels, targets)[0].backward())
    assert alignment_multiply_adds(model, frames=4, tokens=QUERIES) == found
