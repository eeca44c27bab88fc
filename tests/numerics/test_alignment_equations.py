"""Equations 4 to 7 and 9 of the paper against numbers worked out by hand, and the module with the paper's settings."""

import math

import pytest
import torch
from alignment_by_hand import by_hand
from tiny_language import KD_WEIGHT, TARGET_WIDTH, build_model
from tiny_qformer import random_features, random_text
from tolerances import FLOAT32_LOSS

from model.alignment import (
    Alignment,
    adaptive_weight,
    alignment_loss,
    competing_weights,
    distillation_loss,
    gate_score,
    mean_over_tokens,
    prepared_target,
    total_loss,
)
from model.config import AlignmentConfig
from model.diff_lmm import Clips
from model.language import AnswerTokens

B, T, U, Q, H, D = 2, 3, 4, 5, 6, 7
LEVELS = (2, 5, 6, 9)
# Losses and weights of two clips, two frames, one token and two levels, for Eq. 7. Products by frame, summed over the
# levels: 0 and -0.5 in the first clip, -0.25 and 0.25 in the second.
LOSSES = torch.tensor([[[[-1, 0.5]], [[0, -0.5]]], [[[-0.25, -0.75]], [[1, 0]]]])
WEIGHTS = torch.tensor([[[[0.5, 1]], [[1, 1]]], [[[1, 0]], [[0.25, 0.5]]]])


def close(expected):
    return pytest.approx(expected, rel=FLOAT32_LOSS, abs=FLOAT32_LOSS)


def linear_gate(weights, bias):
    gate = torch.nn.Linear(len(weights), 1)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([weights]))
        gate.bias.fill_(bias)
    return gate


def build(**settings):
    config = AlignmentConfig(levels=LEVELS, gate_width=5, **settings)
    return Alignment(config, hidden_width=H, target_width=D, num_levels=13)


@pytest.fixture
def levels():
    return [torch.randn(B, T, Q, H) for _ in range(13)]


@pytest.fixture
def targets():
    return torch.randn(B, T, D)


# --- Eq. 4 and 5


def test_equation_4_is_the_negative_cosine_of_projection_and_target():
    """(3, 4) and (4, 3) have length 5 and product 24."""
    projected, target = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert alignment_loss(projected, target, "negative_cosine").item() == close(-0.96)
    assert alignment_loss(projected, target, "one_minus_cosine").item() == close(0.04)
    assert alignment_loss(100 * projected, 0.1 * target, "negative_cosine").item() == close(-0.96)
    assert alignment_loss(projected, -projected, "negative_cosine").item() == close(1)
    assert alignment_loss(projected, -projected, "one_minus_cosine").item() == close(2)


def test_equation_5_takes_each_level_on_its_own():
    levels = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]])
    losses = alignment_loss(levels, torch.tensor([4.0, 3.0]).expand(3, 2), "negative_cosine")
    assert losses.tolist() == close([-0.96, -0.8, 0.6])


def test_equation_5_is_computed_in_float32_whatever_comes_in():
    projected, target = torch.randn(B, D), torch.randn(B, D)
    coarse = alignment_loss(projected.bfloat16(), target.bfloat16(), "negative_cosine")
    assert coarse.dtype == torch.float32
    exact = alignment_loss(projected.bfloat16().float(), target.bfloat16().float(), "negative_cosine")
    assert torch.equal(coarse, exact)


@pytest.mark.parametrize("target", ["raw", "centred", "layer_norm"])
def test_under_autocast_everything_but_the_networks_stays_float32(levels, targets, target):
    """Heads pass on what they get, so that nothing is left that may be rounded."""
    config = AlignmentConfig(levels=LEVELS, weighting="average", tokens="all", target=target)
    alignment = Alignment(config, hidden_width=D, target_width=D, num_levels=13)
    alignment.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in LEVELS)
    alignment.observe(targets[:, :1])
    levels = [torch.randn(B, T, Q, D) for _ in range(13)]
    valid = torch.arange(Q) < torch.tensor([[4], [5]])
    plain, _ = alignment(levels, targets, valid)
    with torch.autocast("cpu", torch.bfloat16):
        kd, report = alignment(levels, targets, valid)
    assert kd.dtype == report.cosine.dtype == report.target_to_mean.dtype == torch.float32
    assert torch.equal(kd, plain)


def test_targets_are_centred_or_normed_by_hand():
    mean = torch.tensor([1.0, 1.0])
    assert prepared_target(torch.tensor([3.0, 5.0]), mean, "raw").tolist() == [3, 5]
    assert prepared_target(torch.tensor([3.0, 5.0]), mean, "centred").tolist() == [2, 4]
    assert prepared_target(torch.tensor([3.0, 5.0]), mean, "layer_norm").tolist() == close([-1, 1])


def test_the_mean_over_tokens_is_over_those_that_are_valid():
    values = torch.tensor([[1.0, 2], [3, 6], [100, 100]]).expand(1, 1, 3, 2)
    assert mean_over_tokens(values, torch.tensor([[True, True, False]])).tolist() == [[[2, 4]]]
    assert mean_over_tokens(values[:, :, :2], None).tolist() == [[[2, 4]]]


# --- Eq. 6


