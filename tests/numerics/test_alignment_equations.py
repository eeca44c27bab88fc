"""Equations 4 to 7 and 9 of the paper against plain arithmetic, one test each, and what surrounds them."""

import math

import numpy as np
import pytest
import torch
from tiny_language import KD_WEIGHT, TARGET_WIDTH, build_model
from tiny_qformer import random_features, random_text
from tolerances import FLOAT32_LOSS

from model.alignment import (
    SATURATED,
    Alignment,
    adaptive_weight,
    alignment_loss,
    distillation_loss,
    total_loss,
)
from model.config import AlignmentConfig
from model.diff_lmm import Clips
from model.language import AnswerTokens

B, T, U, Q, H, D = 2, 3, 4, 5, 6, 7
LEVELS = (2, 5, 6, 9)


def close(expected):
    return pytest.approx(expected, rel=FLOAT32_LOSS, abs=FLOAT32_LOSS)


def cosine(left, right):
    dot = sum(float(a) * float(b) for a, b in zip(left, right, strict=True))
    return dot / math.sqrt(sum(float(a) ** 2 for a in left)) / math.sqrt(sum(float(b) ** 2 for b in right))


@torch.no_grad()
def mlp(layers, vector):
    """Linear, GELU, linear, one output at a time."""
    first, _, second = layers
    hidden = [
        sum(float(w) * v for w, v in zip(row, vector, strict=True)) + float(b)
        for row, b in zip(first.weight, first.bias, strict=True)
    ]
    hidden = [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in hidden]
    return [
        sum(float(w) * v for w, v in zip(row, hidden, strict=True)) + float(b)
        for row, b in zip(second.weight, second.bias, strict=True)
    ]


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def build(**settings):
    config = AlignmentConfig(levels=LEVELS, gate_width=5, **settings)
    return Alignment(config, hidden_width=H, target_width=D, num_levels=13)


@pytest.fixture
def levels():
    return [torch.randn(B, T, Q, H) for _ in range(13)]


@pytest.fixture
def targets():
    return torch.randn(B, T, D)


def by_hand(alignment, levels, targets):
    """Losses and weights [B, T, U] of every clip, frame and level, computed one number at a time."""
    losses, weights = np.zeros((B, T, U)), np.zeros((B, T, U))
    for clip in range(B):
        for frame in range(T):
            target = targets[clip, frame].tolist()
            for number, level in enumerate(LEVELS):
                tokens = levels[level - 1][clip, frame].tolist()
                pooled = [sum(column) / Q for column in zip(*tokens, strict=True)]
                projected = mlp(alignment.heads[number], pooled)
                losses[clip, frame, number] = -cosine(projected, target)
                told = [p + y for p, y in zip(projected, target, strict=True)]
                weights[clip, frame, number] = sigmoid(mlp(alignment.gate, told)[0])
    return losses, weights


def test_equation_4_is_the_negative_cosine_of_projection_and_target():
    projected, target = torch.randn(D), torch.randn(D)
    assert alignment_loss(projected, target).item() == close(-cosine(projected, target))
    assert alignment_loss(3 * projected, 2 * projected).item() == close(-1)
    assert alignment_loss(projected, -projected).item() == close(1)


def test_equation_5_takes_each_level_on_its_own():
    projected, targets = torch.randn(B, T, U, D), torch.randn(B, T, U, D)
    losses = alignment_loss(projected, targets)
    assert losses.shape == (B, T, U)
    for index in np.ndindex(B, T, U):
        assert losses[index].item() == close(-cosine(projected[index], targets[index]))


def test_equation_5_is_computed_in_float32_whatever_comes_in():
    projected, target = torch.randn(B, D), torch.randn(B, D)
    coarse = alignment_loss(projected.bfloat16(), target.bfloat16())
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, alignment_loss(projected.bfloat16().float(), target.bfloat16().float()))


def test_equation_6_is_the_sigmoid_of_the_gate_on_the_sum():
    gate = build().gate
    projected, target = torch.randn(B, D), torch.randn(B, D)
    weights = adaptive_weight(gate, projected, target)
    assert weights.shape == (B,)
    for clip in range(B):
        told = (projected[clip] + target[clip]).tolist()
        assert weights[clip].item() == close(sigmoid(mlp(gate, told)[0]))


def test_equation_7_sums_over_levels_and_averages_over_clips_and_frames():
    losses, weights = torch.randn(B, T, U), torch.rand(B, T, U)
    expected = sum(
        losses[clip, frame, level].item() * weights[clip, frame, level].item()
        for clip in range(B)
        for frame in range(T)
        for level in range(U)
    ) / (B * T)
    assert distillation_loss(losses, weights).item() == close(expected)


