"""The alignment over many steps and in parts: the running mean, where gradients stop, the gate's drift, cut clips."""

import math

import numpy as np
import pytest
import torch
from tolerances import FLOAT32_GRADIENT, FLOAT32_LOSS, FLOAT32_MEAN, WRONG_BY

from model.alignment import SATURATED, Alignment, AlignmentReport
from model.config import AlignmentConfig

B, T, Q, H, D = 2, 5, 3, 4, 6
LEVELS = (3, 8, 13)


def build(**settings):
    config = AlignmentConfig(**{"levels": LEVELS, "gate_width": 4} | settings)
    return Alignment(config, hidden_width=H, target_width=D, num_levels=13)


def random_batch(batch=B, frames=T):
    return [torch.randn(batch, frames, Q, H) for _ in range(13)], torch.randn(batch, frames, D) + 1


def gradients(alignment, kd, *more):
    """Gradients by name, None where there is none; then those of `more`."""
    found = torch.autograd.grad(kd, [*alignment.parameters(), *more], allow_unused=True)
    names = [name for name, _ in alignment.named_parameters()]
    return dict(zip(names, found, strict=False)), found[len(names) :]


# --- the running mean


def test_the_running_mean_by_hand():
    alignment = Alignment(AlignmentConfig(levels=(13,)), hidden_width=H, target_width=2, num_levels=13)
    assert alignment.targets_seen.item() == 0
    alignment.observe(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]))
    assert alignment.target_mean.tolist() == [2, 4]
    alignment.observe(torch.tensor([[[8.0, 4.0]]]))  # weighs one of three, not one of two
    assert alignment.target_mean.tolist() == pytest.approx([4, 4])
    assert alignment.targets_seen.item() == 3


@pytest.mark.parametrize("sizes", [(60,), (1,) * 60, (7, 50, 3), (0, 59, 1)])
def test_the_running_mean_is_that_of_all_targets_however_they_came(sizes):
    targets = 3 + torch.randn(2, 60, D)
    alignment = build()
    for part in targets.split(sizes, dim=1):
        alignment.observe(part)
    expected = targets.double().numpy().reshape(-1, D).mean(axis=0)
    np.testing.assert_allclose(alignment.target_mean.numpy(), expected, rtol=3 * FLOAT32_MEAN)
    assert alignment.targets_seen.item() == 120


def test_the_running_mean_holds_after_ten_thousand_steps():
    alignment, rng = build(), torch.Generator().manual_seed(5)
    total = np.zeros(D)
    for _ in range(10_000):
        targets = 3 + torch.randn(1, 2, D, generator=rng)
        alignment.observe(targets)
        total += targets.double().numpy().sum(axis=(0, 1))
    np.testing.assert_allclose(alignment.target_mean.numpy(), total / 20_000, rtol=10 * FLOAT32_MEAN)


def test_the_running_mean_travels_with_the_state_and_only_observing_changes_it():
    alignment, other = build(target="centred"), build(target="centred")
    levels, targets = random_batch()
    alignment.observe(targets.bfloat16())
    assert alignment.target_mean.dtype == torch.float32
    before = {name: tensor.clone() for name, tensor in alignment.state_dict().items()}
    assert {"target_mean", "targets_seen"} <= before.keys()
    kd, _ = alignment(levels, targets)
    kd.backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in alignment.state_dict().items())
    other.load_state_dict(before)
    assert torch.equal(other(levels, targets)[0], kd)


@pytest.mark.parametrize("target", ["raw", "centred", "layer_norm"])
def test_target_to_mean_is_of_the_teachers_own_vectors_by_hand(target):
    """The mean is (3, 4); the cosines with (3, 4), (4, 3) and (-4, 3) are 1, 24/25 and 0."""
    config = AlignmentConfig(levels=(13,), target=target)
    alignment = Alignment(config, hidden_width=H, target_width=2, num_levels=13)
    levels, targets = random_batch(1, 3)[0], torch.tensor([[[3.0, 4.0], [4.0, 3.0], [-4.0, 3.0]]])
    if target != "centred":
        assert alignment(levels, targets)[1].target_to_mean.item() == 0
    alignment.observe(torch.tensor([[[3.0, 4.0]]]))
    assert alignment(levels, targets)[1].target_to_mean.item() == pytest.approx(1.96 / 3)


