"""Every switch of the alignment, alone and in combination, against loops in float64: values and gradients."""

import random
from typing import Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from alignment_by_hand import WRONG, by_hand
from tolerances import FLOAT32_GRADIENT, FLOAT32_LOSS, WRONG_BY

from model.alignment import Alignment
from model.config import AlignmentConfig

B, T, N, H, D = 2, 2, 3, 4, 5
LEVELS = (3, 8, 13)
NUM_LEVELS = 13


def alternatives():
    """(switch, value) for every value of a switch that is not its default, read from the configuration itself."""
    found = []
    for name, field in AlignmentConfig.model_fields.items():
        values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        values = (False, True) if field.annotation is bool else values
        found += [(name, value) for value in values if value != field.default]
    return found


def combinations(count):
    """Settings with every switch drawn at random, the same at every run; always a gate, and REPA's wide head alone."""
    draw = random.Random(0)
    names = dict.fromkeys(name for name, _ in alternatives())
    for _ in range(count):
        chosen = {}
        for name in names:
            values = [AlignmentConfig.model_fields[name].default, *(v for key, v in alternatives() if key == name)]
            chosen[name] = draw.choice([value for value in values if value not in ("repa", "average", "half", "one")])
        yield chosen


SINGLE = [{name: value} for name, value in alternatives()]
COMBINED = list(combinations(24))


def settings_id(settings):
    return "-".join(map(str, settings.values())) or "default"


def build(**settings):
    config = AlignmentConfig(**{"levels": LEVELS, "gate_width": 4} | settings)
    alignment = Alignment(config, hidden_width=H, target_width=D, num_levels=NUM_LEVELS)
    with torch.no_grad():
        for parameter in alignment.gates.parameters():
            parameter.mul_(3)  # so that weights differ from token to token, and some are saturated
    return alignment


def arrays(module):
    return {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}


@pytest.fixture
def batch():
    """Levels, targets that have a common part, and a mask in which the clips differ."""
    levels = [torch.randn(B, T, N, H) for _ in range(NUM_LEVELS)]
    targets = torch.randn(B, T, D) + torch.linspace(0, 2, D)
    return levels, targets, torch.tensor([[True, True, False], [True, True, True]])


def plain(alignment, batch, parameters=None, levels=None, **extra):
    own, targets, valid = batch
    levels = [level.double().numpy() for level in own] if levels is None else levels
    mean = alignment.target_mean.double().numpy()
    parameters = arrays(alignment) if parameters is None else parameters
    return by_hand(alignment.config, parameters, levels, targets.double().numpy(), valid.numpy(), mean, **extra)


def slope(loss, value, direction, step=1e-5):
    """Change of the plain loss along a direction."""
    return (loss(value + step * direction) - loss(value - step * direction)) / (2 * step)


@pytest.mark.parametrize("settings", [{}, *SINGLE, *COMBINED], ids=settings_id)
def test_value_report_and_gradients_are_those_of_the_loops(batch, settings):
    levels, targets, valid = batch
    alignment = build(**settings, **({"levels": (8,)} if settings.get("head") == "repa" else {}))
    alignment.observe(torch.randn(B, T, D) + 1)
    asked = [level.clone().requires_grad_() for level in levels]
    kd, report = alignment(asked, targets, valid)
    kd.backward()
    base = plain(alignment, batch)
    np.testing.assert_allclose(kd.item(), base.kd, rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS)
    for name in ("cosine", "weight", "saturated"):
        np.testing.assert_allclose(getattr(report, name).numpy(), getattr(base, name), atol=FLOAT32_LOSS, err_msg=name)

    rng, parameters = np.random.default_rng(1), arrays(alignment)
    gradients = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.double().numpy()
        for name, p in alignment.named_parameters()
    }
    for name, gradient in gradients.items():
        direction = rng.standard_normal(gradient.shape)
        changed = slope(
            lambda value, name=name: plain(alignment, batch, parameters | {name: value}, frozen=base).kd,
            parameters[name],
            direction,
        )
        # A bias may have next to no gradient, as the last one under softmax; the network's largest is the measure.
        network = name.partition(".")[0]
        scale = max(np.linalg.norm(other) for key, other in gradients.items() if key.startswith(network))
        assert abs(changed - (gradient * direction).sum()) <= FLOAT32_GRADIENT * scale, name
    inputs = [level.double().numpy() for level in levels]
    for level in alignment.config.levels:
        direction, gradient = rng.standard_normal((B, T, N, H)), asked[level - 1].grad.double().numpy()
        changed = slope(
            lambda value, level=level: (
                plain(alignment, batch, levels=[*inputs[: level - 1], value, *inputs[level:]], frozen=base).kd
            ),
            inputs[level - 1],
            direction,
        )
        assert abs(changed - (gradient * direction).sum()) <= FLOAT32_GRADIENT * np.linalg.norm(gradient), level


