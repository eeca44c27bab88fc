"""Memory is a value: passed in, passed out, never changed, and all there is to know of the past."""

from itertools import pairwise

import pytest
import torch
from tiny_qformer import (
    HIDDEN,
    LEVELS,
    QUERIES,
    M,
    build_qformer,
    difference_in_levels,
    difference_in_memory,
    random_features,
    random_text,
)
from tolerances import FLOAT32_HIDDEN

T = 3 * M


@pytest.fixture(scope="module")
def model():
    return build_qformer(max_frames=T)


@pytest.fixture
def text():
    return random_text(5, 2)


def banks(memory):
    return [tensor for bank in (memory.visual, *memory.layers) for tensor in (bank.slots, bank.counts)]


@torch.no_grad()
@pytest.mark.parametrize("cuts", [(1,), (M,), (T - 1,), (2, M, M + 1)])
def test_a_clip_in_parts_with_memory_passed_on_equals_the_whole_clip(model, text, cuts):
    features = random_features(2, T)
    whole = model(features, text)
    memory, parts = None, []
    for start, stop in pairwise((0, *cuts, T)):
        out = model(features[:, start:stop], text, memory=memory)
        memory = out.memory
        parts.append(out.levels)
    joined = [torch.cat(part, dim=1) for part in zip(*parts, strict=True)]
    assert difference_in_levels(joined, whole.levels) <= FLOAT32_HIDDEN
    assert difference_in_memory(memory, whole.memory) <= FLOAT32_HIDDEN


@torch.no_grad()
def test_a_stream_can_change_from_the_clip_form_to_single_steps(model, text):
    features = random_features(2, T)
    whole = model(features, text)
    out = model(features[:, : T - 1], text, wanted_frames=[0])
    step = model.step(out.memory, features[:, T - 1], text)
    assert difference_in_levels(step.levels, [level[:, -1:] for level in whole.levels]) <= FLOAT32_HIDDEN


@pytest.mark.parametrize("frames_before", [0, 2, T - M])
def test_the_call_leaves_its_inputs_as_they_were(model, text, frames_before):
    features = random_features(2, T)
    memory = None
    if frames_before:
        memory = model(features[:, :frames_before], text).memory
    else:
        memory = model.empty_memory(2, features.shape[2], text.ids.shape[1])
    before = [tensor.clone() for tensor in (*banks(memory), features, text.ids, text.mask)]
    rest = features[:, frames_before:]
    model(rest, text, memory=memory).levels[-1].sum().backward()
    model.step(memory, rest[:, 0], text).levels[-1].sum().backward()
    after = (*banks(memory), features, text.ids, text.mask)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert memory.frames_seen == frames_before


@torch.no_grad()
def test_a_call_remembers_nothing_of_the_call_before(model, text):
    features = random_features(2, T)
    first = model(features, text).levels
    model(random_features(2, M + 2, seed=4), text)
    assert all(torch.equal(one, other) for one, other in zip(model(features, text).levels, first, strict=True))


@torch.no_grad()
def test_the_memory_stays_within_its_slots_and_carries_no_graph(model, text):
    out = model(random_features(2, T), text)
    assert out.memory.visual.num_slots == M
    assert [bank.num_slots for bank in out.memory.layers] == [M] * (LEVELS - 1)
    assert out.memory.frames_seen == T
    assert [tuple(level.shape) for level in out.levels] == [(2, T, QUERIES, HIDDEN)] * LEVELS
    with torch.enable_grad():
        attached = model(random_features(2, T), text).memory
    assert not any(tensor.requires_grad for tensor in banks(attached))


@torch.no_grad()
def test_wanted_frames_are_those_of_the_whole_clip(model, text):
    features = random_features(2, T)
    whole = model(features, text)
    wanted = [1, M, M + 1, T - 1]
    out = model(features, text, wanted_frames=wanted)
    assert difference_in_levels(out.levels, [level[:, wanted] for level in whole.levels]) <= FLOAT32_HIDDEN
    assert difference_in_memory(out.memory, whole.memory) <= FLOAT32_HIDDEN


def test_a_clip_longer_than_the_temporal_table_is_refused(model, text):
    with pytest.raises(ValueError, match=f"{T + 1} frames is longer than qformer.max_frames = {T}"):
        model(random_features(2, T + 1), text)
    memory = model(random_features(2, T), text).memory
    with pytest.raises(ValueError, match="max_frames"):
        model(random_features(2, 1), text, memory=memory)
    with pytest.raises(ValueError, match="max_frames"):
        model.step(memory, random_features(2, 1)[:, 0], text)


@pytest.mark.parametrize(("wanted", "words"), [([], "empty"), ([T], "outside"), ([-1], "outside")])
def test_frames_that_cannot_be_wanted_are_refused(model, text, wanted, words):
    with pytest.raises(ValueError, match=words):
        model(random_features(2, T), text, wanted_frames=wanted)
