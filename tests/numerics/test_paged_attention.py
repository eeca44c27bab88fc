"""Attention over pages: its written-out gradients, dropout included, against slopes and against autograd."""

import pytest
import torch
from tolerances import (
    BFLOAT16_SCALE,
    FLOAT32_GRADIENT,
    FLOAT32_HIDDEN,
    SLOPE,
    largest_difference,
    relative_difference,
)

from model.qformer.dropout import Draws, Place
from model.qformer.memory import MemoryBank, append, plan_merges
from model.qformer.paged_attention import PagedAttention, Remembered, project

BATCH, HEADS, QUERIES, TOKENS, WIDTH, HIDDEN, M = 2, 2, 3, 4, 5, 6, 3
VALID = torch.tensor([[True, True, True, True], [True, True, False, False]])


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(frames):
    """Query, inputs, weight and bias of one layer over a run."""
    return (
        draw(BATCH, frames, QUERIES, HIDDEN, seed=1),
        draw(BATCH, frames, TOKENS, WIDTH, seed=2),
        draw(2 * HIDDEN, WIDTH, seed=3),
        draw(2 * HIDDEN, seed=4),
    )


def bank_of(slots):
    bank = MemoryBank.empty(BATCH, TOKENS, WIDTH)
    for frame in draw(BATCH, slots, TOKENS, WIDTH, seed=5).unbind(1):
        bank = append(bank, frame, M)
    return bank


def by_pages(bank, tensors, *, valid=None, dropout=0.0, positions=None):
    query, inputs, weight, bias = tensors
    plan = plan_merges(bank, inputs, M)
    draws = Draws(torch.arange(BATCH), bank.num_slots).of_attention(plan, HEADS, QUERIES, dropout, Place.SELF_ATTENTION)
    layer = PagedAttention(plan, HEADS, valid, draws)
    with torch.no_grad():
        remembered = Remembered(bank.slots, project(bank.slots, weight, bias, HEADS))
    return layer(query, inputs, weight, bias, remembered, positions)


def by_appending(bank, tensors, valid=None):
    """The plain form: every slot is projected anew at every frame; autograd does the rest."""
    query, inputs, weight, bias = tensors
    contexts = []
    for frame in range(inputs.shape[1]):
        seen = torch.cat([bank.slots, inputs[:, frame : frame + 1]], dim=1).flatten(1, 2)
        keys, values = torch.nn.functional.linear(seen, weight, bias).chunk(2, dim=-1)
        mask = None if valid is None else valid.repeat(1, bank.num_slots + 1)[:, None, None]
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query[:, frame], keys, values)]
        context = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
        contexts.append(context.transpose(1, 2).flatten(2))
        bank = append(bank, inputs[:, frame], M)
    return torch.stack(contexts, dim=1)


def gradients(context, tensors):
    return torch.autograd.grad((context * draw(*context.shape, seed=6)).sum(), tensors)


@pytest.mark.parametrize("valid", [None, VALID], ids=["all tokens", "padded"])
@pytest.mark.parametrize("carried", range(M + 1))
@pytest.mark.parametrize("frames", [1, 2, M + 1, 3 * M])
def test_pages_equal_appending_and_projecting_anew_forward_and_backward(frames, carried, valid):
    tensors = [tensor.requires_grad_() for tensor in problem(frames)]
    bank = bank_of(carried)
    actual, _ = by_pages(bank, tensors, valid=valid)
    expected = by_appending(bank, tensors, valid)
    assert largest_difference(actual, expected) <= FLOAT32_HIDDEN
    for mine, theirs in zip(gradients(actual, tensors), gradients(expected, tensors), strict=True):
        assert relative_difference(mine, theirs) <= FLOAT32_GRADIENT


def test_the_pages_after_a_run_are_the_projected_bank():
    bank, tensors = bank_of(2), problem(3 * M)
    _, after = by_pages(bank, tensors)
    for frame in tensors[1].unbind(1):
        bank = append(bank, frame, M)
    assert largest_difference(after, project(bank.slots, *tensors[2:], HEADS)) <= FLOAT32_HIDDEN


def test_the_gradient_of_positions_is_that_of_the_inputs_summed_over_clips_and_tokens():
    query, features, weight, bias = problem(2 * M)
    positions = draw(2 * M, WIDTH, seed=7).requires_grad_()
    inputs = features + positions[:, None]
    expected = gradients(by_appending(bank_of(1), (query, inputs, weight, bias)), (positions,))[0]
    context, _ = by_pages(bank_of(1), (query, inputs.detach(), weight, bias), positions=positions)
    assert relative_difference(gradients(context, (positions,))[0], expected) <= FLOAT32_GRADIENT


@pytest.mark.parametrize("which", ["query", "weight", "bias"])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(which):
    """The slope of a loss along a random direction, against its finite difference."""
    tensors = problem(3 * M)
    place = ["query", None, "weight", "bias"].index(which)
    bank = bank_of(0)

    def loss(shift):
        moved = list(tensors)
        moved[place] = moved[place] + shift
        context, _ = by_pages(bank, moved, valid=VALID, dropout=0.4)
        return (context * draw(*context.shape, seed=6)).sum()

    direction = draw(*tensors[place].shape, seed=8)
    at = torch.zeros((), requires_grad=True)
    slope = torch.autograd.grad(loss(at * direction), at)[0]
    step = 1e-3
    measured = (loss(step * direction) - loss(-step * direction)) / (2 * step)
    assert (measured - slope).abs() <= SLOPE * max(1.0, slope.abs())
    dropped_otherwise = by_pages(bank, tensors, valid=VALID)[0]
    assert largest_difference(by_pages(bank, tensors, valid=VALID, dropout=0.4)[0], dropped_otherwise) > SLOPE


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_in_bfloat16_dropout_scales_what_it_keeps_by_the_exact_factor(rate):
    """Values that are unit vectors show every weight by itself: with dropout over without it, where it was kept."""
    tokens = HEADS * 32
    width = tokens // HEADS
    plan = plan_merges(MemoryBank.empty(64, width, width), draw(64, 1, width, width, seed=1), M)
    query, keys = draw(64, 1, width, tokens, seed=2), draw(64, 1, width, width, seed=3)
    seen = torch.cat([keys, torch.eye(width).expand(64, 1, -1, -1)], dim=-1)  # each token's key and its unit vector
    select = torch.eye(2 * width)
    weight = torch.cat([select[:width].repeat(HEADS, 1), select[width:].repeat(HEADS, 1)])

    def weights(dropout):
        draws = Draws(torch.arange(64), 0).of_attention(plan, HEADS, width, dropout, Place.SELF_ATTENTION)
        layer = PagedAttention(plan, HEADS, None, draws)
        none = Remembered(seen.new_empty(64, 0, width, 2 * width), seen.new_empty(2 * HEADS, 64, 0, width, width))
        return layer(query.bfloat16(), seen, weight, torch.zeros(2 * tokens), none)[0].double()

    whole, dropped = weights(0.0), weights(rate)
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(1 - rate, abs=0.01)
    factor = (dropped[kept] / whole[kept]).mean().item()
    assert factor == pytest.approx(1 / (1 - rate), rel=BFLOAT16_SCALE)
    rounded = (torch.ones(1, dtype=torch.bfloat16) / (1 - rate)).item()
    assert abs(rounded - factor) > 3 * BFLOAT16_SCALE * factor