def test_equation_9_adds_the_distillation_times_lambda():
    assert total_loss(torch.tensor(1.25), torch.tensor(-4.0), 5e-4).item() == close(1.25 - 4.0 * 5e-4)


def test_the_module_gives_what_the_equations_give(levels, targets):
    alignment = build()
    with torch.no_grad():
        alignment.gate[2].weight.mul_(30)  # spread the weights, so that some are saturated
        alignment.gate[2].bias.fill_(2.0)
    kd, report = alignment(levels, targets)
    losses, weights = by_hand(alignment, levels, targets)
    assert kd.item() == close((losses * weights).sum(-1).mean())
    np.testing.assert_allclose(report.cosine, -losses.mean((0, 1)), atol=FLOAT32_LOSS)
    np.testing.assert_allclose(report.weight, weights.mean((0, 1)), atol=FLOAT32_LOSS)
    assert 0 < (weights > SATURATED).mean() < 1
    assert report.saturated.item() == close((weights > SATURATED).mean())
    assert report.levels == LEVELS


@pytest.mark.parametrize(("weighting", "weight"), [("average", 1 / U), ("half", 0.5), ("one", 1.0)])
def test_constant_weights_weigh_every_level_alike(levels, targets, weighting, weight):
    alignment = build()
    losses, _ = by_hand(alignment, levels, targets)
    constant = build(weighting=weighting)
    constant.heads.load_state_dict(alignment.heads.state_dict())
    kd, report = constant(levels, targets)
    assert kd.item() == close(weight * losses.sum(-1).mean())
    assert report.weight.tolist() == close([weight] * U)
    assert report.saturated.item() == (1.0 if weight == 1 else 0.0)
    assert constant.gate is None


def test_level_u_is_entry_u_minus_1_of_the_hidden_states():
    """Level u is all e_u, the u-th unit vector; heads pass it on; then L_i = -y_u / |y| names the level."""
    levels = [torch.eye(13)[index].expand(1, 1, Q, 13) for index in range(13)]
    y = torch.arange(1.0, 14.0)
    for asked in [(1,), (13,), (1, 4, 13), (8, 9, 10, 11, 12, 13)]:
        config = AlignmentConfig(levels=asked, weighting="one")
        alignment = Alignment(config, hidden_width=13, target_width=13, num_levels=13)
        alignment.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in asked)
        kd, report = alignment(levels, y[None, None])
        expected = [u / y.norm().item() for u in asked]
        assert report.cosine.tolist() == close(expected)
        assert kd.item() == close(-sum(expected))


def test_gradient_reaches_heads_gate_and_aligned_levels_only(levels, targets):
    alignment = build()
    levels = [level.requires_grad_() for level in levels]
    targets.requires_grad_()
    kd, report = alignment(levels, targets)
    kd.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in alignment.parameters())
    assert [number for number, level in enumerate(levels, start=1) if level.grad is not None] == list(LEVELS)
    assert targets.grad is None
    assert not any(part.requires_grad for part in (report.cosine, report.weight, report.saturated))


def test_a_level_the_qformer_lacks_is_refused():
    with pytest.raises(ValueError, match=r"levels 1\.\.\.8"):
        Alignment(AlignmentConfig(levels=(9,)), hidden_width=H, target_width=D, num_levels=8)


def clips(num_frames):
    ids = torch.tensor([[2, 9, 8, 7, 3], [2, 11, 12, 3, 3]])
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    answer = torch.tensor([[False, False, False, True, True], [False, False, True, True, False]])
    return Clips(
        features=random_features(2, num_frames),
        targets=torch.randn(2, num_frames, TARGET_WIDTH),
        question=random_text(5, 2),
        answer=AnswerTokens(ids, mask, answer),
    )


@pytest.mark.parametrize("kd_frames", [None, [1], [0, 2], [3, 1]])
def test_the_models_losses_are_those_of_its_parts(kd_frames):
    model = build_model().eval()
    batch = clips(4)
    losses = model(batch, kd_frames=kd_frames)
    levels = model.qformer(batch.features, batch.question).levels
    answer = model.language.answer_loss(model.language_projection(levels[-1][:, -1]), batch.answer)
    frames = [0, 1, 2, 3] if kd_frames is None else kd_frames
    kd, _ = model.alignment([level[:, frames] for level in levels], batch.targets[:, frames])
    assert losses.answer.item() == close(answer.item())
    assert losses.kd.item() == close(kd.item())
    assert losses.total.item() == close(answer.item() + KD_WEIGHT * kd.item())