@pytest.mark.parametrize("settings", [one for one in SINGLE if "tokens" not in one], ids=settings_id)
def test_every_alternative_changes_what_is_computed(batch, settings):
    """Where a gradient stops changes the gradient and nothing else; `tokens` is the caller's, who slices."""
    ours, theirs = build(), build(**settings)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    theirs.load_state_dict(
        {
            name: ours.state_dict()[name] if shapes.get(name) == tensor.shape else tensor
            for name, tensor in theirs.state_dict().items()
        }
    )
    if "shared_gate" in settings:
        assert not torch.equal(theirs.gates[0][0].weight, theirs.gates[1][0].weight)
    for module in (ours, theirs):
        module.observe(batch[1])
    losses = [module(*batch)[0] for module in (ours, theirs)]
    if "gate_gradient" in settings:
        assert losses[0].item() == losses[1].item()
        heads = [
            torch.autograd.grad(loss, module.heads[0][0].weight)[0]
            for loss, module in zip(losses, (ours, theirs), strict=True)
        ]
        assert (heads[0] - heads[1]).norm() > WRONG_BY * FLOAT32_GRADIENT * heads[0].norm()
    else:
        assert abs(losses[0].item() - losses[1].item()) > WRONG_BY * FLOAT32_LOSS * abs(losses[0].item())


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_variants_are_told_apart(batch, wrong):
    alignment = build(pooling="loss", weighting="softmax")
    kd = alignment(*batch)[0].item()
    assert abs(kd - plain(alignment, batch).kd) < FLOAT32_LOSS * abs(kd)
    assert abs(kd - plain(alignment, batch, wrong=wrong).kd) > WRONG_BY * FLOAT32_LOSS * abs(kd)


# --- pooling and padding


def test_pooling_before_and_after_a_linear_head_is_the_same_and_a_deeper_head_tells_them_apart(batch):
    for head, same in (("linear", True), ("mlp", False), ("repa", False)):
        before, after = build(head=head), build(head=head, pooling="after")
        after.load_state_dict(before.state_dict())
        pair = [before(*batch)[0].item(), after(*batch)[0].item()]
        difference = abs(pair[0] - pair[1]) / abs(pair[0])
        assert difference < FLOAT32_LOSS if same else difference > WRONG_BY * FLOAT32_LOSS, (head, pair)


def test_pooling_in_the_loss_is_the_mean_of_the_losses_of_single_tokens(batch):
    levels, targets, _ = batch
    alignment = build(pooling="loss")
    singles = [alignment([level[:, :, token : token + 1] for level in levels], targets) for token in range(N)]
    kd, report = alignment(levels, targets)
    assert kd.item() == pytest.approx(sum(single.item() for single, _ in singles) / N, rel=FLOAT32_LOSS)
    for name in ("cosine", "weight", "saturated"):
        mean = sum(getattr(single, name) for _, single in singles) / N
        torch.testing.assert_close(getattr(report, name), mean, rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS)