# --- where gradients stop


def test_a_gate_reading_detached_input_learns_but_tells_the_heads_nothing():
    levels, targets = random_batch()
    levels[7].requires_grad_()
    through, detached = build(), build(gate_gradient="input_detached")
    with torch.no_grad():
        for parameter in through.gates.parameters():
            parameter.mul_(3)  # a gate to which its input matters
    detached.load_state_dict(through.state_dict())
    kd, _ = detached(levels, targets)
    found, (of_level,) = gradients(detached, kd, levels[7])
    whole, (whole_of_level,) = gradients(through, through(levels, targets)[0], levels[7])

    by_hand = 0
    for head, level in zip(detached.heads, LEVELS, strict=True):
        for clip in range(B):
            for frame in range(T):
                projected, y = head(levels[level - 1][clip, frame].mean(0)), targets[clip, frame]
                weight = 1 / (1 + math.exp(-detached.gates[0](projected + y).item()))
                by_hand = by_hand - weight * (projected @ y) / projected.norm() / y.norm()
    expected, (expected_of_level,) = gradients(detached, by_hand / (B * T), levels[7])
    for name, gradient in found.items():
        if name.startswith("gates"):
            torch.testing.assert_close(gradient, whole[name], rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
            assert gradient.any()
        else:
            torch.testing.assert_close(gradient, expected[name], rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
            assert (gradient - whole[name]).norm() > WRONG_BY * FLOAT32_GRADIENT * gradient.norm()
    torch.testing.assert_close(of_level, expected_of_level, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    assert (of_level - whole_of_level).norm() > WRONG_BY * FLOAT32_GRADIENT * of_level.norm()


@pytest.mark.parametrize("weighting", ["adaptive", "softmax"])
def test_a_detached_weight_leaves_the_gate_untrained_and_the_heads_as_with_a_detached_input(weighting):
    levels, targets = random_batch()
    pair = [build(weighting=weighting, gate_gradient=stop) for stop in ("weight_detached", "input_detached")]
    pair[1].load_state_dict(pair[0].state_dict())
    (found, _), (other, _) = (gradients(alignment, alignment(levels, targets)[0]) for alignment in pair)
    for name, gradient in found.items():
        if name.startswith("gates"):
            assert gradient is None
            assert other[name] is not None
        else:
            assert torch.equal(gradient, other[name])


def test_constant_weights_need_no_gate():
    for weighting in ("average", "half", "one"):
        assert not len(build(weighting=weighting, shared_gate=False).gates)


# --- the known weakness: what a free gate does


def train(steps, **settings):
    """Cosines and weights [steps, U] of an alignment that is trained on one batch by itself."""
    torch.manual_seed(0)
    levels, targets = random_batch()
    alignment = build(**settings)
    optimizer = torch.optim.Adam(alignment.parameters(), lr=0.02)
    cosines, weights, saturated = [], [], []
    for _ in range(steps):
        kd, report = alignment(levels, targets)
        optimizer.zero_grad()
        kd.backward()
        optimizer.step()
        cosines.append(report.cosine)
        weights.append(report.weight)
        saturated.append(report.saturated.item())
    return torch.stack(cosines), torch.stack(weights), saturated


@pytest.mark.parametrize("gate_gradient", ["through", "input_detached"])
def test_with_the_negative_cosine_a_free_gate_saturates(gate_gradient):
    cosines, weights, saturated = train(300, gate_gradient=gate_gradient)
    assert weights[0].max() < 0.7
    assert weights[-1].min() > SATURATED
    assert saturated[0] == 0
    assert saturated[-1] == 1
    assert (cosines[-1] > cosines[0] + 0.3).all()


def test_with_one_minus_cosine_a_free_gate_switches_the_distillation_off():
    cosines, weights, _ = train(80, loss="one_minus_cosine")
    assert weights[0].min() > 0.5
    assert weights[-1].max() < 0.01
    steady, _, _ = train(80, loss="one_minus_cosine", weighting="half")
    assert (cosines[-1] < steady[-1] - 0.05).all(), "what has no weight is no longer learned"


def test_the_gates_gradient_has_the_sign_of_the_loss():
    """With one weight w for all, the last bias gets w (1 - w) times the sum of the losses: -cos < 0 < 1 - cos."""
    levels, targets = random_batch()
    for loss, sign in (("negative_cosine", -1), ("one_minus_cosine", 1)):
        alignment = build(loss=loss, levels=(8,))
        with torch.no_grad():
            alignment.gates[0][2].weight.zero_()
            alignment.gates[0][2].bias.fill_(1.0)
            alignment.heads[0][2].weight.zero_()
            alignment.heads[0][2].bias.fill_(1.0)  # near the targets, whose mean this is
        kd, report = alignment(levels, targets)
        weight, cosine = report.weight.item(), report.cosine.item()
        found, _ = gradients(alignment, kd)
        expected = weight * (1 - weight) * (-cosine if sign < 0 else 1 - cosine)
        assert found["gates.0.2.bias"].item() == pytest.approx(expected, rel=FLOAT32_GRADIENT)
        assert sign * expected > 0


def test_softmax_weights_cannot_all_grow_but_end_on_one_level_per_frame():
    _, weights, saturated = train(150, weighting="softmax")
    torch.testing.assert_close(weights.sum(dim=1), torch.full((150,), 3.0), rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS)
    assert saturated[0] == 0
    assert saturated[-1] == pytest.approx(1 / 3)


def test_a_softmax_is_saturated_where_one_level_has_taken_all():
    levels, targets = random_batch()
    alignment = build(weighting="softmax", shared_gate=False)
    with torch.no_grad():
        for gate in alignment.gates:
            gate[2].weight.zero_()
            gate[2].bias.zero_()
        assert alignment(levels, targets)[1].saturated.item() == 0  # all weights are 1
        alignment.gates[1][2].bias.fill_(20.0)
    report = alignment(levels, targets)[1]
    assert report.weight.tolist() == pytest.approx([0, 3, 0], abs=FLOAT32_LOSS)
    assert report.saturated.item() == pytest.approx(1 / 3)


# --- clips in parts


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("pooling", ["before", "loss"])
def test_parts_of_a_clip_add_up_to_the_whole(reduction, pooling):
    levels, targets = random_batch()
    alignment = build(frame_reduction=reduction, pooling=pooling, target="centred")
    alignment.observe(targets)
    kd, report = alignment(levels, targets)
    whole, _ = gradients(alignment, kd)
    parts, reports, counts, summed = 0.0, [], [], {}
    for frames in ([0, 1], [2], [3, 4]):
        part, part_report = alignment([level[:, frames] for level in levels], targets[:, frames])
        weighted = part * alignment.part_of(len(frames), T)
        found, _ = gradients(alignment, weighted)
        parts += weighted.item()
        summed = {name: gradient + summed.get(name, 0) for name, gradient in found.items()}
        reports.append(part_report)
        counts.append(len(frames))
    assert parts == pytest.approx(kd.item(), rel=FLOAT32_LOSS)
    for name, gradient in whole.items():
        torch.testing.assert_close(summed[name], gradient, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)
    combined = AlignmentReport.mean(reports, counts)
    assert combined.levels == report.levels
    for name in ("cosine", "weight", "saturated", "target_to_mean"):
        torch.testing.assert_close(getattr(combined, name), getattr(report, name), rtol=1e-5, atol=FLOAT32_LOSS)


def test_what_a_part_counts_for_by_hand():
    assert build(frame_reduction="mean").part_of(25, 100) == 0.25
    assert build(frame_reduction="sum").part_of(25, 100) == 1.0


def test_reports_of_parts_are_weighted_by_their_frames():
    """One frame of 0.2 and three of 0.6 are 0.5 on average."""
    parts = [AlignmentReport((8,), *(torch.tensor([x]) for x in values)) for values in ((0.2,) * 4, (0.6,) * 4)]
    assert AlignmentReport.mean(parts, [1, 3]).cosine.item() == pytest.approx(0.5)
    assert AlignmentReport.mean(parts, [1, 3]).target_to_mean.item() == pytest.approx(0.5)
