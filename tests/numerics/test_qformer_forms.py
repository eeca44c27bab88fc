"""The clip form equals the frame loop: levels, memory and every parameter's gradient."""

from functools import cache

import pytest
import torch
from tiny_qformer import (
    HIDDEN,
    M,
    assert_same_results,
    build_qformer,
    frame_loop,
    gradients_of,
    loss_on,
    random_features,
    random_text,
)
from tolerances import BFLOAT16_EXCESS, BFLOAT16_GRADIENT, BFLOAT16_HIDDEN, FLOAT32_HIDDEN, rms_difference

LENGTHS = (5, 2)  # texts of a batch of two
LONG, LONG_SLOTS = 100, 20  # the paper's clip


def black_then_still(num_frames):
    """Two black frames, then one picture again and again."""
    features = random_features(2, 1).repeat(1, num_frames, 1, 1)
    features[:, :2] = 0.0
    return features


CONTENTS = {
    "random": lambda num_frames: random_features(2, num_frames),
    "identical": lambda num_frames: random_features(2, 1).repeat(1, num_frames, 1, 1),
    "black": lambda num_frames: torch.zeros_like(random_features(2, num_frames)),
    "black, then still": black_then_still,
}


@cache
def the_model(memory_slots=M):
    return build_qformer(memory_slots)


def run_loop(content, num_frames, wanted, memory_slots=M):
    model = the_model(memory_slots)
    levels, memory = frame_loop(model, CONTENTS[content](num_frames), random_text(*LENGTHS))
    levels = tuple(level[:, wanted] for level in levels)
    return levels, memory, gradients_of(model, loss_on(levels, wanted))


def run_clip(content, num_frames, wanted, memory_slots=M, **options):
    model = the_model(memory_slots)
    out = model(CONTENTS[content](num_frames), random_text(*LENGTHS), wanted_frames=wanted, **options)
    return out.levels, out.memory, gradients_of(model, loss_on(out.levels, wanted))


WANTED = {
    "all": lambda num_frames: list(range(num_frames)),
    "last": lambda num_frames: [num_frames - 1],
    "some": lambda num_frames: sorted(
        torch.randperm(num_frames, generator=torch.Generator().manual_seed(5))[: (num_frames + 1) // 2].tolist()
    ),
}


CHUNKS = (None, 2, 1, 64)  # frames_per_chunk


@pytest.mark.parametrize("which", WANTED)
@pytest.mark.parametrize("num_frames", [1, M - 1, M, M + 1, 3 * M])
def test_the_clip_form_equals_the_frame_loop(num_frames, which):
    wanted = WANTED[which](num_frames)
    expected = run_loop("random", num_frames, wanted)
    for frames_per_chunk in CHUNKS if which == "all" else CHUNKS[:2]:
        actual = run_clip("random", num_frames, wanted, frames_per_chunk=frames_per_chunk)
        assert_same_results(actual, expected)


@pytest.mark.parametrize("content", ["identical", "black", "black, then still"])
def test_the_clip_form_equals_the_frame_loop_on_frames_that_repeat(content):
    wanted = WANTED["all"](2 * M + 1)
    actual = run_clip(content, 2 * M + 1, wanted)
    assert_same_results(actual, run_loop(content, 2 * M + 1, wanted))


def test_the_clip_form_equals_the_frame_loop_on_a_clip_of_one_hundred_frames():
    wanted = WANTED["all"](LONG)
    actual = run_clip("random", LONG, wanted, memory_slots=LONG_SLOTS)
    assert_same_results(actual, run_loop("random", LONG, wanted, memory_slots=LONG_SLOTS))


def test_every_parameter_but_the_last_text_feed_forward_gets_a_gradient():
    """Without this, two forms that both send no gradient would agree."""
    for which in ("all", "last"):
        _, _, gradients = run_clip("random", 3 * M, WANTED[which](3 * M))
        silent = {name for name, grad in gradients.items() if grad is None or not grad.any()}
        last_layer = {f"qformer.encoder.layer.11.{part}." for part in ("intermediate", "output")}
        assert {name for name in silent if not name.startswith(tuple(last_layer))} == set()
        assert silent != set()


@pytest.mark.parametrize("num_frames", [M, 2 * M + 1])
def test_the_clip_form_equals_the_frame_loop_in_bfloat16(num_frames):
    wanted = WANTED["all"](num_frames)
    exact = run_loop("random", num_frames, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loop = run_loop("random", num_frames, wanted)
        clip = run_clip("random", num_frames, wanted)
        again = run_clip("random", num_frames, wanted, frames_per_chunk=2)
    for form in (clip, again):
        assert rms_difference(form[0], loop[0]) <= BFLOAT16_HIDDEN
        assert rms_difference(*flat_gradients(form, loop)) <= BFLOAT16_GRADIENT
        assert rms_difference(form[0], exact[0]) <= BFLOAT16_EXCESS * rms_difference(loop[0], exact[0])
        assert rms_difference(*flat_gradients(form, exact)) <= BFLOAT16_EXCESS * rms_difference(
            *flat_gradients(loop, exact)
        )


def flat_gradients(mine, theirs):
    """Each parameter's gradient of two runs, scaled alike, so that small ones count as much as large ones."""
    names = [name for name, grad in theirs[2].items() if grad is not None and not name.endswith("key.bias")]
    scales = [theirs[2][name].norm().clamp(min=1e-12) / HIDDEN for name in names]
    return tuple([run[2][name] / scale for name, scale in zip(names, scales, strict=True)] for run in (mine, theirs))


@pytest.fixture
def dropping_out():
    model = build_qformer()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.5
        elif hasattr(part, "attention_head_size"):
            part.config.attention_probs_dropout_prob = 0.5
    return model


def test_dropout_acts_in_training_only(dropping_out):
    features, text = random_features(1, 4), random_text(3)

    def last_level():
        return dropping_out(features, text).levels[-1]

    assert torch.equal(last_level(), last_level())
    dropping_out.train()
    assert not torch.equal(last_level(), last_level())


def test_parameters_of_another_type_are_computed_with():
    model = build_qformer()
    features, text = random_features(2, M + 2), random_text(*LENGTHS)
    expected = model(features, text).levels
    for dtype, tolerance in ((torch.float64, FLOAT32_HIDDEN), (torch.bfloat16, BFLOAT16_HIDDEN)):
        levels = model.to(dtype)(features.to(dtype), text).levels
        assert rms_difference(levels, expected) <= tolerance


@pytest.mark.parametrize("which", ["last", "some"])
def test_frames_without_a_graph_and_frames_with_one_share_an_autocast(which):
    """Weights cast while nothing needed a gradient must not be taken again where something does."""
    wanted = WANTED[which](3 * M)
    exact = run_clip("random", 3 * M, wanted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run_clip("random", 3 * M, wanted)
    assert {name for name, grad in low[2].items() if grad is None} == {
        n for n, grad in exact[2].items() if grad is None
    }
    assert rms_difference(*flat_gradients(low, exact)) <= BFLOAT16_GRADIENT * BFLOAT16_EXCESS


@pytest.mark.parametrize("frames_per_chunk", [0, -1])
def test_chunks_of_no_frames_are_refused(frames_per_chunk):
    with pytest.raises(ValueError, match="frames_per_chunk"):
        the_model()(random_features(2, 3), random_text(*LENGTHS), frames_per_chunk=frames_per_chunk)


def test_a_clip_of_no_frames_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        the_model()(random_features(2, 3)[:, :0], random_text(*LENGTHS))