@pytest.mark.parametrize("filling", [1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("pooling", ["before", "after", "loss"])
def test_padding_reaches_neither_value_nor_gradient(batch, pooling, filling):
    levels, targets, valid = batch
    alignment = build(tokens="all", pooling=pooling)

    def run(levels):
        alignment.zero_grad()
        levels = [level.clone().requires_grad_() for level in levels]
        kd, report = alignment(levels, targets, valid)
        kd.backward()
        gradients = {name: parameter.grad.clone() for name, parameter in alignment.named_parameters()}
        return kd, report, gradients, [levels[level - 1].grad for level in LEVELS]

    padding = ~valid[:, None, :, None]
    kd, report, gradients, of_levels = run(levels)
    other_kd, other_report, other_gradients, others_of_levels = run(
        [level.masked_fill(padding, filling) for level in levels]
    )
    assert torch.equal(kd, other_kd)
    assert torch.equal(report.cosine, other_report.cosine)
    assert torch.equal(report.weight, other_report.weight)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
    for mine, other in zip(of_levels, others_of_levels, strict=True):
        assert torch.equal(mine, other)
        assert not mine.masked_select(padding).any()
        assert mine.masked_fill(padding, 1).all(), "every real token has a gradient"


@pytest.mark.parametrize("pooling", ["before", "after", "loss"])
def test_a_clip_with_padding_is_the_clip_without_it(batch, pooling):
    levels, targets, valid = batch
    alignment = build(tokens="all", pooling=pooling)
    padded, report = alignment([level[:1] for level in levels], targets[:1], valid[:1])
    cut, cut_report = alignment([level[:1, :, :2] for level in levels], targets[:1])
    assert padded.item() == pytest.approx(cut.item(), rel=FLOAT32_LOSS)
    torch.testing.assert_close(report.weight, cut_report.weight, rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS)


# --- heads and gates


def test_a_shared_network_is_one_network_per_level_with_the_same_weights(batch):
    shared = build(shared_head=True, shared_gate=True)
    own = build(shared_head=False, shared_gate=False)
    assert (len(shared.heads), len(shared.gates)) == (1, 1)
    assert (len(own.heads), len(own.gates)) == (3, 3)
    for number in range(3):
        own.heads[number].load_state_dict(shared.heads[0].state_dict())
        own.gates[number].load_state_dict(shared.gates[0].state_dict())
    assert own(*batch)[0].item() == shared(*batch)[0].item()


def test_heads_have_the_published_shapes():
    shapes = {
        head: [tuple(p.shape) for p in build(head=head).heads[0].parameters() if p.ndim == 2]
        for head in ("mlp", "linear", "repa")
    }
    assert shapes == {
        "mlp": [(D, H), (D, D)],
        "linear": [(D, H)],
        "repa": [(2048, H), (2048, 2048), (D, 2048)],
    }


def test_a_gate_on_the_normalised_sum_sees_directions_and_one_on_the_sum_lengths_too(batch):
    levels, targets, valid = batch
    for form, blind in (("normalised_sum", True), ("sum", False), ("concat", False)):
        alignment = build(gate_input=form)
        weights = [alignment(levels, scale * targets, valid)[1].weight for scale in (1, 10)]
        assert torch.allclose(*weights, atol=FLOAT32_LOSS) == blind, form


# --- weights, losses and reductions


def test_softmax_weights_sum_to_the_number_of_levels_and_are_one_for_a_single_level(batch):
    assert build(weighting="softmax")(*batch)[1].weight.sum().item() == pytest.approx(3, rel=FLOAT32_LOSS)
    single = build(weighting="softmax", levels=(8,))
    constant = build(weighting="one", levels=(8,))
    constant.heads.load_state_dict(single.heads.state_dict())
    assert single(*batch)[0].item() == pytest.approx(constant(*batch)[0].item(), rel=FLOAT32_LOSS)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"weighting": "average"}, {"weighting": "one", "level_reduction": "mean"}),
        ({"weighting": "half", "frame_reduction": "sum"}, {"weighting": "one", "frame_reduction": "sum"}),
    ],
    ids=["a mean over levels", "half of one"],
)
def test_constant_weights_differ_by_their_ratio(batch, one, other):
    one, other = build(**one), build(**other)
    other.load_state_dict(one.state_dict())
    ratio = 1.0 if one.config.weighting == "average" else 0.5
    assert one(*batch)[0].item() == pytest.approx(ratio * other(*batch)[0].item(), rel=FLOAT32_LOSS)


@pytest.mark.parametrize("weighting", ["softmax", "one"])
def test_where_weights_sum_to_a_constant_both_losses_have_the_same_gradients(batch, weighting):
    """1 - cos and -cos then differ by that constant."""
    pair = [build(weighting=weighting, loss=loss) for loss in ("negative_cosine", "one_minus_cosine")]
    pair[1].load_state_dict(pair[0].state_dict())
    losses = [alignment(*batch)[0] for alignment in pair]
    assert losses[1].item() - losses[0].item() == pytest.approx(3, rel=FLOAT32_LOSS)
    gradients = [torch.autograd.grad(loss, list(a.parameters())) for loss, a in zip(losses, pair, strict=True)]
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=FLOAT32_GRADIENT, atol=FLOAT32_GRADIENT)


def test_the_sum_over_frames_grows_with_their_number_and_the_mean_does_not(batch):
    levels, targets, valid = batch
    twice = [torch.cat([level, level], dim=1) for level in levels], torch.cat([targets, targets], dim=1), valid
    for reduction, factor in (("mean", 1), ("sum", 2)):
        alignment = build(frame_reduction=reduction)
        assert alignment(*twice)[0].item() == pytest.approx(factor * alignment(*batch)[0].item(), rel=FLOAT32_LOSS)


# --- targets


def test_centring_takes_a_common_part_out_of_the_targets(batch):
    levels, targets, valid = batch
    common = 5 * torch.randn(D)
    raw, centred = build(), build(target="centred")
    shifted = build(target="centred")
    centred.load_state_dict(raw.state_dict())
    shifted.load_state_dict(raw.state_dict())
    centred.observe(targets)
    shifted.observe(targets + common)
    kd = centred(levels, targets, valid)[0].item()
    assert shifted(levels, targets + common, valid)[0].item() == pytest.approx(kd, rel=1e2 * FLOAT32_LOSS)
    shift = abs(raw(levels, targets + common, valid)[0].item() - raw(levels, targets, valid)[0].item())
    assert shift > 1e-2


def test_layer_norm_takes_offset_and_length_out_of_each_target(batch):
    levels, targets, valid = batch
    alignment = build(target="layer_norm")
    kd = alignment(levels, targets, valid)[0].item()
    assert alignment(levels, 3 * targets + 7, valid)[0].item() == pytest.approx(kd, rel=1e2 * FLOAT32_LOSS)


def test_centring_before_anything_was_observed_is_refused(batch):
    with pytest.raises(ValueError, match="needs targets to be observed"):
        build(target="centred")(*batch)


def test_targets_of_another_width_are_refused(batch):
    levels, targets, valid = batch
    with pytest.raises(ValueError, match="y\\* has 1 entries; the alignment was built for 5"):
        build()(levels, targets[..., :1], valid)
