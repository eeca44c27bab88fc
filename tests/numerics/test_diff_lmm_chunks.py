"""Going back chunk by chunk gives the losses and gradients of the whole clip at once."""

import pytest
import torch
from tiny_language import KD_WEIGHT, TARGET_WIDTH, VOCABULARY, build_model
from tiny_qformer import M, gradient_misses, random_features, random_text
from tolerances import FLOAT32_LOSS, relative_difference

from model.alignment import Alignment
from model.config import AlignmentConfig
from model.diff_lmm import Clips
from model.language import AnswerTokens

T = 3 * M + 1
SWITCHES = ({}, {"tokens": "all", "frame_reduction": "sum"}, {"target": "centred", "gate_input": "concat"})
FRAMES = {"all": None, "some": [0, 4, 5, T - 2], "last": [T - 1], "not the last": [1]}


def clips():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, VOCABULARY, (2, 6), generator=generator)
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    answer_mask = torch.tensor([[False] * 4 + [True] * 2, [False] * 3 + [True] * 2 + [False]])
    targets = torch.randn(2, T, TARGET_WIDTH, generator=generator)
    return Clips(random_features(2, T), targets, random_text(5, 2), AnswerTokens(ids, mask, answer_mask))


def model_with(**alignment):
    model = build_model().train()
    torch.manual_seed(4)
    config = AlignmentConfig(levels=(1, 8, 13), gate_width=6, **alignment)
    model.alignment = Alignment(config, hidden_width=16, target_width=TARGET_WIDTH, num_levels=13)
    return model


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.trained_parameters().items()}


@pytest.mark.parametrize("frames_per_chunk", [1, 2, M, T])
@pytest.mark.parametrize("which", FRAMES)
@pytest.mark.parametrize(
    "switches",
    [{}, {"tokens": "all", "frame_reduction": "sum"}, {"target": "centred", "gate_input": "concat"}],
    ids=str,
)
def test_losses_and_gradients_are_those_of_the_clip_at_once(switches, which, frames_per_chunk):
    expected_model, model = model_with(**switches), model_with(**switches)
    expected = expected_model(clips(), kd_frames=FRAMES[which], frames_per_chunk=T)
    expected.total.backward()
    actual = model.forward_backward(clips(), kd_frames=FRAMES[which], frames_per_chunk=frames_per_chunk)
    for mine, theirs in [
        (actual.total, expected.total.detach()),
        (actual.answer, expected.answer),
        (actual.kd, expected.kd),
        (actual.total, expected.answer + KD_WEIGHT * expected.kd),
        (actual.alignment.cosine, expected.alignment.cosine),
        (actual.alignment.weight, expected.alignment.weight),
        (actual.alignment.target_to_mean, expected.alignment.target_to_mean),
    ]:
        assert relative_difference(mine, theirs) <= FLOAT32_LOSS
    assert gradient_misses(gradients(model), gradients(expected_model)) == {}
    assert not actual.total.requires_grad


def test_the_running_mean_of_targets_counts_each_step_once_and_is_part_of_a_checkpoint():
    model = model_with()
    model.forward_backward(clips(), frames_per_chunk=2)
    seen = clips().targets.flatten(0, 1)
    assert model.alignment.targets_seen == len(seen)
    assert relative_difference(model.alignment.target_mean, seen.mean(0)) <= FLOAT32_LOSS
    again = model_with()
    again.load_trained({name: tensor.clone() for name, tensor in model.trained_tensors().items()})
    assert torch.equal(again.alignment.target_mean, model.alignment.target_mean)
    assert again.alignment.targets_seen == len(seen)
    model.eval()(clips())
    assert model.alignment.targets_seen == len(seen)


def test_what_stands_on_the_questions_padding_does_not_matter_when_all_tokens_are_aligned():
    model = model_with(tokens="all").eval()
    batch = clips()
    model.alignment.observe(batch.targets)
    other = torch.where(batch.question.mask, batch.question.ids, 11)
    changed = Clips(batch.features, batch.targets, type(batch.question)(other, batch.question.mask), batch.answer)
    assert relative_difference(model(changed).kd, model(batch).kd) <= FLOAT32_LOSS
