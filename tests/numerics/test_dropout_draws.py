"""Dropout that is a function of clip, frame, layer and token: the same however a batch is cut, and random."""

import pytest
import torch
from tiny_qformer import M, build_qformer, random_features, random_text
from tolerances import FLOAT32_HIDDEN, largest_difference

from model.qformer.dropout import Draws, Place
from model.qformer.memory import MemoryBank, plan_merges
from model.qformer.parts import TextTokens

RATE = 0.3
# Twelve layers in which what is kept is scaled up; another mask moves the levels by more than 1.
ROUNDING = 10 * FLOAT32_HIDDEN
SEEDS = torch.tensor([11, -(2**62), 13])
FRAMES = 3 * M + 1
# Six standard deviations of a share measured on a million draws.
CHANCE = 6 * (RATE * (1 - RATE) / 1e6) ** 0.5


@pytest.fixture(scope="module")
def model():
    built = build_qformer().train()
    for part in built.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = RATE
        elif hasattr(part, "attention_head_size"):
            part.config.attention_probs_dropout_prob = RATE
    return built


def levels(model, rows, *, seeds=SEEDS, frames_per_chunk=None, length=None):
    """The last level of these clips of three, with the questions padded to a length."""
    text = random_text(5, 2, 4)
    length = length or text.ids.shape[1]
    text = TextTokens(text.ids[rows, :length], text.mask[rows, :length])
    features = random_features(3, FRAMES)[rows]
    with torch.no_grad():
        return model(features, text, seeds=seeds[rows], frames_per_chunk=frames_per_chunk).levels[-1]


def test_a_clip_loses_the_same_values_alone_and_beside_others_with_longer_questions(model):
    whole = levels(model, [0, 1, 2])
    for row, length in enumerate((5, 2, 4)):
        assert largest_difference(levels(model, [row], length=length), whole[row : row + 1]) <= ROUNDING


@pytest.mark.parametrize("frames_per_chunk", [1, 2, M + 1])
def test_a_clip_loses_the_same_values_in_chunks_of_any_length(model, frames_per_chunk):
    found = levels(model, [0, 1, 2], frames_per_chunk=frames_per_chunk)
    assert largest_difference(found, levels(model, [0, 1, 2])) <= ROUNDING


def test_other_seeds_lose_other_values_and_evaluation_none(model):
    whole = levels(model, [0, 1, 2])
    assert largest_difference(levels(model, [0, 1, 2], seeds=SEEDS + 1), whole) > 0.1
    once, again = (levels(model.eval(), [0], seeds=seeds) for seeds in (SEEDS, SEEDS + 1))
    model.train()
    assert torch.equal(once, again)
    assert largest_difference(once, whole[:1]) > 0.1


def hidden_masks(*, clips=4, frames=5, tokens=50, width=1000, layer=0, place=Place.QUERIES):
    draws = Draws(torch.arange(clips), 0, layer)
    return draws.drop(torch.ones(clips, frames, tokens, width), RATE, place) == 0


def attention_masks(*, clips=50, frames=4, heads=5, queries=20, tokens=25, layer=0):
    plan = plan_merges(MemoryBank.empty(clips, tokens, 3), torch.randn(clips, frames, tokens, 3), M)
    draws = Draws(torch.arange(clips), 0, layer).of_attention(plan, heads, queries, RATE, Place.SELF_ATTENTION)
    return (draws.scale(frames - 1, M + 1) == 0).view(heads, clips, queries, (M + 1) * tokens)


@pytest.mark.parametrize("masks", [hidden_masks, attention_masks])
def test_the_share_that_is_dropped_is_the_rate(masks):
    dropped = masks()
    assert dropped.numel() >= 5e5
    assert dropped.double().mean().item() == pytest.approx(RATE, abs=2 * CHANCE)


@pytest.mark.parametrize("masks", [hidden_masks, attention_masks])
def test_draws_beside_each_other_along_every_axis_are_independent(masks):
    dropped = masks().double() - RATE
    for axis in range(dropped.ndim):
        both = (dropped * dropped.roll(1, axis)).mean().item() / (RATE * (1 - RATE))
        assert both == pytest.approx(0, abs=2 * CHANCE / (RATE * (1 - RATE))), axis


@pytest.mark.parametrize("masks", [hidden_masks, attention_masks])
def test_four_draws_at_the_corners_of_a_rectangle_are_independent(masks):
    """Rows and columns are combined by xor, so that the corners' numbers have the xor 0; the masks must not show it."""
    dropped = (masks().double() - RATE) / (RATE * (1 - RATE)) ** 0.5
    corners = dropped * dropped.roll(1, -1) * dropped.roll(1, -2) * dropped.roll((1, 1), (-1, -2))
    assert corners.mean().item() == pytest.approx(0, abs=12 * dropped.numel() ** -0.5)


def test_each_layer_and_place_draws_its_own():
    for one, other in (
        (hidden_masks(), hidden_masks(layer=1)),
        (hidden_masks(), hidden_masks(place=Place.WORDS)),
        (attention_masks(), attention_masks(layer=1)),
    ):
        both = (one & other).double().mean().item()
        assert both == pytest.approx(RATE**2, abs=2 * CHANCE)
