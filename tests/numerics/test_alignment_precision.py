"""Under bfloat16 autocast the alignment computes in float32: its gradients are those of float32 on the same inputs."""

import pytest
import torch
from tiny_language import KD_WEIGHT, TARGET_WIDTH, build_model
from tiny_qformer import HIDDEN, LEVELS, QUERIES, random_features, random_text, randomise
from tolerances import FLOAT32_GRADIENT, WRONG_BY, relative_difference

from model.alignment import Alignment
from model.config import AlignmentConfig
from model.diff_lmm import Clips
from model.language import AnswerTokens

B, T = 2, 4
SWITCHES = [
    {},
    {"pooling": "loss", "gate_input": "normalised_sum"},
    {"weighting": "softmax", "head": "repa", "pooling": "after"},
    {"weighting": "average", "target": "layer_norm", "loss": "one_minus_cosine"},
]


def clips():
    ids = torch.tensor([[2, 9, 8, 7, 3], [2, 11, 12, 13, 3]])
    answer = torch.tensor([[False, False, False, True, True]]).expand(B, -1)
    return Clips(
        features=random_features(B, T),
        targets=torch.randn(B, T, TARGET_WIDTH),
        question=random_text(5, 2),
        answer=AnswerTokens(ids, torch.ones_like(ids, dtype=torch.bool), answer),
    )


def worst_of_a_step(model, step=lambda model, batch: model.forward_backward(batch)):
    """Take the gradients of a bfloat16 step; largest miss of the alignment's against float32 on what it was given."""
    given = []
    hook = model.alignment.register_forward_hook(lambda _module, inputs, _output: given.append(inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(model, clips())
    hook.remove()
    ((levels, targets, valid),) = given
    mine = {name: parameter.grad.clone() for name, parameter in model.alignment.named_parameters()}
    kd, _ = model.alignment([level.detach().float() for level in levels], targets, valid)
    model.zero_grad(set_to_none=True)
    (KD_WEIGHT * kd).backward()
    return max(relative_difference(mine[name], p.grad) for name, p in model.alignment.named_parameters())


def test_a_bfloat16_step_gives_the_alignment_its_float32_gradients():
    assert worst_of_a_step(build_model()) <= FLOAT32_GRADIENT


def alignment_of(settings):
    config = AlignmentConfig(**{"levels": (8, 13), "gate_width": 6} | settings)
    alignment = Alignment(config, hidden_width=HIDDEN, target_width=TARGET_WIDTH, num_levels=LEVELS)
    randomise(alignment)
    return alignment


def gradients(alignment, levels, targets, *, dtype):
    """Those of all parameters and of both aligned levels, computed under autocast to a dtype; float32 is none."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != torch.float32):
        kd, report = alignment(levels, targets)
    assert kd.dtype == report.cosine.dtype == report.weight.dtype == torch.float32
    return torch.autograd.grad(kd, [*alignment.parameters(), levels[7], levels[12]])


def worst(settings, *, level_dtype=torch.float32):
    alignment = alignment_of(settings)
    levels = [torch.randn(B, T, QUERIES, HIDDEN).to(level_dtype).requires_grad_() for _ in range(LEVELS)]
    targets = torch.randn(B, T, TARGET_WIDTH)
    mine = gradients(alignment, levels, targets, dtype=torch.bfloat16)
    theirs = gradients(alignment, levels, targets, dtype=torch.float32)
    return max(relative_difference(one, other) for one, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("level_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SWITCHES)
def test_autocast_changes_no_gradient_whatever_is_switched(settings, level_dtype):
    assert worst(settings, level_dtype=level_dtype) <= FLOAT32_GRADIENT


# --- wrong variants


def test_autocast_left_on_in_the_alignment_misses_the_tolerance_by_far(monkeypatch):
    def left_on(self, levels, targets, valid=None):
        return self._in_float32(levels, targets, valid)

    monkeypatch.setattr(Alignment, "forward", left_on)
    assert worst({}) > WRONG_BY * FLOAT32_GRADIENT
    assert worst_of_a_step(build_model()) > WRONG_BY * FLOAT32_GRADIENT


def test_a_backward_pass_under_autocast_misses_the_tolerance_by_far():
    """Autocast reaches into it, though the forward pass computed in float32."""
    missed = worst_of_a_step(build_model(), lambda model, batch: model(batch).total.backward())
    assert missed > WRONG_BY * FLOAT32_GRADIENT