def test_equation_6_is_the_sigmoid_of_the_gate_on_the_sum():
    """The gate reads (1, 2) + (3, -1) = (4, 1) and says 2 * 4 - 1 - 7 + ln 3 = ln 3; the sigmoid of ln 3 is 3/4."""
    gate = linear_gate([2.0, -1.0], math.log(3) - 7)
    weight = adaptive_weight(gate, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), "sum")
    assert weight.tolist() == close([0.75])


def test_equation_6_with_projection_and_target_side_by_side():
    """1 + 2 * 2 + 3 * 3 + 4 * -1 = 10; the sigmoid of -ln 3 is 1/4."""
    gate = linear_gate([1.0, 2.0, 3.0, 4.0], -10 - math.log(3))
    weight = adaptive_weight(gate, torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]]), "concat")
    assert weight.tolist() == close([0.25])


def test_equation_6_on_the_sum_of_both_at_length_one():
    """(0.6, 0.8) + (0, -1) = (0.6, -0.2); times (5, 5) that is 2; the sigmoid of ln 4 is 4/5."""
    gate = linear_gate([5.0, 5.0], math.log(4) - 2)
    projected, target = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, -2.0]])
    assert adaptive_weight(gate, projected, target, "normalised_sum").tolist() == close([0.8])
    assert abs(gate_score(gate, projected, target, "sum").item() - math.log(4)) > 1


def test_competing_weights_are_u_times_the_softmax():
    """e to the scores is 1, 2 and 5: shares of 1/8, 2/8 and 5/8, times three levels."""
    weights = competing_weights(torch.tensor([0.0, math.log(2), math.log(5)]))
    assert weights.tolist() == close([0.375, 0.75, 1.875])


# --- Eq. 7 and 9


@pytest.mark.parametrize(
    ("levels", "frames", "expected"),
    [
        ("sum", "mean", -0.125),  # clips: -0.25 and 0
        ("sum", "sum", -0.25),  # clips: -0.5 and 0
        ("mean", "mean", -0.0625),
        ("mean", "sum", -0.125),
    ],
)
def test_equation_7_sums_over_levels_and_averages_over_clips(levels, frames, expected):
    loss = distillation_loss(LOSSES, WEIGHTS, level_reduction=levels, frame_reduction=frames)
    assert loss.item() == close(expected)


def test_equation_7_by_token_averages_the_products_of_valid_tokens():
    """-1 * 0.5 and -0.5 * 1; the third token is padding. The product of both means would be -0.5625."""
    losses = torch.tensor([-1.0, -0.5, 9.0]).reshape(1, 1, 3, 1)
    weights = torch.tensor([0.5, 1.0, 1.0]).reshape(1, 1, 3, 1)
    valid = torch.tensor([[True, True, False]])
    loss = distillation_loss(losses, weights, valid, level_reduction="sum", frame_reduction="mean")
    assert loss.item() == close(-0.5)


def test_equation_9_adds_the_distillation_times_lambda():
    assert total_loss(torch.tensor(1.25), torch.tensor(-4.0), 5e-4).item() == close(1.248)


# --- the module


def test_the_module_as_it_comes_is_the_paper_as_written(levels, targets):
    """The loops are told no switch at all but these: whoever changes a default has to change this test."""
    alignment = build()
    with torch.no_grad():
        alignment.gates[0][2].weight.mul_(30)  # spread the weights, so that some are saturated
        alignment.gates[0][2].bias.fill_(2.0)
    paper = AlignmentConfig(
        levels=LEVELS,
        pooling="before",
        head="mlp",
        shared_head=False,
        weighting="adaptive",
        gate_input="sum",
        shared_gate=True,
        loss="negative_cosine",
        level_reduction="sum",
        frame_reduction="mean",
        target="raw",
    )
    kd, report = alignment(levels, targets)
    parameters = {name: parameter.detach().double().numpy() for name, parameter in alignment.named_parameters()}
    expected = by_hand(paper, parameters, [level.double().numpy() for level in levels], targets.double().numpy())
    assert kd.item() == close(expected.kd)
    assert report.cosine.tolist() == close(expected.cosine.tolist())
    assert report.weight.tolist() == close(expected.weight.tolist())
    assert 0 < expected.saturated < 1
    assert report.saturated.item() == close(expected.saturated)
    assert report.levels == LEVELS


def test_level_u_is_entry_u_minus_1_of_the_hidden_states():
    """Level u is all e_u, the u-th unit vector; heads pass it on; then L_i = -y_u / |y| names the level."""
    levels = [torch.eye(13)[index].expand(1, 1, Q, 13) for index in range(13)]
    y = torch.arange(1.0, 14.0)
    for asked in [(1,), (13,), (1, 4, 13), (8, 9, 10, 11, 12, 13)]:
        config = AlignmentConfig(levels=asked, weighting="one")
        alignment = Alignment(config, hidden_width=13, target_width=13, num_levels=13)
        alignment.heads = torch.nn.ModuleList(torch.nn.Identity() for _ in asked)
        kd, report = alignment(levels, y[None, None])
        expected = [u / math.sqrt(819) for u in asked]  # 1 + 4 + ... + 169 = 819
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
    measured = (report.cosine, report.weight, report.saturated, report.target_to_mean)
    assert not any(part.requires_grad for part in measured)


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
